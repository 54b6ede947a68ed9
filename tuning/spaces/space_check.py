"""Checks before a sweep begins that each trial of its space is valid.

Values are tried at the corners and within the ranges, one parameter at a time and all together.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from cluster.base.config import flatten
from cluster.base.errors import SpecError
from tuning.spaces.distributions import Distribution, Parameters, identical
from tuning.spaces.suggestion import (
    MISSING,
    can_be,
    completed,
    example,
    field_value,
    field_values,
    fields_of,
    is_continuous,
    parameters_setting,
    referred_paths,
    section_values,
    touches,
)

PLACE = "sweep.parameters"
FIXED = {
    "sweep": "the search itself cannot be varied",
    "workload": "cannot be varied within a sweep",
    "storage": "is the same for all trials of a sweep",
    "datasets": "is the same for all trials of a sweep",
    "tracking": "is the same for all trials of a sweep",
    "budget": "is that of the sweep as a whole",
    "cost": "is the same for all trials of a sweep",
    "session": "is the same for all trials of a sweep",
    "checkpoint.metric": "trials rank their checkpoints by sweep.metric",
    "checkpoint.mode": "trials rank their checkpoints by sweep.mode",
}
"""Field or section -> why a trial cannot have its own."""
TRIED_VALUES = 32
"""Values of a range that are tried."""
SHOWN_VALUES = 10
MOST_DATA_SETS = 100
TRIED_TRIALS = 64
"""Trials at random that are tried."""

Mistake = Callable[[Mapping[str, Any]], str | None]
"""What is wrong with a trial's parameters, in a line; None if nothing is."""


def check_space(parameters: Parameters, mistake: Mistake) -> None:
    """Raise a SpecError of one line if a trial may be invalid, or a condition can never hold."""
    for path, distribution in parameters.items():
        _check_fields(path, distribution)
        _check_choice(path, distribution)
    for path, distribution in parameters.items():
        _check_conditions(parameters, path, distribution)
    _check_data_sets(parameters)
    rng = random.Random(0)
    for chosen in _tried_trials(parameters, rng):
        _check_overlap(chosen)
        problem = mistake(chosen)
        if problem is not None:
            raise SpecError(_blame(chosen, problem, mistake))


def _check_fields(path: str, distribution: Distribution) -> None:
    for value in distribution.choice or [None]:
        for field in flatten(fields_of(path, value)):
            for fixed, reason in FIXED.items():
                if f"{field}.".startswith(f"{fixed}."):
                    named = "" if field == path else f"{field}: "
                    raise SpecError(f"{PLACE}.{path}: {named}{reason}")


def _check_choice(path: str, distribution: Distribution) -> None:
    values = distribution.choice or []
    for place, value in enumerate(values):
        if any(identical(value, earlier) for earlier in values[:place]):
            raise SpecError(f"{PLACE}.{path}: the choice has {value!r} twice")


def _check_conditions(parameters: Parameters, path: str, distribution: Distribution) -> None:
    for referred in referred_paths(distribution):
        for setting in parameters_setting(parameters, referred):
            for value in parameters[setting].choice or []:
                if field_value(referred, {setting: value}) is MISSING:
                    raise SpecError(
                        f"{PLACE}.{setting}: each choice must set {referred}, on which {path} "
                        f"depends (got {value!r})"
                    )
    for referred, wanted in distribution.when.items():
        place = f"{PLACE}.{path}.when.{referred}"
        if is_continuous(parameters, referred):
            raise SpecError(f"{place}: has a continuous range; give it a choice, integers or steps")
        several = isinstance(wanted, list) and not can_be(parameters, referred, wanted)
        for each in wanted if several else [wanted]:
            if not can_be(parameters, referred, each):
                known = map(repr, islice(field_values(parameters, referred), SHOWN_VALUES))
                raise SpecError(f"{place}: is never {each!r} (it can be {', '.join(known)})")
    first = (distribution.values() or distribution.boundary_values() or [None])[0]
    if distribution.when and example(parameters, path, first) is None:
        raise SpecError(f"{PLACE}.{path}.when: its conditions never hold together")


def _check_data_sets(parameters: Parameters) -> None:
    """All data sets are prepared before the sweep begins."""
    setting = [path for path, d in parameters.items() if touches(path, d, "data")]
    for path in setting:
        if is_continuous(parameters, path):
            raise SpecError(
                f"{PLACE}.{path}: each value would be a data set of its own; give it a choice, "
                "integers or steps"
            )
    found: set[str] = set()
    for chosen in section_values(parameters, "data"):
        found.add(repr({path: chosen[path] for path in setting if path in chosen}))
        if len(found) > MOST_DATA_SETS:
            raise SpecError(
                f"{PLACE}: {' and '.join(setting)} have more than {MOST_DATA_SETS} combinations, "
                "each a data set of its own"
            )


def _tried_trials(parameters: Parameters, rng: random.Random) -> Iterator[dict[str, Any]]:
    for path, distribution in parameters.items():
        for value in _tried_values(distribution, rng):
            chosen = example(parameters, path, value)
            assert chosen is not None
            yield chosen
    for _ in range(TRIED_TRIALS):
        yield completed(parameters, {}, rng)


def _tried_values(distribution: Distribution, rng: random.Random) -> list[Any]:
    """All values of a choice; of a range the bounds, those next to them, and some within."""
    if distribution.same_as is not None:
        return []
    values = distribution.values()
    if distribution.choice is not None or (values is not None and len(values) <= TRIED_VALUES):
        return list(values or [])
    tried = [*distribution.boundary_values(), *(values[1:4] if values is not None else [])]
    return [*tried, *(distribution.sample(rng) for _ in range(TRIED_VALUES - len(tried)))]


def _check_overlap(chosen: Mapping[str, Any]) -> None:
    """No two parameters of a trial may set the same field."""
    owners: dict[str, str] = {}
    for path, value in chosen.items():
        for field in flatten(fields_of(path, value)):
            parts = field.split(".")
            sections = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
            for other, owner in owners.items():
                if owner != path and (other in sections or other.startswith(f"{field}.")):
                    raise SpecError(f"{PLACE}.{path}: {other} is set by {PLACE}.{owner} as well")
            owners[field] = path


def _blame(chosen: Mapping[str, Any], problem: str, mistake: Mistake) -> str:
    """The mistake with the parameters that make it: without any of them it would be another."""
    left = dict(chosen)
    for path in chosen:
        fewer = {other: value for other, value in left.items() if other != path}
        if mistake(fewer) == problem:
            left = fewer
    if not left:
        return f"{PLACE}: {problem}"
    first, *others = left
    together = ", ".join(f"{path} {left[path]!r}" for path in others)
    return f"{PLACE}.{first}: {problem}{f', with {together}' if together else ''}"
