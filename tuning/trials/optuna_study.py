"""The journal of a sweep as an Optuna study, for the search and for the importances."""

import math
from typing import TYPE_CHECKING

from tuning.trials.journal import Journal
from tuning.trials.space import SweepSpec
from tuning.trials.suggestion import optuna_parameters

if TYPE_CHECKING:
    import optuna


def frozen_trial(sweep: SweepSpec, journal: Journal, number: int) -> "optuna.trial.FrozenTrial":
    """An ended trial as an Optuna trial: complete, pruned at a step, or failed."""
    from optuna.trial import TrialState, create_trial

    end = journal.ends[number]
    value = end["value"]
    state = TrialState.COMPLETE if end["complete"] else TrialState.PRUNED
    if value is None or not math.isfinite(value):
        state, value = TrialState.FAIL, None
    params, distributions = optuna_parameters(sweep.parameters, journal.parameters_after(number))
    return create_trial(
        state=state,
        value=value if state is TrialState.COMPLETE else None,
        params=params,
        distributions=distributions,
        intermediate_values={end["step"]: value} if state is TrialState.PRUNED else {},
    )


def study_from_journal(sweep: SweepSpec, journal: Journal) -> "optuna.Study":
    """An Optuna study with the sweep's sampler and the ended trials of the journal."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = sweep.seed + len(journal.parameters)
    sampler: optuna.samplers.BaseSampler
    if sweep.search == "tpe":
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    elif sweep.search == "cmaes":
        sampler = optuna.samplers.CmaEsSampler(seed=seed)
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed)
    direction = "maximize" if sweep.mode == "max" else "minimize"
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.add_trials([frozen_trial(sweep, journal, number) for number in journal.ends])
    return study
