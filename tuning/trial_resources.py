"""What a sweep's trials reserve in Ray, and how many of them have room."""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.base.config import validate
from cluster.connection.ray_connection import missing_resources, room_for
from trainers.runs.ray_train import resource_shortage, resources_per_worker
from trainers.spec import ScaleSpec
from tuning.spaces.space import SweepRunSpec, trial_spec_data
from tuning.spaces.suggestion import section_values, touches


def sweep_shortage(spec: SweepRunSpec) -> str | None:
    """One line on the resources that the cluster lacks today for one of the trials, or None."""
    for scale in trial_scales(spec):
        if scale.max_workers > 1:
            missing = resource_shortage(scale)
        else:
            missing = missing_resources(1, _reserved(spec, scale))
            missing = f"sweep.resources: {missing}" if missing else None
        if missing:
            return missing
    return None


def tune_resources(spec: SweepRunSpec) -> Any:
    """The resources that Tune reserves for a trial, in the form that `tune.with_resources` takes.

    They are a function of the trial's parameters where the sweep varies the section `scale`.
    """
    from ray import tune

    spec_data, parameters = spec.model_dump(mode="json"), spec.sweep.parameters

    def of_trial(config: Mapping[str, Any]) -> Any:
        chosen = {path: config[path] for path in parameters if path in config}
        return tune.PlacementGroupFactory([_reserved(spec, _scale(spec_data, chosen))])

    varied = any(touches(path, d, "scale") for path, d in parameters.items())
    return of_trial if varied else of_trial({})


def max_concurrent_trials(spec: SweepRunSpec) -> int:
    """How many trials run at a time, each in a process: the spec's number, else what fits.

    Tune does not know the resources of a trial's workers, and would start too many trials.
    """
    if spec.sweep.concurrency is not None:
        return spec.sweep.concurrency
    return cluster_capacity(spec)


def cluster_capacity(spec: SweepRunSpec) -> int:
    """How many trials, or engines, fit into the cluster of this moment; at least 1."""
    fitting = min(_fitting(spec, scale) for scale in trial_scales(spec))
    return max(1, min(fitting, spec.sweep.total_trials))


def trial_scales(spec: SweepRunSpec) -> Iterator[ScaleSpec]:
    """The sections `scale` that the trials can have; at least one."""
    spec_data = spec.model_dump(mode="json")
    known = set()
    for parameters in section_values(spec.sweep.parameters, "scale"):
        scale = _scale(spec_data, parameters)
        if scale.model_dump_json() not in known:
            known.add(scale.model_dump_json())
            yield scale


def _scale(spec_data: Mapping[str, Any], parameters: Mapping[str, Any]) -> ScaleSpec:
    return validate(ScaleSpec, trial_spec_data(spec_data, parameters)["scale"], "scale.")


def _fitting(spec: SweepRunSpec, scale: ScaleSpec) -> int:
    if scale.max_workers > 1:
        return room_for(resources_per_worker(scale)) // scale.max_workers
    return room_for(_reserved(spec, scale))


def _reserved(spec: SweepRunSpec, scale: ScaleSpec) -> dict[str, float]:
    """What Tune reserves for a trial; for several workers Ray Train reserves it.

    Tune wants a reservation. A part of a CPU would be missing where the workers need all of them,
    and the sweep would wait for ever.
    """
    if scale.max_workers > 1:
        return {"memory": 1}
    needs = spec.sweep.resources.model_dump()
    return {name.upper(): amount for name, amount in needs.items() if amount}
