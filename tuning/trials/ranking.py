"""One rule for what counts of a trial, and for which trial is the better one.

`sweep.select` says which evaluation of a trial counts: the last, or the best. The schedulers, the
search, the progress, the leaderboard, MLflow and the report all take the trial's value from here,
and compare it by `loss`. A value that is not finite is the worst.
"""

import math
from collections.abc import Mapping
from typing import Any

from trainers.checkpoints.ranking import loss_of
from trainers.tracking.operation_log import now_ms
from tuning.spaces.constraints import parse_constraint, total_violation
from tuning.spaces.space import COST_METRICS, SweepSpec

BEST = "best/"
"""Beginning of the fields of a trial's result that are its best evaluation so far, where
`sweep.select` is best."""


def selected(sweep: SweepSpec, result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The evaluation that counts of a trial whose last result is `result`.

    Its metrics, `step` and `epoch` are those of one state of the trial, of which there is a
    checkpoint; `complete` and `device_s` are the whole trial's. {} for {}, the result of a trial
    before its first evaluation.
    """
    if sweep.select == "last":
        return result
    best = {
        name.removeprefix(BEST): value for name, value in result.items() if name.startswith(BEST)
    }
    return {**_without_best(result), **best}


def _without_best(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if not name.startswith(BEST)}


def selected_value(sweep: SweepSpec, result: Mapping[str, Any]) -> float | None:
    """The metric's value that counts of a trial; None before its first evaluation."""
    value = selected(sweep, result).get(sweep.metric)
    return None if value is None else float(value)


def with_best(
    sweep: SweepSpec, result: Mapping[str, Any], earlier: Mapping[str, Any]
) -> dict[str, Any]:
    """A trial's new result with its best evaluation so far; `earlier` is the result before it.

    Of equal evaluations the first counts. `earlier` is {} at the first evaluation, and at the first
    one after the trial took over another one's weights: what it was before cannot be had any more.
    A best evaluation of the same step or a later one, from before a restart, does not count.
    """
    own = _without_best(result)
    if sweep.select == "last":
        return own
    before = selected(sweep, earlier)
    kept = before and before["step"] < own["step"] and not is_better(sweep, own, than=before)
    best = before if kept else own
    fields = [name for name in best if name not in ("complete", "device_s")]
    return {**own, **{BEST + name: best[name] for name in fields}}


def loss(sweep: SweepSpec, value: float | None) -> float:
    """A value of the sweep's metric as a number of which the smaller one is better.

    An unknown one, NaN and both infinities are the worst of all: infinity.
    """
    return loss_of(value, sweep.mode)


def is_better(sweep: SweepSpec, evaluation: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
    """Whether an evaluation is strictly better than another one by the sweep's metric alone.

    So are the checkpoints that are kept. Constraints are judged by the evaluation that counts.
    """
    return loss(sweep, evaluation.get(sweep.metric)) < loss(sweep, than.get(sweep.metric))


def best_points(sweep: SweepSpec, result: Mapping[str, Any]) -> list[tuple[str, float, int, int]]:
    """The metrics of a trial's evaluation that counts, as `best/val/...` at its step for MLflow."""
    counts = selected(sweep, result)
    metrics = [name for name in counts if name.startswith("val/")]
    return [(BEST + name, counts[name], counts["step"], now_ms()) for name in metrics]


def is_ranked(sweep: SweepSpec, value: float | None) -> bool:
    """Whether a trial of this value may be called the best: only if the value is finite."""
    return loss(sweep, value) < math.inf


def violation(sweep: SweepSpec, known: Mapping[str, Any]) -> float:
    """How far a trial with these metrics and costs breaks `sweep.constraints`; 0 if it keeps all.

    A cost that is not among them is not looked at. No trial that breaks one is the best.
    """
    looked_at = [
        text
        for text in sweep.constraints
        if (metric := parse_constraint(text).metric) in known or metric not in COST_METRICS
    ]
    return total_violation(looked_at, known)


def objective_modes(sweep: SweepSpec) -> dict[str, str]:
    """Name of each objective -> min or max; the sweep's metric alone without `sweep.objective`."""
    if not sweep.objective:
        return {sweep.metric: sweep.mode}
    return dict(objective.split(" ") for objective in sweep.objective)


def losses(sweep: SweepSpec, evaluation: Mapping[str, Any]) -> tuple[float, ...]:
    """An evaluation by each objective of the sweep, as numbers of which smaller ones are better.

    A cost that is not in the evaluation is replaced by the time on the device, `device_s`: among
    trials on devices of one kind it has the same order.
    """
    found = []
    for name, mode in objective_modes(sweep).items():
        value = evaluation.get(name)
        if value is None and name in COST_METRICS:
            value = evaluation.get("device_s")
        found.append(loss_of(value, mode))
    return tuple(found)
