"""When a sweep's scheduler decides about its trials, as far as the spec says it."""

import math

from tuning.spaces.space import SchedulerSpec, SweepSpec
from tuning.stopping.extrapolation import MIN_POINTS
from tuning.stopping.rules import ROUNDING


def rung_epochs(
    spec: SchedulerSpec, epochs_per_trial: float, evaluate_every_epochs: float = 0
) -> list[float]:
    """The epochs after which asha compares trials: those of evaluations, before the end.

    The first is the first evaluation at or after `grace_epochs`, and each of the others has
    `reduction` times the epochs of the one before it. With a cost as the resource, the rungs are
    costs in epochs of average cost, from `grace_epochs` on; evaluations come after them.
    """
    if spec.resource != "epoch":
        # A trial may cost far more than the average one.
        rung, end = spec.grace_epochs, 1000 * epochs_per_trial
    else:
        rung, end = _evaluation_after(spec.grace_epochs, evaluate_every_epochs), epochs_per_trial
    rungs = []
    while rung < end * (1 - ROUNDING):
        rungs.append(rung)
        rung *= spec.reduction
    return rungs


def _evaluation_after(epochs: float, evaluate_every_epochs: float) -> float:
    """The epoch of the first evaluation at or after `epochs`."""
    if not evaluate_every_epochs:
        return epochs
    return math.ceil(epochs / evaluate_every_epochs * (1 - ROUNDING)) * evaluate_every_epochs


def first_rung_epochs(
    spec: SchedulerSpec, epochs_per_trial: float, evaluate_every_epochs: float = 0
) -> float:
    """Epochs after which the scheduler first decides about a trial."""
    if spec.name == "none":
        return epochs_per_trial
    first = spec.every_epochs if spec.name == "pbt" else spec.grace_epochs
    if spec.name == "extrapolation":
        first = max(first, MIN_POINTS * evaluate_every_epochs)
    return min(epochs_per_trial, _evaluation_after(first, evaluate_every_epochs))


def expected_step_share(
    spec: SchedulerSpec, epochs_per_trial: float, evaluate_every_epochs: float = 0
) -> float:
    """The share of all trials' steps that are expected to be done.

    Of the trials at a rung, asha continues one of `reduction`; early ones are continued before they
    can be compared. 64 trials of 200 epochs from a grace of 10 did 1.5 times as many steps as that.
    """
    if spec.name in ("median", "extrapolation"):
        return 0.7  # a guess
    if spec.name != "asha":
        return 1.0
    begin, share, epochs = 0.0, 1.0, 0.0
    of_epochs = spec.model_copy(update={"resource": "epoch"})
    for rung in rung_epochs(of_epochs, epochs_per_trial, evaluate_every_epochs):
        epochs += share * (rung - begin)
        begin, share = rung, share / spec.reduction
    epochs += share * (epochs_per_trial - begin)
    return min(1.0, 1.5 * epochs / epochs_per_trial)


def early_stopping_text(
    sweep: SweepSpec, epochs_per_trial: float, evaluate_every_epochs: float
) -> str:
    """When the scheduler decides about trials, in a line; empty if it stops none by its spec."""
    spec = sweep.scheduler
    first = first_rung_epochs(spec, epochs_per_trial, evaluate_every_epochs)
    if spec.name in ("none", "pbt"):
        return ""
    if first >= epochs_per_trial:
        return (
            f"{spec.name} stops no trial: the first evaluation it could decide at is the last "
            "(sweep.scheduler.grace_epochs, train.evaluate_every_epochs)"
        )
    if spec.name != "asha" or spec.resource != "epoch":
        return f"{spec.name} stops trials from {first:g} of {epochs_per_trial:g} epochs on"
    rungs = rung_epochs(spec, epochs_per_trial, evaluate_every_epochs)
    named = ", ".join(f"{rung:g}" for rung in rungs)
    return f"asha compares trials after {named} of {epochs_per_trial:g} epochs"
