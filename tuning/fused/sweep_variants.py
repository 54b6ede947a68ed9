"""The trials of a sweep as variants of its spec: which programs they need, and what is batched."""

from collections.abc import Mapping
from typing import Any

from trainers.spec import RunSpec, resolve
from tuning.programs.program_signature import Variant, program_key
from tuning.spaces.distributions import Parameters
from tuning.spaces.suggestion import example, field_values, reference
from tuning.trials.trial import Sweep


def distinct_programs(sweep: Sweep, most: int) -> tuple[list[Variant], int]:
    """A variant for each parameter value that needs another program, and the number of programs.

    At most `most` variants. The first one is the reference trial; each of the others differs from
    it in one parameter, and in those that its conditions need. The number is an estimate:
    combinations of values are not tried.
    """
    found, count = {}, 1
    first = reference_variant(sweep)
    found[program_key(first, varied_floats(sweep, first))] = first
    for path, distribution in sweep.spec.parameters.items():
        trials = [
            example(sweep.spec.parameters, path, value) for value in distribution.boundary_values()
        ]
        others = [_variant(sweep, trial) for trial in trials if trial is not None]
        keys = {program_key(each, varied_floats(sweep, each)): each for each in others}
        found = {**keys, **found}
        if len(keys) > 1 and distribution.choice is None:
            low, high = distribution.bounds or (0, 0)
            values = distribution.values()
            count *= int(high - low + 1) if values is None else len(values)
        else:
            count *= max(1, len(keys))
    chosen = [first, *(each for each in found.values() if each is not first)]
    return chosen[:most], min(count, sweep.spec.total_trials)


def reference_variant(sweep: Sweep) -> Variant:
    """The trial with the last boundary value of each parameter."""
    return _variant(sweep, reference(sweep.spec.parameters, {}))


def _variant(sweep: Sweep, parameters: Mapping[str, Any]) -> Variant:
    spec, workload = resolve(sweep.trial_spec_data(parameters), RunSpec)
    return Variant(spec, workload, spec.train.total_steps(sweep.samples_of(spec)))


def varied_floats(sweep: Sweep, variant: Variant) -> dict[str, list[float]]:
    """The fields of the section `model` that the sweep varies as floats, with their boundaries."""
    model, parameters = variant.workload.model, sweep.spec.parameters
    found: dict[str, list[float]] = {}
    for path in parameters:
        name = path.removeprefix("model.")
        if path == name or not isinstance(getattr(model, name, None), float):
            continue
        found[name] = [float(value) for value in _boundary_values(parameters, path)]
    return found


def _boundary_values(parameters: Parameters, path: str) -> list[Any]:
    """Those of the parameter, or of the one to which it is tied."""
    tied = parameters[path].same_as
    if tied is None:
        return parameters[path].boundary_values()
    if tied in parameters:
        return _boundary_values(parameters, tied)
    return list(field_values(parameters, tied))
