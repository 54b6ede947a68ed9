"""A workload's metrics over a split: summed batch by batch, agreed on by all workers, checked.

A mistake in them is raised on all workers at once, after the last batch: the state can still be
saved, and no worker waits for another one in vain.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cluster.base.errors import TrainingError
from trainers.engine.reporter import mlflow_name
from trainers.worker import Worker
from trainers.workload import Batch, Workload

LOSS = "loss"


class MetricsError(Exception):
    """A mistake in `metrics` or `summary`, which all workers raise after the same evaluation."""

    def __init__(self, error: Exception) -> None:
        """`error` is to be raised when the state has been saved."""
        super().__init__(str(error))
        self.error = error


class MetricSums:
    """The sums of the loss and of a workload's metrics over this worker's share of a split."""

    def __init__(self, workload: Workload, worker: Worker) -> None:
        self._workload, self._worker = workload, worker
        self._sums: dict[str, Tensor] = {}
        self._error: Exception | None = None

    def add(self, loss_B: Tensor, output: Any, batch: Batch, counted: int) -> None:
        """Add the first `counted` samples of a batch; keeps an error of `metrics` for later."""
        found = {LOSS: loss_B}
        try:
            found |= checked_metrics(self._workload.metrics(output, batch), len(loss_B))
            missing = sorted(found.keys() ^ self._sums.keys()) if self._sums else []
            if missing:
                raise TrainingError(_not_everywhere(missing))
        except Exception as error:  # of the user's code
            self._error = self._error or error
            return
        for name, values_B in found.items():
            total = values_B[:counted].to(loss_B.device).double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def summary(self, samples: int) -> dict[str, float]:
        """The split's metrics, of `samples` samples; collective. Raises MetricsError."""
        names = sorted(self._sums)
        error = self._error
        told = self._worker.gather((names, str(error) if error else None))
        failed = next((text for _, text in told if text is not None), None)
        if failed is not None:
            raise MetricsError(error or TrainingError(failed))
        differing = {name for other, _ in told for name in {*names} ^ {*other}}
        if differing:
            raise MetricsError(TrainingError(_not_everywhere(sorted(differing))))
        sums = self._worker.all_reduce_sum(torch.stack([self._sums[name] for name in names]))
        means = dict(zip(names, (sums / samples).tolist(), strict=True))
        in_order = {name: means[name] for name in self._sums}
        try:
            return checked_summary(self._workload.summary(in_order), means[LOSS])
        except Exception as failure:
            raise MetricsError(failure) from failure


def checked_metrics(found: Any, samples: int) -> dict[str, Tensor]:
    """What a workload's `metrics` returned; TrainingError unless it is as `Workload` has it."""
    if not isinstance(found, Mapping):
        raise TrainingError(
            "the workload's metrics must return a dict of tensors by name, each with one value "
            f"per sample (got {_kind(found)})"
        )
    for name, values in found.items():
        _check_name("metrics", name)
        if name == LOSS:
            raise TrainingError(
                "the workload's metrics must not have the name 'loss', which is that of the loss "
                "itself; give it another name"
            )
        if not isinstance(values, Tensor) or values.is_complex():
            got = _kind(values)
        elif values.shape != (samples,):
            got = f"the shape {list(values.shape)}"
        else:
            continue
        raise TrainingError(
            f"the workload's metrics must return a tensor of real numbers with one value per "
            f"sample, shape [{samples}], for each name ({name!r} has {got})"
        )
    _check_distinct("metrics", found)
    return dict(found)


def checked_summary(found: Any, loss: float) -> dict[str, float]:
    """What a workload's `summary` returned, as plain floats; TrainingError if they are none.

    `loss` is the mean of the loss, which a summary may leave out but not replace.
    """
    if not isinstance(found, Mapping):
        raise TrainingError(
            f"the workload's summary must return a dict of numbers by name (got {_kind(found)})"
        )
    numbers = {}
    for name, value in found.items():
        _check_name("summary", name)
        numbers[name] = _number(name, value)
    if LOSS in numbers:
        given, numbers[LOSS] = numbers[LOSS], loss  # not rounded, as to numpy's float32
        same = math.isclose(given, loss, rel_tol=1e-2, abs_tol=1e-3)
        if not same and not (math.isnan(given) and math.isnan(loss)):
            raise TrainingError(
                f"the workload's summary must leave 'loss' as it is, {loss:.6g} (got "
                f"{given:.6g}); give the other number another name"
            )
    _check_distinct("summary", found)
    return numbers


def _number(name: str, value: Any) -> float:
    """Any kind of one real number, such as numpy's or a Fraction, as a float."""
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TrainingError(
            f"the workload's summary must return one real number for each name ({name!r} is "
            f"{_kind(value)})"
        ) from None


def _check_name(method: str, name: Any) -> None:
    if not isinstance(name, str) or not name.strip():
        raise TrainingError(f"the workload's {method} must have names of text (got {name!r})")


def _check_distinct(method: str, names: Mapping[str, Any]) -> None:
    """Raise TrainingError if two names would be one in MLflow, where a run's curves are."""
    known = {mlflow_name(LOSS): LOSS}
    for name in names:
        same = known.setdefault(mlflow_name(f"split/{name}").removeprefix("split/"), name)
        if same != name:
            raise TrainingError(
                f"the workload's {method} has the names {same!r} and {name!r}, which are the same "
                "in MLflow; rename one of them"
            )


def _not_everywhere(names: list[str]) -> str:
    return (
        "the workload's metrics must have the same names in every batch; some batches lack "
        f"{', '.join(map(repr, names))} (give a value, such as 0, for samples without one)"
    )


def _kind(value: Any) -> str:
    """The type of a value, as it is told to users."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}, shape {list(value.shape)}"
    return f"a {type(value).__name__}"
