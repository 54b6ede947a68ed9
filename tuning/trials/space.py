"""The spec of a sweep: the fields that it varies, its metric, its search and its scheduler."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.base.config import Spec, apply_overrides, with_value
from cluster.base.errors import SpecError
from trainers.spec import PositiveInt, RunSpec, find_spec, resolve
from tuning.trials.distributions import Distribution
from tuning.trials.suggestion import (
    assignments,
    combinations,
    count_combinations,
    dependency_order,
)

if TYPE_CHECKING:
    from trainers.workload import Workload


COST_METRICS = ("cost_usd", "energy_j", "kg_co2e")
"""MLflow metrics of the costs of a trial."""


class SchedulerSpec(Spec):
    """How it is decided which trials continue and which are stopped early."""

    renamed_fields = {"per": "resource"}

    name: Literal["asha", "median", "extrapolation", "pbt", "none"] = "asha"
    """asha and median stop the worse trials early; extrapolation stops those whose learning curve
    is unlikely to end better than another trial is already; pbt continues the worse ones with the
    weights of better ones; none lets every trial finish."""
    grace_epochs: Annotated[float, Field(gt=0)] = 1
    """Epochs of a trial before it can be stopped (asha, median, extrapolation): at the first
    evaluation at or after them."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """At each rung, asha continues the best one of so many trials; the next rung is after so many
    times the epochs."""
    every_epochs: Annotated[float, Field(gt=0)] = 2
    """Epochs between the exploitations of pbt."""
    resource: Literal["epoch", "usd", "joule"] = "epoch"
    """The resource that asha and median use to compare trials: epochs, dollars or joules. With usd
    or joule, `grace_epochs` are epochs of a trial of average cost: a trial whose epochs cost twice
    as much can be stopped after half as many."""

    @model_validator(mode="after")
    def _check_resource(self) -> "SchedulerSpec":
        if self.resource != "epoch" and self.name not in ("asha", "median"):
            raise ValueError(
                f"resource {self.resource}: {self.name} does not compare running trials"
            )
        return self


class ResourcesSpec(Spec):
    """Resources that Ray reserves for a trial of one worker, or for a device with fused trials."""

    cpu: Annotated[float, Field(gt=0)] = 1
    """CPUs; also the number of PyTorch's threads."""
    gpu: Annotated[float, Field(ge=0)] = 0
    """GPUs; with a fraction, several trials share one."""


class SweepSpec(Spec):
    """The parameters that `heliostat sweep` varies, and how it compares trials."""

    parameters: Annotated[dict[str, Distribution], Field(min_length=1)]
    """Dotted path of a field or a section of this file -> its values. A name that is no path, with
    a choice of mappings from paths to values, varies several fields together."""
    metric: str = "val/loss"
    """The validation metric by which trials are compared."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger value is better."""
    select: Literal["last", "best"] = "last"
    """Which evaluation of a trial counts wherever trials are compared, stopped, shown and loaded:
    its last one or its best one. Of what counts there is a checkpoint."""
    objective: list[str] = []
    """Several objectives in place of `metric` and `mode`, such as `val/accuracy max` or
    `cost_usd min`. The search optimizes the first one; the report shows the Pareto front of all.
    They may be validation metrics, cost_usd, energy_j and kg_co2e."""
    search: Literal["random", "grid", "tpe", "cmaes"] = "tpe"
    """How values are chosen: at random, every combination once, or by Optuna's TPE or CMA-ES."""
    scheduler: SchedulerSpec = SchedulerSpec()
    trials: PositiveInt = 16
    """Number of trials; grid ignores it and tries every combination once."""
    concurrency: PositiveInt | None = None
    """Number of trials at a time; as many as fit into the cluster when not given."""
    fuse: PositiveInt | Literal["auto", "off"] = "auto"
    """Batched trials: how many are trained as one program on a device. auto measures whether that
    is faster, and with how many; off runs each trial in a process of its own, as trials that cannot
    be fused always are."""
    resources: ResourcesSpec = ResourcesSpec()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the search; the seed of the trials is train.seed."""

    @field_validator("parameters")
    @classmethod
    def _check_dependencies(cls, parameters: dict[str, Distribution]) -> dict[str, Distribution]:
        dependency_order(parameters)
        return parameters

    @field_validator("objective")
    @classmethod
    def _check_objectives(cls, objectives: list[str]) -> list[str]:
        for objective in objectives:
            name, _, mode = objective.partition(" ")
            if mode not in ("min", "max") or not (name in COST_METRICS or name.startswith("val/")):
                known = ", ".join(COST_METRICS)
                raise ValueError(f"{objective!r} must be `val/... max` or min, or one of {known}")
        return objectives

    @model_validator(mode="before")
    @classmethod
    def _metric_from_objective(cls, data: Any) -> Any:
        """Take `metric` and `mode` from the first objective."""
        if not (isinstance(data, dict) and isinstance(data.get("objective"), list)):
            return data
        if not data["objective"]:
            return data
        metric, _, mode = str(data["objective"][0]).partition(" ")
        for name, value in (("metric", metric), ("mode", mode)):
            if data.get(name, value) != value:
                raise ValueError(f"{name} and objective exclude each other; give one")
        return {**data, "metric": metric, "mode": mode}

    @model_validator(mode="after")
    def _check_consistency(self) -> "SweepSpec":
        if self.search == "grid":
            for path, distribution in self.parameters.items():
                if distribution.values() is None and distribution.same_as is None:
                    raise ValueError(f"grid needs a choice for every parameter, {path} has none")
        if not self.metric.startswith("val/"):
            raise ValueError(f"metric must be one of validation, val/... (got {self.metric!r})")
        return self

    @functools.cached_property
    def total_trials(self) -> int:
        if self.search != "grid":
            return self.trials
        count = count_combinations(self.parameters)
        assert count is not None
        return count

    def combinations(self) -> list[dict[str, Any]]:
        """All combinations of a finite space, in the order of the file."""
        return list(combinations(self.parameters))


class SweepRunSpec(RunSpec):
    """A run's spec with a section `sweep`."""

    sweep: SweepSpec  # type: ignore[assignment]

    @model_validator(mode="after")
    def _check_changes(self) -> "SweepRunSpec":
        if self.changes:
            raise ValueError("changes: not in a sweep; there pbt changes fields (sweep.scheduler)")
        return self


def read_sweep_spec(name: str, overrides: list[str]) -> tuple[str, SweepRunSpec]:
    """The short name and the validated spec of the sweep `name` with overrides."""
    stem, data = find_spec(name)
    data = apply_overrides(data, overrides)
    if not data.get("sweep"):
        raise SpecError(f"sweep: {name} has no such section; it lists the parameters to vary")
    spec, _ = resolve(data, SweepRunSpec)
    check_parameters(spec.model_dump(mode="json"), spec.sweep)
    return stem, spec


def check_parameters(spec_data: Mapping[str, Any], sweep: SweepSpec) -> None:
    """Raise a SpecError if the sweep may choose a value that its field does not accept."""
    for path, distribution in sweep.parameters.items():
        if path.partition(".")[0] in ("sweep", "storage", "tracking", "workload", "data"):
            raise SpecError(f"sweep.parameters.{path}: cannot be varied within a sweep")
        for value in distribution.boundary_values():
            try:
                resolve(trial_spec_data(spec_data, {path: value}), RunSpec)
            except SpecError as error:
                raise SpecError(f"sweep.parameters.{path}: {error}") from None


def trial_spec_data(spec_data: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of one trial as plain data: the sweep's, with the trial's parameters.

    Without the section `sweep`, and without the budget, which is for the sweep as a whole.
    """
    result = {key: value for key, value in spec_data.items() if key not in ("sweep", "budget")}
    for path, value in assignments(parameters).items():
        result = with_value(result, path, value)
    return result


def file_schema(workload: "type[Workload] | None") -> dict[str, Any]:
    """The JSON schema of a spec file, with the workload's fields if one is given."""
    schema = RunSpec.model_json_schema()
    parts: dict[str, type[Spec]] = {"sweep": SweepSpec}
    if workload is not None:
        parts |= {"data": workload.Data, "model": workload.Model}
    for section, model in parts.items():
        part = model.model_json_schema()
        schema["$defs"] |= part.pop("$defs", {})
        schema["properties"][section] |= part
        schema["properties"][section].pop("additionalProperties", None)
        schema["properties"][section].pop("anyOf", None)
        schema["properties"][section]["additionalProperties"] = False
    return schema
