"""The spec of a sweep: the fields that it varies, its metric, its search and its scheduler."""

import functools
import math
from collections.abc import Mapping
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.base.config import Spec, apply_overrides, flatten, with_value
from cluster.base.errors import SpecError
from trainers.spec import PositiveInt, RunSpec, find_spec, resolve
from tuning.spaces.constraints import parse_constraint
from tuning.spaces.distributions import Distribution
from tuning.spaces.searches import EXHAUSTIVE, Search, check_finite, check_search
from tuning.spaces.space_check import check_space
from tuning.spaces.suggestion import (
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
    `cost_usd min`. The search looks for their Pareto front, and the report shows it. They may be
    validation metrics, cost_usd, energy_j and kg_co2e."""
    constraints: list[str] = []
    """Bounds on validation metrics and costs, such as `val/latency_ms < 10` or `cost_usd < 2`. The
    search avoids trials that break one, and none of them is the best."""
    search: Search = "tpe"
    """How values are chosen. random, and qmc (Sobol points), do not learn from trials. grid tries
    every combination of a finite space once in the order of the file, bruteforce in random order.
    tpe is for spaces of any kind, also for trials that are stopped early; its suggestions take 0.2
    s after 10,000 trials, so that random is the better choice above some 2,000 short ones. gp
    (a Gaussian process) is for few and long trials, cmaes for many trials with numbers only and one
    objective, nsgaii and nsgaiii for many trials with several. auto chooses among them."""
    enqueue: list[dict[str, Any]] = []
    """Points to try first: each has a path of `parameters` -> value; the search chooses the rest.
    """
    warm_start: list[str] = []
    """Names or folders of earlier sweeps of the same metric, from whose trials the search learns
    before its first one."""
    scheduler: SchedulerSpec = SchedulerSpec()
    trials: PositiveInt = 16
    """Number of trials; fewer if all combinations of a finite space are tried. grid and bruteforce
    ignore it and try them all."""
    repeat: PositiveInt = 1
    """Trainings of each of the best configurations, each with a seed of its own: train.seed, and
    those that follow it. They are ranked by the mean of the metric, with its 95 % interval."""
    folds: dict[str, Annotated[list[Any], Field(min_length=2)]] = {}
    """Cross-validation: dotted path of a field -> its values, such as `data.fold: [0, 1, 2, 3]`.
    Each of the best configurations is trained once for each value, or combination of values."""
    finalists: PositiveInt = 3
    """How many of the best configurations are trained several times by `repeat` and `folds`."""
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

    @field_validator("folds", mode="before")
    @classmethod
    def _dotted_folds(cls, folds: Any) -> Any:
        """By dotted path, also those that `--set` gave as sections."""
        return flatten(folds) if isinstance(folds, Mapping) else folds

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
            if data.get(name) not in (None, value):
                raise ValueError(f"{name} and objective exclude each other; give one")
        return {**data, "metric": metric, "mode": mode}

    @field_validator("constraints")
    @classmethod
    def _check_constraints(cls, constraints: list[str]) -> list[str]:
        for text in constraints:
            metric = parse_constraint(text).metric
            if metric not in COST_METRICS and not metric.startswith("val/"):
                known = ", ".join(COST_METRICS)
                raise ValueError(f"{metric!r} must be val/... or one of {known}")
        return constraints

    @model_validator(mode="after")
    def _check_consistency(self) -> "SweepSpec":
        check_finite(self.search, self.parameters)
        check_search(self.search, self.parameters, self.enqueue, self.total_trials)
        if not self.metric.startswith("val/"):
            raise ValueError(f"metric must be one of validation, val/... (got {self.metric!r})")
        self._check_repeats()
        return self

    def _check_repeats(self) -> None:
        """Check what is trained several times, if anything is."""
        for path in self.repeated_fields:
            name = "folds" if path in self.folds else "repeat"
            if self.scheduler.name == "pbt":
                raise ValueError(f"{name}: not with pbt, whose trials take weights from each other")
            if {path, path.partition(".")[0]} & self.parameters.keys():
                raise ValueError(f"{name}: {path} is one of the parameters")
            if path in self.folds and self.repeat > 1 and path == "train.seed":
                raise ValueError("folds: train.seed is what repeat varies")

    @property
    def repeated_fields(self) -> list[str]:
        """The paths in which the trainings of one configuration differ."""
        return [*(["train.seed"] if self.repeat > 1 else []), *self.folds]

    def repeat_settings(self, seed: int) -> list[dict[str, Any]]:
        """The values of `repeated_fields` in each training; `seed` is `train.seed` of the first.

        One empty setting without `repeat` and `folds`.
        """
        seeds = [range(seed, seed + self.repeat)] if self.repeat > 1 else []
        return [
            dict(zip(self.repeated_fields, values, strict=True))
            for values in product(*seeds, *self.folds.values())
        ]

    @functools.cached_property
    def total_trials(self) -> int:
        """Trials of the sweep: as many as are asked for, and no combination of values twice.

        pbt changes the values of its trials, so that these may begin with the same ones.
        """
        count = count_combinations(self.parameters)
        if self.search in EXHAUSTIVE:
            assert count is not None
            return count
        if count is None or self.scheduler.name == "pbt":
            return self.trials
        return min(self.trials, count)

    @property
    def planned_trials(self) -> int:
        """The trials of the search and, at most, those that repeat the best of them."""
        repeats = self.repeat * math.prod(len(values) for values in self.folds.values()) - 1
        return self.total_trials + min(self.finalists, self.total_trials) * repeats

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
    data = _with_dotted_parameters(data)
    spec, _ = resolve(data, SweepRunSpec)
    check_parameters(spec.model_dump(mode="json"), spec.sweep)
    check_folds(spec.model_dump(mode="json"), spec.sweep)
    return stem, spec


def _with_dotted_parameters(data: dict[str, Any]) -> dict[str, Any]:
    """The spec with `sweep.parameters` by dotted path, also those that `--set` gave as sections.

    A parameter that was set to null is not varied.
    """
    sweep = data["sweep"]
    if not (isinstance(sweep, Mapping) and isinstance(sweep.get("parameters"), Mapping)):
        return data
    dotted = _distributions(sweep["parameters"], "")
    given = {path: own for path, own in dotted.items() if own is not None}
    return {**data, "sweep": {**sweep, "parameters": given}}


def _distributions(data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Dotted path -> distribution, for sections within sections: a distribution is a mapping with
    some value that is no mapping."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        within = [*value.values()] if isinstance(value, Mapping) else []
        if any(isinstance(each, Mapping) for each in within) and not any(
            isinstance(each, str | int | float | list) for each in within
        ):
            found |= _distributions(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def check_parameters(spec_data: Mapping[str, Any], sweep: SweepSpec) -> None:
    """Raise a SpecError if the sweep may choose a value that its field does not accept."""

    def mistake(chosen: Mapping[str, Any]) -> str | None:
        try:
            resolve(trial_spec_data(spec_data, chosen), RunSpec)
        except SpecError as error:
            return str(error).splitlines()[0]
        return None

    check_space(sweep.parameters, mistake)


def check_folds(spec_data: Mapping[str, Any], sweep: SweepSpec) -> None:
    """Raise a SpecError if a field does not accept a value that cross-validation gives to it."""
    for path, values in sweep.folds.items():
        if path.partition(".")[0] in ("sweep", "storage", "tracking", "workload", "budget"):
            raise SpecError(f"sweep.folds.{path}: cannot be varied within a sweep")
        for value in values:
            try:
                resolve(trial_spec_data(spec_data, {path: value}), RunSpec)
            except SpecError as error:
                mistake = str(error).removeprefix(f"{path}: ")
                raise SpecError(f"sweep.folds.{path}: {mistake}") from None


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
