"""The order of evaluations by a metric: which is better, and which checkpoints are the best."""

import math
from collections.abc import Mapping

from cluster.base.config import did_you_mean
from cluster.base.errors import SpecError
from trainers.spec import CheckpointSpec


def loss_of(value: float | None, mode: str) -> float:
    """A metric's value as a number of which the smaller one is better; `mode` is min or max.

    A value that is unknown, NaN or infinite is the worst of all, infinity, in either mode: a loss
    of minus infinity is an overflow too.
    """
    if value is None or not math.isfinite(value):
        return math.inf
    return -float(value) if mode == "max" else float(value)


def check_metric(spec: CheckpointSpec, metrics: Mapping[str, float]) -> None:
    """Raise SpecError if checkpoints are ranked by a metric that an evaluation does not have."""
    if spec.keep_best and spec.metric not in metrics:
        hint = did_you_mean(spec.metric, metrics)
        raise SpecError(f"checkpoint.metric: the evaluation has no {spec.metric!r}{hint}")


def best_checkpoints(spec: CheckpointSpec, metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The names of the `keep_best` best checkpoints, the best first; `metrics` are by name.

    Of equal ones the first in `metrics` is better. A checkpoint without the metric, or where it is
    not finite, is never among them.
    """
    losses = {name: loss_of(found.get(spec.metric), spec.mode) for name, found in metrics.items()}
    ranked = sorted((name for name in losses if losses[name] < math.inf), key=losses.__getitem__)
    return ranked[: spec.keep_best]
