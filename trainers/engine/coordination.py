"""What all workers decide together between steps: the mean loss, saves and stops."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cluster.base.errors import TrainingError
from trainers.checks.finite import not_finite
from trainers.engine.reporter import Reporter
from trainers.spec import CheckpointSpec
from trainers.worker import Worker

POLL_INTERVAL_S = 1.0
"""Seconds between two questions to rank 0 whether to stop or to save."""
MAX_LOSSES_ON_DEVICE = 256
"""How many losses may stay on a device between two reports."""
FIRST_SAVE_S = 30.0
"""Seconds to the first save where `checkpoint.every_steps` is auto."""


class LossWindow:
    """The mean loss over the steps since the last report; saves in between change nothing.

    Losses stay on the device until they are asked for, so that no step waits for them.
    """

    def __init__(self, worker: Worker, state: Mapping[str, float], skips: bool = False) -> None:
        """`state` are the scalars of the checkpoint from which training goes on.

        `skips` says that a step whose loss or gradient is not finite is left out, which otherwise
        ends the run; see `train.on_nonfinite`.
        """
        self._worker, self._skips = worker, skips
        self._sum, self._count = state.get("loss_sum", 0.0), int(state.get("losses", 0))
        self.skipped = int(state.get("skipped", 0))
        """Steps of the run that were left out, of those that have been read."""
        self._last = math.nan
        self._unread: list[tuple[Tensor, Tensor]] = []

    def add(self, loss: Tensor, fault: Tensor, step: int) -> None:
        """Add the loss of `TrainStep.run` after `step` steps, and `TrainStep.fault`.

        May raise as `mean` does.
        """
        self._unread.append((loss, fault))
        if len(self._unread) == MAX_LOSSES_ON_DEVICE:
            self.read(step)

    def mean(self, step: int) -> float:
        """The mean loss, which begins a new window; NaN if all its steps were skipped. Collective.

        Raises TrainingError if a loss or a gradient is not finite, unless such steps are skipped.
        """
        self.read(step)
        mean = self._sum / self._count if self._count else math.nan
        self._sum, self._count = 0.0, 0
        return mean

    def state_dict(self, step: int) -> dict[str, float]:
        """The sum and count of the window, so that a restart begins no new one. Collective.

        Raises as `mean` does.
        """
        self.read(step)
        return {"loss_sum": self._sum, "losses": self._count, "skipped": self.skipped}

    def read(self, step: int) -> None:
        """Fetch the losses of the steps up to `step` from the device. Collective; may raise as
        `mean` does.
        """
        if not self._unread:
            return
        parts_2S = torch.stack(
            [torch.stack(part).double() for part in zip(*self._unread, strict=True)]
        )
        means_2S = self._worker.all_reduce_sum(parts_2S) / self._worker.data_world_size
        first, self._unread = step - len(self._unread) + 1, []
        for number, (loss, fault) in enumerate(zip(*means_2S.tolist(), strict=True), first):
            if math.isfinite(loss) and not fault:
                self._last, self._sum, self._count = loss, self._sum + loss, self._count + 1
            elif self._skips:
                self.skipped += 1
            else:
                raise TrainingError(not_finite(loss, number, self._last))


class SaveSchedule:
    """Decides when the state is saved."""

    def __init__(
        self, spec: CheckpointSpec, total: int, evaluations: set[int], worker: Worker
    ) -> None:
        self._spec, self._total = spec, total
        self._evaluations = evaluations if spec.keep_best else set()
        self._failure_s = spec.failure_every_hours * 3600 / worker.world_size
        self._next = time.monotonic() + FIRST_SAVE_S
        self._noted_s = 0.0

    def is_scheduled(self, step: int) -> bool:
        """Whether the spec asks for a save after `step` steps."""
        every = self._spec.every_steps
        if every != "auto" and step % every == 0:
            return True
        return step == self._total or step in self._evaluations

    def is_due(self) -> bool:
        """Whether the interval of `checkpoint.every_steps: auto` has passed."""
        return self._spec.every_steps == "auto" and time.monotonic() >= self._next

    def record_save(self, step: int, blocked_s: float, reporter: Reporter) -> None:
        """Choose the interval to the next save from `blocked_s`, the time that training waited."""
        every = save_interval_s(blocked_s, self._failure_s)
        self._next = time.monotonic() + every
        goes_on = step < self._total
        if goes_on and self._spec.every_steps == "auto" and not 0.5 < self._noted_s / every < 2:
            self._noted_s = every
            reporter.log_note(
                "checkpoint interval",
                f"{every:.0f} s: a save stops training for {blocked_s * 1e3:.0f} ms, a failure is "
                f"expected every {self._failure_s / 3600:.3g} h",
            )


def save_interval_s(save_s: float, failure_every_s: float) -> float:
    """Seconds between saves that lose the least time to saving and to steps done again.

    Young's square root (CACM 1974) for a save that blocks training for `save_s`, but at least so
    long that saving takes no more than 1 % of the time.
    """
    return max(math.sqrt(2 * save_s * failure_every_s), 100 * save_s)


@dataclass(frozen=True)
class StepDecision:
    """What all workers do after a step, besides going on."""

    stop: bool = False
    save: bool = False
    save_every_step: bool = False
    """A machine is about to be preempted: save after every step from now on."""

    @property
    def saves(self) -> bool:
        """Whether the state is saved after this step, whatever the spec says."""
        return self.save or self.stop or self.save_every_step


class StepCoordinator:
    """Has all workers follow the decisions of rank 0 after the same step."""

    def __init__(self, worker: Worker, reporter: Reporter, step: int) -> None:
        self._worker, self._reporter = worker, reporter
        self._last_poll_step, self._last_poll_s = step, time.monotonic()
        self._next_poll_step = step + 1
        self._save_every_step = False

    def decide(self, step: int, save_is_due: Callable[[], bool]) -> StepDecision:
        """The decision after `step` steps. Every few steps a collective, in which rank 0 also says
        after how many steps to ask again.
        """
        if self._worker.world_size == 1:
            return self._poll_reporter(save_is_due)
        if step < self._next_poll_step:
            return StepDecision(save_every_step=self._save_every_step)
        now = time.monotonic()
        steps = step - self._last_poll_step
        # The first steps are slow: a gap taken from them grows by degrees, or it would be too long.
        gap = min(4 * steps, round(POLL_INTERVAL_S * steps / max(1e-6, now - self._last_poll_s)))
        decided = self._worker.broadcast_from_rank_zero(
            (self._poll_reporter(save_is_due), max(1, gap))
        )
        decision, gap = cast(tuple[StepDecision, int], decided)
        self._last_poll_step, self._last_poll_s, self._next_poll_step = step, now, step + gap
        self._save_every_step = decision.save_every_step
        return decision

    def _poll_reporter(self, save_is_due: Callable[[], bool]) -> StepDecision:
        reporter = self._reporter
        return StepDecision(reporter.should_stop(), save_is_due(), reporter.preemption_pending())
