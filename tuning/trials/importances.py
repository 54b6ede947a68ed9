"""Which parameters of a sweep mattered: fANOVA by Optuna."""

import threading
from typing import TYPE_CHECKING

from tuning.trials.journal import Journal
from tuning.trials.optuna_study import study_from_journal
from tuning.trials.space import SweepSpec

if TYPE_CHECKING:
    import optuna

FANOVA_TREE_DEPTH = 8
"""Optuna's default of 64 splits until each leaf holds a single trial, which gets slower with more
trials, and changes the shares by less than another seed does."""


def parameter_importances(sweep: SweepSpec, journal: Journal) -> dict[str, float]:
    """fANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014) by Optuna.

    Path of each parameter -> its share of the metric's variance; {} with too few trials, or with
    values that are all the same. A stopped trial counts with the
    value at which it was stopped. Takes minutes with 10,000 trials.
    """
    import optuna

    study = study_from_journal(sweep, journal)
    trials = [_as_complete(trial) for trial in study.trials]
    known = [trial for trial in trials if trial.state.name == "COMPLETE"]
    values = {trial.value for trial in known}
    if len(known) < 4 or len(values) < 2:
        return {}
    plain = optuna.create_study(direction=study.direction.name.lower())
    plain.add_trials(known)
    evaluator = optuna.importance.FanovaImportanceEvaluator(max_depth=FANOVA_TREE_DEPTH, seed=0)
    try:
        found = optuna.importance.get_param_importances(plain, evaluator=evaluator)
    except RuntimeError:  # Optuna 5.0.0: "Encountered zero total variance in all trees."
        return {}
    return {str(path): float(share) for path, share in found.items()}


def load_packages() -> None:
    """Import what `parameter_importances` needs, which takes a second, in a thread."""

    def load() -> None:
        import optuna.importance  # noqa: F401
        import sklearn.ensemble  # noqa: F401

    threading.Thread(target=load, daemon=True, name="load-importances").start()


def _as_complete(trial: "optuna.trial.FrozenTrial") -> "optuna.trial.FrozenTrial":
    """A pruned trial as a complete one with its last value; any other trial as it is."""
    from optuna.trial import TrialState, create_trial

    if trial.state is not TrialState.PRUNED or not trial.intermediate_values:
        return trial
    value = list(trial.intermediate_values.values())[-1]
    return create_trial(value=value, params=trial.params, distributions=trial.distributions)
