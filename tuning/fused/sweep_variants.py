"""The trials of a sweep as variants of its spec: which programs they need, and what is batched."""

from typing import Any

from trainers.spec import RunSpec, resolve
from tuning.programs.program_signature import Variant, program_key
from tuning.trials.trial import Sweep


def distinct_programs(sweep: Sweep, most: int) -> tuple[list[Variant], int]:
    """A variant for each parameter value that needs another program, and the number of programs.

    At most `most` variants. The first one is the reference trial; each of the others differs from
    it in one parameter. The number is an estimate: combinations of values are not tried.
    """
    found, count = {}, 1
    first = reference_variant(sweep)
    found[program_key(first, varied_floats(sweep, first))] = first
    for path, distribution in sweep.spec.parameters.items():
        others = [
            reference_variant(sweep, **{path: value}) for value in distribution.boundary_values()
        ]
        keys = {program_key(each, varied_floats(sweep, each)): each for each in others}
        found = {**keys, **found}
        if len(keys) > 1 and distribution.choice is None:
            low, high = distribution.bounds or (0, 0)
            count *= int(high - low + 1)
        else:
            count *= len(keys)
    chosen = [first, *(each for each in found.values() if each is not first)]
    return chosen[:most], min(count, sweep.spec.total_trials)


def reference_variant(sweep: Sweep, **changed: Any) -> Variant:
    """The trial with the last boundary value of each parameter, but for those `changed`."""
    values = {path: d.boundary_values()[-1] for path, d in sweep.spec.parameters.items()}
    spec, workload = resolve(sweep.trial_spec_data({**values, **changed}), RunSpec)
    return Variant(spec, workload, spec.train.total_steps(sweep.samples))


def varied_floats(sweep: Sweep, variant: Variant) -> dict[str, list[float]]:
    """The fields of the section `model` that the sweep varies as floats, with their boundaries."""
    model = variant.workload.model
    fields = {
        path.removeprefix("model."): distribution
        for path, distribution in sweep.spec.parameters.items()
        if path.startswith("model.")
    }
    return {
        name: [float(value) for value in distribution.boundary_values()]
        for name, distribution in fields.items()
        if isinstance(getattr(model, name, None), float)
    }
