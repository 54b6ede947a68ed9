"""Which trials go on: the spec's scheduler as Ray Tune's own."""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeAlias

from tuning.trials.space import Distribution, SchedulerSpec, SweepSpec

EPOCH_ATTR = "epoch"
"""What schedulers measure progress by: trials with different batches have different steps."""
COST_ATTR = "spent"
"""The same by cost: epochs at the average cost of the sweep's."""

CostPerEpoch: TypeAlias = Callable[[int, Mapping[str, Any]], float]
"""Of a trial's number and result: its cost of an epoch, in those of the sweep's average."""


def build_scheduler(
    sweep: SweepSpec, epochs_per_trial: float, cost_per_epoch: CostPerEpoch = lambda *_: 1.0
) -> Any:
    """Ray Tune's scheduler for trials of `epochs` epochs; `price` is asked where `per` is a cost.

    Tune pickles the scheduler, and `price` with it.
    """
    from ray.tune import schedulers

    spec = sweep.scheduler
    if spec.name == "asha":
        return _comparing_trials(
            schedulers.AsyncHyperBandScheduler,
            spec,
            cost_per_epoch,
            # A trial ends by itself; being stopped there would only look like a verdict.
            max_t=math.ceil(epochs_per_trial) + 1,
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
    if spec.name == "pbt":
        return _pbt_class()(
            time_attr=EPOCH_ATTR,
            perturbation_interval=spec.every_epochs,
            hyperparam_mutations={
                path: _pbt_domain(distribution) for path, distribution in sweep.parameters.items()
            },
            custom_explore_fn=_ClipToBounds(sweep),
            synch=False,
        )
    return schedulers.FIFOScheduler()


def first_rung_epochs(spec: SchedulerSpec, epochs_per_trial: float) -> float:
    """Epochs after which a trial of `epochs` is first judged."""
    if spec.name == "none":
        return epochs_per_trial
    return min(epochs_per_trial, spec.every_epochs if spec.name == "pbt" else spec.grace_epochs)


def _comparing_trials(
    scheduler_class: Any, spec: SchedulerSpec, cost_per_epoch: CostPerEpoch, **options: Any
) -> Any:
    """A scheduler of Ray's that compares trials after equal epochs, or equal costs."""
    if spec.resource == "epoch":
        return scheduler_class(time_attr=EPOCH_ATTR, **options)
    return _comparing_costs(scheduler_class, cost_per_epoch)(time_attr=COST_ATTR, **options)


def _comparing_costs(scheduler_class: Any, cost_per_epoch: CostPerEpoch) -> Any:
    """A scheduler of Ray's that also finds in each result what the trial has spent."""

    class AtCost(scheduler_class):  # type: ignore[misc]
        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
            return super().on_trial_result(controller, trial, _with_spent(trial, result))

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            super().on_trial_complete(controller, trial, _with_spent(trial, result))

    def _with_spent(trial: Any, result: dict[str, Any]) -> dict[str, Any]:
        if EPOCH_ATTR not in result:
            return result
        return {
            **result,
            COST_ATTR: result[EPOCH_ATTR] * cost_per_epoch(trial.config["trial"], result),
        }

    return AtCost


def _pbt_class() -> Any:
    """Ray's PBT, which takes its first values from our search as well as from Ray's own.

    It refuses searchers because they would not hear of changed values; ours learns nothing
    from trials that were changed, it only numbers them.
    """
    from ray.tune.schedulers import PopulationBasedTraining

    class Population(PopulationBasedTraining):  # type: ignore[misc]
        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(SimpleNamespace(search_alg=None), trial)

        def _get_new_config(self, trial: Any, trial_to_clone: Any) -> Any:
            config, operations = super()._get_new_config(trial, trial_to_clone)
            return {**config, "trial": trial.config["trial"]}, operations  # its own number

    return Population


def _pbt_domain(distribution: Distribution) -> Any:
    """The domain that pbt draws new values from."""
    from ray import tune

    low, high = distribution.bounds or (0, 0)
    if distribution.choice is not None:
        return tune.choice(distribution.choice)
    if distribution.kind == "uniform":
        return tune.uniform(low, high)
    if distribution.kind == "loguniform":
        return tune.loguniform(low, high)
    if distribution.kind == "integer":
        return tune.randint(int(low), int(high) + 1)
    return tune.lograndint(int(low), int(high) + 1)


class _ClipToBounds:
    """pbt multiplies values by 0.8 or 1.2; this keeps them where the spec wants them."""

    def __init__(self, sweep: SweepSpec) -> None:
        self._bounds = {path: d.bounds for path, d in sweep.parameters.items()}

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        for path, bounds in self._bounds.items():
            if bounds is not None:
                config[path] = min(max(config[path], bounds[0]), bounds[1])
        return config
