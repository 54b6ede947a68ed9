"""Agreement of all workers on losses, saves and stops."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cluster.base.errors import TrainingError
from trainers.checkpoints.checkpoints import interval_s
from trainers.engine.reporter import Reporter
from trainers.spec import CheckpointSpec
from trainers.worker import Worker

AGREE_EVERY_S = 1.0
"""How often several workers ask the first one what it has heard: to stop, to save, to hurry."""


UNREAD_LOSSES = 256
"""How many losses may stay on a device, where reports are rare."""


FIRST_SAVE_S = 30.0
"""Seconds to the first save when its interval is chosen by what a save costs."""


class LossAverage:
    """The mean loss over the steps since it was last asked for, whatever was saved in between.

    Losses stay on the device until then, so that no step waits for them.
    """

    def __init__(self, worker: Worker, numbers: Mapping[str, float]) -> None:
        """`numbers` are those of the checkpoint that training goes on from."""
        self._worker = worker
        self._sum, self._count = numbers.get("loss_sum", 0.0), int(numbers.get("losses", 0))
        self._last = math.nan
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor, step: int) -> None:
        """Take what `Stepper.take` gave for the step that ends the first `step`; see `mean`."""
        self._unread.append(loss)
        if len(self._unread) == UNREAD_LOSSES:
            self._read(step)

    def mean(self, step: int) -> float:
        """Collective. Raises TrainingError where the loss has ceased to be a number."""
        self._read(step)
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        return mean

    def numbers(self, step: int) -> dict[str, float]:
        """What a checkpoint keeps, so that no window of the mean begins at a restart; likewise."""
        self._read(step)
        return {"loss_sum": self._sum, "losses": self._count}

    def _read(self, step: int) -> None:
        if not self._unread:
            return
        parts_S = torch.stack(self._unread).double()
        losses = (self._worker.sum(parts_S) / self._worker.data_world).tolist()
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
        self._failure_s = spec.failure_every_hours * 3600 / worker.world
        self._next = time.monotonic() + FIRST_SAVE_S
        self._noted_s = 0.0

    def planned(self, step: int) -> bool:
        """Whether the spec says that the state is saved after `step` steps."""
        every = self._spec.every_steps
        if every != "auto" and step % every == 0:
            return True
        return step == self._total or step in self._evaluations

    def due(self) -> bool:
        """Whether it is time to save, if the spec leaves this open."""
        return self._spec.every_steps == "auto" and time.monotonic() >= self._next

    def saved(self, step: int, stopped_s: float, reporter: Reporter) -> None:
        """Take note of a save after `step` steps, for which training stopped for `stopped_s`."""
        every = interval_s(stopped_s, self._failure_s)
        self._next = time.monotonic() + every
        goes_on = step < self._total
        if goes_on and self._spec.every_steps == "auto" and not 0.5 < self._noted_s / every < 2:
            self._noted_s = every
            reporter.note(
                "checkpoint interval",
                f"{every:.0f} s: a save stops training for {stopped_s * 1e3:.0f} ms, a failure is "
                f"expected every {self._failure_s / 3600:.3g} h",
            )


@dataclass(frozen=True)
class _Wishes:
    """What all workers do after a step, besides going on."""

    stop: bool = False
    save: bool = False
    hurry: bool = False
    """A machine is about to go: save after every step from now on."""


class _Agreement:
    """What the first worker decides, taken up by all workers after the same step."""

    def __init__(self, worker: Worker, reporter: Reporter, step: int) -> None:
        self._worker, self._reporter = worker, reporter
        self._asked_step, self._asked_s = step, time.monotonic()
        self._next = step + 1
        self._hurry = False

    def after(self, step: int, save_is_due: Callable[[], bool]) -> _Wishes:
        """Collective from time to time: the first worker decides, and when to ask next."""
        if self._worker.world == 1:
            return self._heard(save_is_due)
        if step < self._next:
            return _Wishes(hurry=self._hurry)
        now = time.monotonic()
        steps = step - self._asked_step
        # The first steps are slow; a gap that grows by degrees never becomes a long silence.
        gap = min(4 * steps, round(AGREE_EVERY_S * steps / max(1e-6, now - self._asked_s)))
        decided = self._worker.decided_by_first((self._heard(save_is_due), max(1, gap)))
        wishes, gap = cast(tuple[_Wishes, int], decided)
        self._asked_step, self._asked_s, self._next = step, now, step + gap
        self._hurry = wishes.hurry
        return wishes

    def _heard(self, save_is_due: Callable[[], bool]) -> _Wishes:
        reporter = self._reporter
        return _Wishes(reporter.should_stop(), save_is_due(), reporter.preempted())
