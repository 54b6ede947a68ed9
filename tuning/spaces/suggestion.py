"""From a sweep's space to the parameters of one trial: conditions, ties and whole sections.

A trial's parameters have no entry for a parameter whose conditions do not hold, and one for each
parameter that is tied to another. Optuna sees only those that are chosen: neither ties nor those
whose conditions do not hold.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cluster.base.config import did_you_mean, with_value
from trainers.spec import RunSpec
from tuning.spaces.distributions import Distribution, Parameters, equal

if TYPE_CHECKING:
    import optuna

    from tuning.spaces.space import SweepSpec

MISSING = object()
"""In place of the value of a field that no parameter of the trial sets."""


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


def completed(
    parameters: Parameters, values: Mapping[str, Any], rng: random.Random
) -> dict[str, Any]:
    """The parameters of a trial with `values`: ties follow, those whose conditions do not hold are
    left out, and those that are missing are chosen at random."""

    def options(path: str, distribution: Distribution) -> list[Any]:
        return [values[path] if path in values else distribution.sample(rng)]

    return next(possible_parameters(parameters, options))


def combinations(parameters: Parameters) -> Iterator[dict[str, Any]]:
    """Every combination of a finite space once, the last parameter changing fastest."""
    return possible_parameters(parameters, lambda _, distribution: distribution.values() or [])


def count_combinations(parameters: Parameters) -> int | None:
    """The number of combinations; None if the space is not finite.

    Lists the values of those parameters only on which the conditions of others depend.
    """
    if any(d.values() is None for d in parameters.values() if d.same_as is None):
        return None
    order = dependency_order(parameters)
    conditions = [path for d in parameters.values() for path in d.when]
    deciding: set[str] = set()
    for path in reversed(order):
        tied_to = parameters[path].same_as
        if any(path in parameters_setting(parameters, field) for field in conditions):
            deciding.add(path)
            conditions += [tied_to] if tied_to is not None else []

    def count(chosen: dict[str, Any], place: int) -> int:
        if place == len(order):
            return 1
        path = order[place]
        distribution = parameters[path]
        if not _is_active(distribution, chosen):
            return count(chosen, place + 1)
        if path not in deciding:
            return len(distribution.values() or [None]) * count(chosen, place + 1)
        values: Iterable[Any] = distribution.values() or []
        if distribution.same_as is not None:
            values = [field_value(distribution.same_as, chosen)]
        return sum(count({**chosen, path: value}, place + 1) for value in values)

    return count({}, 0)


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
            values = [MISSING]
        elif distribution.same_as is not None:
            values = [field_value(distribution.same_as, chosen)]
        else:
            values = options(path, distribution)
        for value in values:
            yield from extended(chosen if value is MISSING else {**chosen, path: value}, place + 1)

    return extended({}, 0)


def reference(parameters: Parameters, values: Mapping[str, Any]) -> dict[str, Any]:
    """The trial in which each parameter has its last value, but for those with `values`."""

    def options(path: str, distribution: Distribution) -> list[Any]:
        return [values[path] if path in values else distribution.boundary_values()[-1]]

    return next(possible_parameters(parameters, options))


def example(parameters: Parameters, path: str, value: Any) -> dict[str, Any] | None:
    """A trial in which the parameter `path` has the value; None if its conditions never hold.

    The others have their last value, as far as the conditions allow.
    """
    needed = with_dependencies(parameters, [path])

    def options(other: str, distribution: Distribution) -> list[Any]:
        return [value] if other == path else _told_apart(distribution, needed)

    found = (each for each in possible_parameters(needed, options) if path in each)
    first = next(found, None)
    return None if first is None else reference(parameters, first)


def _told_apart(distribution: Distribution, parameters: Parameters) -> list[Any]:
    """All values of a choice; of a range the last one, and those that a condition names."""
    if distribution.choice is not None:
        return distribution.choice[::-1]
    listed = distribution.values() or distribution.boundary_values()
    wanted = [each for other in parameters.values() for each in other.when.values()]
    named = [
        each for values in wanted for each in (values if isinstance(values, list) else [values])
    ]
    numbers = [each for each in named if isinstance(each, int | float) and each in listed]
    return [listed[-1], *(listed[listed.index(each)] for each in numbers)]


def with_dependencies(parameters: Parameters, paths: list[str]) -> dict[str, Distribution]:
    """Those parameters, and all on which their conditions and ties depend."""
    needed: set[str] = set()
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        if path not in needed:
            needed.add(path)
            for referred in referred_paths(parameters[path]):
                waiting += parameters_setting(parameters, referred)
    return {path: d for path, d in parameters.items() if path in needed}


def field_values(parameters: Parameters, field: str) -> Iterator[Any]:
    """All values that the parameters can give to a field; of a continuous range its bounds."""
    for path in parameters_setting(parameters, field):
        tied = parameters[path].same_as
        if tied is not None:
            yield from field_values(parameters, tied)
            continue
        for value in parameters[path].values() or parameters[path].boundary_values():
            yield field_value(field, {path: value})


def can_be(parameters: Parameters, field: str, wanted: Any) -> bool:
    """Whether the parameters can give this value to a field."""
    if field in parameters and parameters[field].same_as is None:
        values = parameters[field].values()
        if isinstance(values, range):
            return type(wanted) in (int, float) and wanted in values
    return any(equal(value, wanted) for value in field_values(parameters, field))


def is_continuous(parameters: Parameters, field: str) -> bool:
    """Whether a field has a range whose values cannot be listed."""
    setting = [parameters[path] for path in parameters_setting(parameters, field)]
    return any(
        is_continuous(parameters, d.same_as) if d.same_as is not None else d.values() is None
        for d in setting
    )


def section_values(parameters: Parameters, section: str) -> Iterator[dict[str, Any]]:
    """Every combination of the parameters that can set a section or a part of it.

    With the values of those on which their conditions and ties depend; of a continuous range the
    bounds. Only {} if no parameter sets the section.
    """
    setting = [path for path, d in parameters.items() if touches(path, d, section)]
    needed = with_dependencies(parameters, setting)
    return possible_parameters(needed, lambda _, d: d.values() or d.boundary_values())


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
        for referred in referred_paths(parameters[path]):
            setting = parameters_setting(parameters, referred)
            if not setting:
                raise ValueError(f"{path} depends on {referred}, which is no parameter")
            for other in setting:
                add(other, (*above, path))
        order.append(path)

    for path in parameters:
        add(path, ())
    return order


def parameters_setting(parameters: Parameters, field: str) -> list[str]:
    """The parameter `field` or, if there is none, those that can set it with others."""
    if field in parameters:
        return [field]
    return [path for path, d in parameters.items() if touches(path, d, field)]


def assignments(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a trial's parameters set: dotted path -> value, sections before their fields.

    A parameter that is named like no section of the spec, and whose value is a mapping, sets the
    fields that the mapping names.
    """
    fields: dict[str, Any] = {}
    for path, value in chosen.items():
        fields |= fields_of(path, value)
    return dict(sorted(fields.items(), key=lambda item: item[0].count(".")))


def fields_of(path: str, value: Any) -> dict[str, Any]:
    """The fields that one parameter sets with a value: dotted path -> value."""
    several = isinstance(value, Mapping) and "." not in path and path not in RunSpec.model_fields
    return dict(value) if several else {path: value}


def touches(path: str, distribution: Distribution, field: str) -> bool:
    """Whether a parameter can set `field`, a part of it, or a section with it."""
    return field == path or any(
        _overlap(own, field)
        for value in distribution.choice or [None]
        for own in fields_of(path, value)
    )


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted paths are the same, or one is within the section that the other is."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def referred_paths(distribution: Distribution) -> list[str]:
    tied = [distribution.same_as] if distribution.same_as is not None else []
    return [*distribution.when, *tied]


def _is_active(distribution: Distribution, chosen: Mapping[str, Any]) -> bool:
    return all(
        fulfils(field_value(path, chosen), wanted) for path, wanted in distribution.when.items()
    )


def fulfils(value: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one, or in the wanted list."""
    if value is MISSING:
        return False
    several = wanted if isinstance(wanted, list) else []
    return equal(value, wanted) or any(equal(value, each) for each in several)


def field_value(path: str, chosen: Mapping[str, Any]) -> Any:
    """The value that the chosen parameters give to a field, or that of the parameter `path`."""
    if path in chosen:
        return chosen[path]
    value: Any = {}
    for field, own in assignments(chosen).items():
        value = with_value(value, field, own)
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value
