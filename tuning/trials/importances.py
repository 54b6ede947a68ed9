"""Which parameters of a sweep mattered: fANOVA by Optuna."""

import threading

from tuning.spaces.space import SweepSpec
from tuning.spaces.suggestion import optuna_parameters
from tuning.trials.journal import Journal
from tuning.trials.ranking import is_ranked

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

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = []
    for number, end in journal.ends.items():
        if is_ranked(sweep, end["value"]):
            last = journal.parameters_after(number)
            params, distributions = optuna_parameters(sweep.parameters, last)
            known.append(
                optuna.trial.create_trial(
                    value=end["value"], params=params, distributions=distributions
                )
            )
    if len(known) < 4 or len({trial.value for trial in known}) < 2:
        return {}
    plain = optuna.create_study()
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
