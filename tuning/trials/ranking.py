"""One rule for what counts of a trial, and for which trial is the better one.

`sweep.select` says which evaluation of a trial counts: the last, or the best. The schedulers, the
search, the progress, the leaderboard, MLflow and the report all take the trial's value from here,
and compare it by `loss`. A value that is not finite is the worst.
"""

import math
from collections.abc import Mapping
from typing import Any

from trainers.checkpoints.ranking import loss_of
from tuning.trials.space import COST_METRICS, SweepSpec

BEST = "best"
"""Field of a trial's result: its best evaluation so far, where `sweep.select` is best."""


def selected(sweep: SweepSpec, result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The evaluation that counts of a trial whose last result is `result`.

    It has the validation metrics, `step` and `epoch` of one state of the trial, of which there is a
    checkpoint. {} for {}, the result of a trial before its first evaluation.
    """
    if sweep.select == "best":
        best: Mapping[str, Any] = result.get(BEST, result)
        return best
    return result


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
    An earlier result of the same step or a later one, from before a restart, does not count.
    """
    if sweep.select != "best":
        return dict(result)
    own = {name: value for name, value in result.items() if name != BEST}
    before = earlier.get(BEST, {})
    if before and before["step"] < own["step"] and not is_better(sweep, own, before):
        return {**own, BEST: dict(before)}
    return {**own, BEST: own}


def loss(sweep: SweepSpec, value: float | None) -> float:
    """A value of the sweep's metric as a number of which the smaller one is better.

    An unknown one, NaN and both infinities are the worst of all: infinity.
    """
    return loss_of(value, sweep.mode)


def is_better(sweep: SweepSpec, evaluation: Mapping[str, Any], than: Mapping[str, Any]) -> bool:
    """Whether an evaluation is strictly better than another one by the sweep's metric."""
    return loss(sweep, evaluation.get(sweep.metric)) < loss(sweep, than.get(sweep.metric))


def is_ranked(sweep: SweepSpec, value: float | None) -> bool:
    """Whether a trial of this value may be called the best: only if the value is finite."""
    return loss(sweep, value) < math.inf


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
        found.append(loss_of(value, "max" if mode == "max" else "min"))
    return tuple(found)
