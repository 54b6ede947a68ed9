"""The order of checkpoints by an evaluation metric."""

import math
from collections.abc import Mapping

from cluster.base.config import did_you_mean
from cluster.base.errors import SpecError
from trainers.spec import CheckpointSpec


def check_metric(spec: CheckpointSpec, metrics: Mapping[str, float]) -> None:
    """Raise SpecError if checkpoints are ranked by a metric that an evaluation does not have."""
    if spec.keep_best and spec.metric not in metrics:
        hint = did_you_mean(spec.metric, metrics)
        raise SpecError(f"checkpoint.metric: the evaluation has no {spec.metric!r}{hint}")


def best_checkpoints(spec: CheckpointSpec, metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The names of the `keep_best` best checkpoints, the best first; `metrics` are by name.

    A checkpoint without the metric, or where it is NaN, is never among them.
    """
    known = {name: float(found.get(spec.metric, math.nan)) for name, found in metrics.items()}
    ranked = [name for name, value in known.items() if not math.isnan(value)]
    ranked.sort(key=lambda name: known[name], reverse=spec.mode == "max")
    return ranked[: spec.keep_best]
