"""Ray Tune's schedulers, as the sweep's spec describes them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from tuning.trials.space import SchedulerSpec, SweepSpec

EPOCH_ATTR = "epoch"
"""Field of a result that measures progress: trials with different batches have different steps."""
COST_ATTR = "spent"
"""The same by cost: the cost of the trial, in epochs of average cost."""

CostPerEpoch: TypeAlias = Callable[[int, Mapping[str, Any]], float]
"""(trial number, its result) -> the trial's cost per epoch, divided by the sweep's average."""


def build_scheduler(
    sweep: SweepSpec, epochs_per_trial: float, cost_per_epoch: CostPerEpoch = lambda *_: 1.0
) -> Any:
    """Ray Tune's scheduler for trials of `epochs_per_trial` epochs.

    `cost_per_epoch` is called where `scheduler.resource` is a cost. Tune pickles the scheduler and
    `cost_per_epoch` with it.
    """
    from ray.tune import schedulers

    spec = sweep.scheduler
    if spec.name == "asha":
        # A trial ends by itself; if asha stopped it there, it would look like a decision.
        max_t = math.ceil(epochs_per_trial) + 1
        return _comparing_trials(
            schedulers.AsyncHyperBandScheduler,
            spec,
            cost_per_epoch,
            max_t=max(max_t, math.ceil(spec.grace_epochs)),  # a smaller one is an assertion in Ray
            stop_last_trials=spec.resource == "epoch",
            grace_period=spec.grace_epochs,
            reduction_factor=spec.reduction,
        )
    if spec.name == "median":
        return _comparing_trials(
            schedulers.MedianStoppingRule,
            spec,
            cost_per_epoch,
            grace_period=spec.grace_epochs,
            min_samples_required=3,
        )
    return schedulers.FIFOScheduler()


def first_rung_epochs(spec: SchedulerSpec, epochs_per_trial: float) -> float:
    """Epochs after which the scheduler first decides about a trial."""
    if spec.name == "none":
        return epochs_per_trial
    return min(epochs_per_trial, spec.every_epochs if spec.name == "pbt" else spec.grace_epochs)


def expected_step_share(spec: SchedulerSpec, epochs_per_trial: float) -> float:
    """The share of all trials' steps that are expected to be done.

    Of the trials at a rung, asha continues one of `reduction`; early ones are continued before they
    can be compared. 64 trials of 200 epochs from a grace of 10 did 1.5 times as many steps as that.
    """
    if spec.name == "median":
        return 0.7  # a guess
    if spec.name != "asha":
        return 1.0
    begin, share, epochs = 0.0, 1.0, 0.0
    rung = spec.grace_epochs
    while begin < epochs_per_trial:
        epochs += share * (min(rung, epochs_per_trial) - begin)
        begin, share, rung = rung, share / spec.reduction, rung * spec.reduction
    return min(1.0, 1.5 * epochs / epochs_per_trial)


def _comparing_trials(
    scheduler_class: Any, spec: SchedulerSpec, cost_per_epoch: CostPerEpoch, **options: Any
) -> Any:
    """A Ray scheduler that compares trials after equal epochs or equal costs."""
    if spec.resource == "epoch":
        return scheduler_class(time_attr=EPOCH_ATTR, **options)
    return _comparing_costs(scheduler_class, cost_per_epoch)(time_attr=COST_ATTR, **options)


def _comparing_costs(scheduler_class: Any, cost_per_epoch: CostPerEpoch) -> Any:
    """A subclass of a Ray scheduler that adds the trial's cost to each result."""

    class ComparingCosts(scheduler_class):  # type: ignore[misc]
        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
            return super().on_trial_result(controller, trial, _with_cost(trial, result))

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(controller, trial, _with_cost(trial, result))

    def _with_cost(trial: Any, result: dict[str, Any]) -> dict[str, Any]:
        if EPOCH_ATTR not in result:
            return result
        cost = result[EPOCH_ATTR] * cost_per_epoch(trial.config["trial"], result)
        return {**result, COST_ATTR: cost}

    return ComparingCosts
