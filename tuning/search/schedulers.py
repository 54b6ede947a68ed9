"""Ray Tune's schedulers, as the sweep's spec describes them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tuning.spaces.rungs import rung_epochs
from tuning.spaces.space import SweepSpec
from tuning.stopping.extrapolation import Extrapolation
from tuning.stopping.rules import Asha, MedianRule, StoppingRule
from tuning.trials.ranking import objective_modes

EPOCH_ATTR = "epoch"
"""Field of a result that measures progress: trials with different batches have different steps."""
CostPerEpoch: TypeAlias = Callable[[int, Mapping[str, Any]], float]
"""(trial number, its result) -> the trial's cost per epoch, divided by the sweep's average."""


def build_scheduler(
    sweep: SweepSpec,
    epochs_per_trial: float,
    cost_per_epoch: CostPerEpoch = lambda *_: 1.0,
    evaluate_every_epochs: float = 0,
    folder: Path | None = None,
) -> Any:
    """Ray Tune's scheduler for trials of `epochs_per_trial` epochs.

    `cost_per_epoch` is called where `scheduler.resource` is a cost. Tune pickles the scheduler and
    `cost_per_epoch` with it. In the sweep's `folder` it keeps what it needs after an interruption.
    `evaluate_every_epochs` is 0 if it is not known; rungs are then not moved to evaluations.
    """
    from tuning.search.stopping_scheduler import InOrder, StoppingScheduler

    rule = _stopping_rule(sweep, epochs_per_trial, evaluate_every_epochs)
    if rule is None:
        return InOrder()
    return StoppingScheduler(sweep, rule, cost_per_epoch, evaluate_every_epochs, folder)


def _stopping_rule(
    sweep: SweepSpec, epochs_per_trial: float, evaluate_every_epochs: float
) -> StoppingRule | None:
    spec = sweep.scheduler
    if spec.name == "asha":
        rungs = rung_epochs(spec, epochs_per_trial, evaluate_every_epochs)
        return Asha(rungs, spec.reduction, objectives=len(objective_modes(sweep)))
    if spec.name == "median":
        return MedianRule(spec.grace_epochs, interval=evaluate_every_epochs or 1.0)
    if spec.name == "extrapolation":
        return Extrapolation(spec.grace_epochs, epochs_per_trial)
    return None
