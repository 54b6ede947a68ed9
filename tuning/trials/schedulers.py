"""Ray Tune's schedulers, as the sweep's spec describes them."""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeAlias

from tuning.trials.distributions import Distribution
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
    if spec.name == "pbt":
        return _pbt_class()(
            time_attr=EPOCH_ATTR,
            perturbation_interval=spec.every_epochs,
            hyperparam_mutations={
                path: _pbt_domain(distribution) for path, distribution in sweep.parameters.items()
            },
            explore=_Explore(sweep),
            synch=False,
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


def _pbt_class() -> Any:
    """Ray's PBT, but it accepts a searcher and keeps the number of each trial.

    Ray's PBT refuses searchers, because they would not learn of the changed parameters. Ours does
    not learn from changed trials; it only numbers them.
    """
    from ray.tune.schedulers import PopulationBasedTraining

    class NumberedPBT(PopulationBasedTraining):  # type: ignore[misc]
        def __init__(self, explore: _Explore, **options: Any) -> None:
            super().__init__(custom_explore_fn=explore, **options)
            self._explore = explore

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(SimpleNamespace(search_alg=None), trial)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> Any:
            # With synch=False only the trial that reported can exploit another one, in this call.
            self._explore.trial_number = trial.config["trial"]
            return super().on_trial_result(tune_controller, trial, result)

    return NumberedPBT


def _pbt_domain(distribution: Distribution) -> Any:
    """The values from which pbt resamples: a list of the choices, otherwise a Tune domain.

    Ray 2.60 multiplies values of a domain by a factor, also those of `tune.choice`: text raises
    TypeError, and a number may become one that is no choice. In a list it goes to a neighbour.
    """
    from ray import tune

    low, high = distribution.bounds or (0, 0)
    if distribution.choice is not None:
        return list(distribution.choice)
    if distribution.kind == "uniform":
        return tune.uniform(low, high)
    if distribution.kind == "loguniform":
        return tune.loguniform(low, high)
    if distribution.kind == "integer":
        return tune.randint(int(low), int(high) + 1)
    return tune.lograndint(int(low), int(high) + 1)


class _Explore:
    """PBT's `custom_explore_fn`, called with the perturbed parameters of the better trial.

    PBT multiplies values by 0.8 or 1.2; this clips them to the bounds of the spec. It also gives
    the exploiting trial its own number back, in place of the better trial's.
    """

    def __init__(self, sweep: SweepSpec) -> None:
        self._bounds = {path: d.bounds for path, d in sweep.parameters.items()}
        self.trial_number: int | None = None
        """Number of the trial that reported last."""

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        for path, bounds in self._bounds.items():
            if bounds is not None:
                config[path] = min(max(config[path], bounds[0]), bounds[1])
        if self.trial_number is not None:
            config["trial"] = self.trial_number
        return config
