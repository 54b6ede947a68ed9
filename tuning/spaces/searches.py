"""The searches of a sweep by name, and what each needs of the space."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from tuning.spaces.distributions import Parameters
from tuning.spaces.suggestion import optuna_values

Search: TypeAlias = Literal[
    "auto",
    "random",
    "grid",
    "bruteforce",
    "qmc",
    "tpe",
    "gp",
    "cmaes",
    "nsgaii",
    "nsgaiii",
]
EXHAUSTIVE = ("grid", "bruteforce")
"""The searches that try every combination of a finite space once."""
WITHOUT_MEMORY = (*EXHAUSTIVE, "random")
"""The searches that learn nothing from earlier trials."""
FROM_LAST_VALUES = ("gp", "cmaes", "nsgaii", "nsgaiii")
"""The searches to which Optuna tells only complete trials. They are told of a stopped trial as of a
complete one with its last value: it was stopped because that was among the worse ones."""
ONE_OBJECTIVE = ("cmaes",)
"""The searches that look at the first objective alone."""
MAX_COMBINATIONS = 1_000_000
"""More trials than that are a mistake in the space of an exhaustive search."""


def check_search(
    search: str, parameters: Parameters, points: Sequence[Mapping[str, Any]], total_trials: int
) -> None:
    """Raise ValueError if the space is not one for the search, or a point to try is outside."""
    if search in EXHAUSTIVE and total_trials > MAX_COMBINATIONS:
        raise ValueError(
            f"{search} would try {total_trials:,} combinations, and the most are "
            f"{MAX_COMBINATIONS:,}; the other searches try as many as `trials`"
        )
    for number, point in enumerate(points):
        try:
            optuna_values(parameters, point)
        except ValueError as error:
            raise ValueError(f"enqueue.{number}: {error}") from None


def check_finite(search: str, parameters: Parameters) -> None:
    """Raise ValueError if an exhaustive search is to try all values of a continuous range."""
    for path, distribution in parameters.items():
        if search in EXHAUSTIVE and distribution.same_as is None and not distribution.values():
            raise ValueError(f"{search} needs a choice for every parameter, {path} has none")
