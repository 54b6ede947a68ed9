"""Agreement of all workers on losses, saves and stops."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cluster.base.errors import TrainingError
from trainers.checkpoints.checkpoints import save_interval_s
from trainers.engine.reporter import Reporter
from trainers.spec import CheckpointSpec
from trainers.worker import Worker

POLL_INTERVAL_S = 1.0
"""How often several workers ask the first one what it has heard: to stop, to save, to hurry."""


MAX_LOSSES_ON_DEVICE = 256
"""How many losses may stay on a device, where reports are rare."""


FIRST_SAVE_S = 30.0
"""Seconds to the first save when its interval is chosen by what a save costs."""


class LossWindow:
    """The mean loss over the steps since it was last asked for, whatever was saved in between.

    Losses stay on the device until then, so that no step waits for them.
    """

    def __init__(self, worker: Worker, state: Mapping[str, float]) -> None:
        """`numbers` are those of the checkpoint that training goes on from."""
        self._worker = worker
        self._sum, self._count = state.get("loss_sum", 0.0), int(state.get("losses", 0))
        self._last = math.nan
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor, step: int) -> None:
        """Take what `Stepper.take` gave for the step that ends the first `step`; see `mean`."""
        self._unread.append(loss)
        if len(self._unread) == MAX_LOSSES_ON_DEVICE:
            self._fetch(step)

    def mean(self, step: int) -> float:
        """Collective. Raises TrainingError where the loss has ceased to be a number."""
        self._fetch(step)
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        return mean

    def state_dict(self, step: int) -> dict[str, float]:
        """What a checkpoint keeps, so that no window of the mean begins at a restart; likewise."""
        self._fetch(step)
        return {"loss_sum": self._sum, "losses": self._count}

    def _fetch(self, step: int) -> None:
        if not self._unread:
            return
        parts_S = torch.stack(self._unread).double()
        losses = (self._worker.all_reduce_sum(parts_S) / self._worker.data_world_size).tolist()
        self._unread = []
        for number, loss in enumerate(losses, start=step - len(losses) + 1):
            if not math.isfinite(loss):
                last = f"the last finite one was {self._last:.6g}"
                raise TrainingError(f"the loss is {loss} at step {number} ({last})")
            self._last = loss
            self._sum += loss
        self._count += len(losses)


class SaveSchedule:
    """When the state is saved."""

    def __init__(
        self, spec: CheckpointSpec, total: int, evaluations: set[int], worker: Worker
    ) -> None:
        self._spec, self._total = spec, total
        self._evaluations = evaluations if spec.keep_best else set()
        self._failure_s = spec.failure_every_hours * 3600 / worker.world_size
        self._next = time.monotonic() + FIRST_SAVE_S
        self._noted_s = 0.0

    def is_scheduled(self, step: int) -> bool:
        """Whether the spec says that the state is saved after `step` steps."""
        every = self._spec.every_steps
        if every != "auto" and step % every == 0:
            return True
        return step == self._total or step in self._evaluations

    def is_due(self) -> bool:
        """Whether it is time to save, if the spec leaves this open."""
        return self._spec.every_steps == "auto" and time.monotonic() >= self._next

    def record_save(self, step: int, stopped_s: float, reporter: Reporter) -> None:
        """Take note of a save after `step` steps, for which training stopped for `stopped_s`."""
        every = save_interval_s(stopped_s, self._failure_s)
        self._next = time.monotonic() + every
        goes_on = step < self._total
        if goes_on and self._spec.every_steps == "auto" and not 0.5 < self._noted_s / every < 2:
            self._noted_s = every
            reporter.log_note(
                "checkpoint interval",
                f"{every:.0f} s: a save stops training for {stopped_s * 1e3:.0f} ms, a failure is "
                f"expected every {self._failure_s / 3600:.3g} h",
            )


@dataclass(frozen=True)
class StepDecision:
    """What all workers do after a step, besides going on."""

    stop: bool = False
    save: bool = False
    save_every_step: bool = False
    """A machine is about to go: save after every step from now on."""


class StepCoordinator:
    """What the first worker decides, taken up by all workers after the same step."""

    def __init__(self, worker: Worker, reporter: Reporter, step: int) -> None:
        self._worker, self._reporter = worker, reporter
        self._last_poll_step, self._last_poll_s = step, time.monotonic()
        self._next_poll_step = step + 1
        self._save_every_step = False

    def decide(self, step: int, save_is_due: Callable[[], bool]) -> StepDecision:
        """Collective from time to time: the first worker decides, and when to ask next."""
        if self._worker.world_size == 1:
            return self._poll_reporter(save_is_due)
        if step < self._next_poll_step:
            return StepDecision(save_every_step=self._save_every_step)
        now = time.monotonic()
        steps = step - self._last_poll_step
        # The first steps are slow; a gap that grows by degrees never becomes a long silence.
        gap = min(4 * steps, round(POLL_INTERVAL_S * steps / max(1e-6, now - self._last_poll_s)))
        decided = self._worker.broadcast_from_rank_zero(
            (self._poll_reporter(save_is_due), max(1, gap))
        )
        wishes, gap = cast(tuple[StepDecision, int], decided)
        self._last_poll_step, self._last_poll_s, self._next_poll_step = step, now, step + gap
        self._save_every_step = wishes.save_every_step
        return wishes

    def _poll_reporter(self, save_is_due: Callable[[], bool]) -> StepDecision:
        reporter = self._reporter
        return StepDecision(reporter.should_stop(), save_is_due(), reporter.preemption_pending())
