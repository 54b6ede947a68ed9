"""Which of Optuna's samplers suggests the trials of a sweep, and each of its random numbers' seed.

A sampler is made anew for each suggestion, with a seed of that trial's own. So it holds nothing
that a resumed sweep would not have: the next suggestion depends on the study alone.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuning.spaces.space import SweepSpec
from tuning.spaces.suggestion import count_combinations

if TYPE_CHECKING:
    import optuna

MAX_GP_TRIALS = 250
"""Trials up to which `auto` takes the Gaussian process, as Optuna's AutoSampler does: the time of a
suggestion grows with the cube of their number, and is about a second there."""
MAX_GP_OBJECTIVES = 3
MIN_SOURCE_TRIALS = 10
"""Trials of earlier sweeps from which CMA-ES takes its first distribution: it uses the best tenth.
"""
MIN_POPULATION, MAX_POPULATION, GENERATIONS = 8, 50, 8
"""A genetic search has a population of a GENERATIONS-th of the trials, within these bounds. Optuna
always takes 50, of which the first 50 trials are random."""


def algorithm(sweep: SweepSpec) -> str:
    """The search of the sweep; for `auto` the one that is chosen."""
    return _chosen(sweep)[0] if sweep.search == "auto" else sweep.search


def search_words(sweep: SweepSpec) -> str:
    """The search for people: its name, and with `auto` also why it was chosen."""
    if sweep.search != "auto":
        return sweep.search
    name, reason = _chosen(sweep)
    return f"{name} (auto: {reason})"


def _chosen(sweep: SweepSpec) -> tuple[str, str]:
    """What `auto` takes, and why: Optuna's AutoSampler's choice, where no trial is stopped early.

    AutoSampler (OptunaHub, 2025) takes TPE for choices and conditions, a Gaussian process for
    numbers up to 250 trials, and CMA-ES or NSGA after them. Its Gaussian process and CMA-ES do not
    see stopped trials. TPE compares those by how far they came.
    """
    count = count_combinations(sweep.parameters)
    objectives = max(1, len(sweep.objective))
    if sweep.scheduler.name == "pbt":
        return "random", "pbt needs a population that is spread"
    if count is not None and count <= sweep.trials:
        return "bruteforce", f"the space has {count} combinations"
    if sweep.scheduler.name != "none":
        return "tpe", f"it learns from the trials that {sweep.scheduler.name} stops as well"
    if not _numbers_only(sweep):
        return "tpe", "there are choices or conditions"
    if sweep.trials <= MAX_GP_TRIALS and objectives <= MAX_GP_OBJECTIVES:
        return "gp", f"numbers only, and at most {MAX_GP_TRIALS} trials"
    if objectives > 1:
        return ("nsgaiii" if objectives > MAX_GP_OBJECTIVES else "nsgaii"), "several objectives"
    if sweep.constraints:
        return "tpe", "cmaes would not learn how far a constraint is broken"
    return "cmaes", f"numbers only, and more than {MAX_GP_TRIALS} trials"


def build_sampler(
    sweep: SweepSpec, name: str, seed: int, earlier: "Sequence[optuna.trial.FrozenTrial]"
) -> "optuna.samplers.BaseSampler":
    """The sampler `name` for one suggestion. `earlier` are complete trials of other sweeps."""
    from optuna import samplers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Optuna calls experimental
        if name == "tpe":
            return samplers.TPESampler(seed=seed, constant_liar=True)
        if name == "gp":
            return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        if name == "cmaes":
            source: dict[str, Any] = {}
            if len(earlier) >= MIN_SOURCE_TRIALS and _numbers_only(sweep):
                source["source_trials"] = list(earlier)
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False, **source)
        if name == "qmc":  # one sequence for the whole sweep
            return samplers.QMCSampler(
                scramble=True,
                seed=sweep.seed,
                independent_sampler=samplers.RandomSampler(seed=seed),
                warn_independent_sampling=False,
            )
        if name in ("nsgaii", "nsgaiii"):
            population = sweep.total_trials // GENERATIONS
            size = min(MAX_POPULATION, max(MIN_POPULATION, population))
            kind = samplers.NSGAIISampler if name == "nsgaii" else samplers.NSGAIIISampler
            return kind(seed=seed, population_size=size)
        return samplers.RandomSampler(seed=seed)


def _numbers_only(sweep: SweepSpec) -> bool:
    """Whether all of Optuna's parameters are ranges, always there, of more than one value."""
    asked = [d for d in sweep.parameters.values() if d.same_as is None]
    return all(d.bounds and d.bounds[0] < d.bounds[1] and not d.when for d in asked)


def suggestion_seed(sweep: SweepSpec, trial: int, attempt: int) -> int:
    """The seed of a suggestion: far apart for neighbours, below 2**32."""
    import numpy as np

    return int(np.random.SeedSequence([sweep.seed, trial, attempt]).generate_state(1)[0])
