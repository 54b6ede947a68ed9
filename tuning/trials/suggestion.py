"""From a sweep's space to the parameters of one trial: conditions, ties and whole sections.

A trial's parameters have no entry for a parameter whose conditions do not hold, and one for each
parameter that is tied to another. Optuna sees only those that are chosen: neither ties nor those
whose conditions do not hold.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cluster.base.config import did_you_mean, with_value
from trainers.spec import RunSpec
from tuning.trials.distributions import Distribution, Parameters, equal

if TYPE_CHECKING:
    import optuna

    from tuning.trials.space import SweepSpec

_MISSING = object()


def suggest(trial: "optuna.Trial", sweep: "SweepSpec") -> dict[str, Any]:
    """The parameters of a trial, each suggested by Optuna's `trial` in the order of conditions."""

    def options(path: str, distribution: Distribution) -> list[Any]:
        return [distribution.from_optuna(suggest_value(trial, path, distribution))]

    return next(possible_parameters(sweep.parameters, options))


def suggest_value(trial: "optuna.Trial", path: str, distribution: Distribution) -> Any:
    """What Optuna suggests for one parameter, in Optuna's form: an index for a choice."""
    low, high = distribution.bounds or (0, 0)
    log, step = distribution.is_log, distribution.step
    if distribution.choice is not None:
        return trial.suggest_categorical(path, tuple(range(len(distribution.choice))))
    if distribution.is_integer:
        return trial.suggest_int(path, int(low), int(high), log=log, step=int(step or 1))
    return trial.suggest_float(path, low, high, log=log, step=step)


def optuna_parameters(
    parameters: Parameters, chosen: Mapping[str, Any]
) -> tuple[dict[str, Any], "dict[str, optuna.distributions.BaseDistribution]"]:
    """A trial's parameters as Optuna's `params` and `distributions`, as `suggest` asked for them.

    Ties and parameters that the trial does not have are left out.
    """
    asked = {path: d for path, d in parameters.items() if path in chosen and d.same_as is None}
    values = {path: d.optuna_value(chosen[path]) for path, d in asked.items()}
    return values, {path: d.to_optuna() for path, d in asked.items()}


def optuna_values(parameters: Parameters, point: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a point, or of a part of one, in Optuna's form; ValueError if it is outside."""
    values = {}
    for path, value in point.items():
        if path not in parameters:
            raise ValueError(f"{path} is not among the parameters{did_you_mean(path, parameters)}")
        tied_to = parameters[path].same_as
        if tied_to is not None:
            raise ValueError(f"{path} is the same as {tied_to}; leave it out")
        try:
            values[path] = parameters[path].optuna_value(value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return values


def combinations(parameters: Parameters) -> Iterator[dict[str, Any]]:
    """Every combination of a finite space once, the last parameter changing fastest."""
    return possible_parameters(parameters, lambda _, distribution: distribution.values() or [])


def count_combinations(parameters: Parameters) -> int | None:
    """The number of combinations; None if the space is not finite."""
    if any(d.values() is None for d in parameters.values() if d.same_as is None):
        return None
    referenced = {path for d in parameters.values() for path in _referred_paths(d)}
    alone = {
        path: len(d.values() or [])
        for path, d in parameters.items()
        if d.same_as is None
        and not d.when
        and not any(_touches(path, d, other) for other in referenced)
    }
    rest = {path: d for path, d in parameters.items() if path not in alone}
    return math.prod(alone.values()) * sum(1 for _ in combinations(rest))


def possible_parameters(
    parameters: Parameters, options: Callable[[str, Distribution], Iterable[Any]]
) -> Iterator[dict[str, Any]]:
    """The parameters of all trials whose values are among `options`, in the order of the file.

    `options` is called for each parameter that is chosen: not for ties, and not where conditions
    do not hold. The parameters on which a condition or tie depends are chosen before it.
    """
    order = dependency_order(parameters)

    def extended(chosen: dict[str, Any], place: int) -> Iterator[dict[str, Any]]:
        if place == len(order):
            yield {path: chosen[path] for path in parameters if path in chosen}
            return
        path = order[place]
        distribution = parameters[path]
        values: Iterable[Any]
        if not _is_active(distribution, chosen):
            values = [_MISSING]
        elif distribution.same_as is not None:
            values = [_field_value(distribution.same_as, chosen)]
        else:
            values = options(path, distribution)
        for value in values:
            yield from extended(chosen if value is _MISSING else {**chosen, path: value}, place + 1)

    return extended({}, 0)


def dependency_order(parameters: Parameters) -> list[str]:
    """The paths of all parameters, each after those of its conditions and ties.

    Otherwise in the order of the file. Raises ValueError for a circle, and for a condition or tie
    on what the sweep does not vary.
    """
    order: list[str] = []

    def add(path: str, above: tuple[str, ...]) -> None:
        if path in above:
            circle = " -> ".join((*above[above.index(path) :], path))
            raise ValueError(f"conditions and ties go in a circle: {circle}")
        if path in order:
            return
        for referred in _referred_paths(parameters[path]):
            touching = [other for other, d in parameters.items() if _touches(other, d, referred)]
            if referred in parameters:
                touching = [referred]
            if not touching:
                raise ValueError(f"{path} depends on {referred}, which is no parameter")
            for other in touching:
                add(other, (*above, path))
        order.append(path)

    for path in parameters:
        add(path, ())
    return order


def assignments(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a trial's parameters set: dotted path -> value, sections before their fields.

    A parameter that is named like no section of the spec, and whose value is a mapping, sets the
    fields that the mapping names.
    """
    fields: dict[str, Any] = {}
    for path, value in chosen.items():
        fields |= value if _sets_several(path, value) else {path: value}
    return dict(sorted(fields.items(), key=lambda item: item[0].count(".")))


def _sets_several(path: str, value: Any) -> bool:
    return isinstance(value, Mapping) and "." not in path and path not in RunSpec.model_fields


def _referred_paths(distribution: Distribution) -> list[str]:
    tied = [distribution.same_as] if distribution.same_as is not None else []
    return [*distribution.when, *tied]


def _touches(path: str, distribution: Distribution, field: str) -> bool:
    """Whether a parameter can set `field`, a part of it, or a section with it."""
    own = {path} if distribution.choice is None else set()
    for value in distribution.choice or []:
        own |= set(value) if _sets_several(path, value) else {path}
    return (
        any(
            each == field or each.startswith(f"{field}.") or field.startswith(f"{each}.")
            for each in own
        )
        or field == path
    )


def _is_active(distribution: Distribution, chosen: Mapping[str, Any]) -> bool:
    return all(
        _fulfils(_field_value(path, chosen), wanted) for path, wanted in distribution.when.items()
    )


def _fulfils(value: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one, or in the wanted list."""
    if value is _MISSING:
        return False
    several = wanted if isinstance(wanted, list) else []
    return equal(value, wanted) or any(equal(value, each) for each in several)


def _field_value(path: str, chosen: Mapping[str, Any]) -> Any:
    """The value that the chosen parameters give to a field, or that of the parameter `path`."""
    if path in chosen:
        return chosen[path]
    value: Any = {}
    for field, own in assignments(chosen).items():
        value = with_value(value, field, own)
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value
