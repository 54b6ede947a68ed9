"""What a sweep is: which fields it varies and how, for which metric, with how many trials."""

from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.base.config import Spec, apply_overrides, with_value
from cluster.base.errors import SpecError
from trainers.spec import PositiveInt, RunSpec, find_spec, resolve

if TYPE_CHECKING:
    from trainers.workload import Workload


COST_METRICS = ("cost_usd", "energy_j", "kg_co2e")
"""What a trial costs, by the names that MLflow has them under."""


class Distribution(Spec):
    """Where the values of one field come from: exactly one of these."""

    uniform: tuple[float, float] | None = None
    """[low, high], both included."""
    loguniform: tuple[float, float] | None = None
    """[low, high] with low > 0, uniform in the logarithm."""
    integer: tuple[int, int] | None = None
    """[low, high], both included."""
    log_integer: tuple[int, int] | None = None
    """[low, high] with low >= 1, uniform in the logarithm."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """The values themselves, of any kind that the field takes."""

    @model_validator(mode="after")
    def _check_kind_and_order(self) -> "Distribution":
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"must have exactly one of {known}")
        kind, value = next(iter(given.items()))
        if kind != "choice":
            if value[0] > value[1]:
                raise ValueError(f"{kind} must be [low, high] with low <= high")
            if "log" in kind and value[0] <= 0:
                raise ValueError(f"{kind} needs low > 0")
        return self

    @property
    def kind(self) -> str:
        return next(iter(self.model_dump(exclude_none=True)))

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest value; None for a choice."""
        return self.uniform or self.loguniform or self.integer or self.log_integer

    def boundary_values(self) -> list[Any]:
        """The values that every other one lies between; for a choice, all of them."""
        return list(self.bounds or self.choice or ())


class SchedulerSpec(Spec):
    """Which trials go on and which are stopped."""

    renamed_fields = {"per": "resource"}

    name: Literal["asha", "median", "pbt", "none"] = "asha"
    """asha and median stop the worse trials, pbt lets them go on from the better ones' weights."""
    grace_epochs: Annotated[float, Field(gt=0)] = 1
    """Epochs that every trial may do before it can be stopped (asha, median)."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """asha goes on with one in so many trials at each rung."""
    every_epochs: Annotated[float, Field(gt=0)] = 2
    """Epochs between pbt's exploitations."""
    resource: Literal["epoch", "usd", "joule"] = "epoch"
    """The resource that asha and median use to compare trials: epochs, dollars or joules. With usd
    or joule, the epochs of `grace_epochs` are those of a trial at the sweep's average cost: a trial
    that costs twice as much for an epoch is judged after half as many."""

    @model_validator(mode="after")
    def _check_resource(self) -> "SchedulerSpec":
        if self.resource != "epoch" and self.name not in ("asha", "median"):
            raise ValueError(
                f"resource {self.resource}: {self.name} does not compare trials on their way"
            )
        return self


class ResourcesSpec(Spec):
    """What Ray reserves for a trial of one worker, or for a device of fused trials."""

    cpu: Annotated[float, Field(gt=0)] = 1
    """CPUs, and threads on them."""
    gpu: Annotated[float, Field(ge=0)] = 0
    """GPUs; a fraction lets several trials share one."""


class SweepSpec(Spec):
    """What `heliostat sweep` varies, and how it judges."""

    parameters: Annotated[dict[str, Distribution], Field(min_length=1)]
    """Dotted path of a field of this file -> where its values come from."""
    metric: str = "val/loss"
    """Metric of evaluation that trials are compared by."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger value is better."""
    objective: list[str] = []
    """Instead of `metric` and `mode`: several, each as in `val/accuracy max` or `cost_usd min`. The
    first leads the search; of all of them the report has the Pareto front. Besides metrics of
    validation: cost_usd, energy_j, kg_co2e."""
    search: Literal["random", "grid", "tpe", "cmaes"] = "tpe"
    """How values are chosen: at random, all of them, or by Optuna's TPE or CMA-ES."""
    scheduler: SchedulerSpec = SchedulerSpec()
    trials: PositiveInt = 16
    """How many; grid ignores it and tries every combination once."""
    concurrency: PositiveInt | None = None
    """Trials at a time; as many as the cluster holds when not given."""
    fuse: PositiveInt | Literal["auto", "off"] = "auto"
    """How many trials are trained as one program on a device; auto finds out whether that pays,
    and how many, off gives each trial a process. Trials that cannot be fused get one anyway."""
    resources: ResourcesSpec = ResourcesSpec()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the search; the trials' own seed is train.seed."""

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
        """`metric` and `mode` are those of the first objective."""
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
                if distribution.choice is None:
                    raise ValueError(f"grid needs a choice for every parameter, {path} has none")
        if not self.metric.startswith("val/"):
            raise ValueError(f"metric must be one of validation, val/... (got {self.metric!r})")
        return self

    @property
    def total_trials(self) -> int:
        return len(self.combinations()) if self.search == "grid" else self.trials

    def combinations(self) -> list[dict[str, Any]]:
        """All combinations of the choices, in the order of the file."""
        values = [distribution.choice or [] for distribution in self.parameters.values()]
        return [dict(zip(self.parameters, each, strict=True)) for each in product(*values)]


class SweepRunSpec(RunSpec):
    """A spec with a sweep in it."""

    sweep: SweepSpec  # type: ignore[assignment]


def read_sweep_spec(name: str, overrides: list[str]) -> tuple[str, SweepRunSpec]:
    """The short name and the checked spec of the sweep that `name` with overrides describes."""
    stem, data = find_spec(name)
    data = apply_overrides(data, overrides)
    if not data.get("sweep"):
        raise SpecError(f"sweep: {name} has no such section; it says what to vary")
    spec, _ = resolve(data, SweepRunSpec)
    check_parameters(spec.model_dump(mode="json"), spec.sweep)
    return stem, spec


def check_parameters(spec_data: Mapping[str, Any], sweep: SweepSpec) -> None:
    """Raise a SpecError if a value that the sweep may choose is not one that its field takes."""
    for path, distribution in sweep.parameters.items():
        if path.partition(".")[0] in ("sweep", "storage", "tracking", "workload", "data"):
            raise SpecError(f"sweep.parameters.{path}: cannot be varied within a sweep")
        for value in distribution.boundary_values():
            try:
                resolve(trial_spec_data(spec_data, {path: value}), RunSpec)
            except SpecError as error:
                raise SpecError(f"sweep.parameters.{path}: {error}") from None


def trial_spec_data(spec_data: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The plain spec of one trial: the sweep's with the trial's values, and no sweep.

    A budget is the sweep's, and not each trial's.
    """
    result = {key: value for key, value in spec_data.items() if key not in ("sweep", "budget")}
    for path, value in parameters.items():
        result = with_value(result, path, value)
    return result


def file_schema(workload: "type[Workload] | None") -> dict[str, Any]:
    """The JSON schema of a spec file, with the fields of `workload` where one is given."""
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
