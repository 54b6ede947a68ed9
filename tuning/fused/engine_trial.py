"""A trial on an engine, and the trials of an engine by lease."""

import bisect
import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from torch import nn

from cluster.base.errors import TrainingError
from cluster.base.files import write_atomic
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.tracking.reporter import TrackerReporter
from tuning.programs.program_signature import Variant
from tuning.programs.trial_state import TrialState
from tuning.trials.trial import TuneReporter

if TYPE_CHECKING:
    from tuning.fused.program_pool import ProgramSlots


class SupersededError(TrainingError):
    """Another instance of the trial was started; this one is not trained any more."""

    def __init__(self, lease: str) -> None:
        number = lease.partition("-")[0]
        super().__init__(f"trial {number} was started again, or has been stopped")


@dataclass(eq=False)
class EngineTrial:
    """An instance of a trial, from `Engine.start` to `Engine.stop`.

    Which thread uses what: the fields up to `checkpoints` never change; `reporter` has a lock of
    its own; `results` goes from the computing thread to the call that waits in `Engine.next`;
    `files` is of calls. Everything below `files` belongs to the computing thread. So does
    `checkpoints`, until the trial has ended; from then on only calls use it, to wait for the last
    save.
    """

    number: int
    lease: str
    """Identifies the instance, by its number and a random part; the one named in the trial's folder
    may save there."""
    variant: Variant
    folder: Path
    evaluation_steps: set[int]
    progress: TuneReporter
    reporter: TrackerReporter
    checkpoints: Checkpoints
    had_ended: bool = False
    """Whether the trial had ended before this instance, which only repeats its result."""
    results: "SimpleQueue[dict[str, Any] | TrainingError]" = field(default_factory=SimpleQueue)
    files: "TrialFiles" = field(init=False)

    result_requested: bool = False
    """Whether Tune waits for its next evaluation."""
    ended: bool = False
    steps_done: int = 0
    reported_step: int = 0
    """The last step whose evaluation Tune knows."""
    network: nn.Module | None = None
    """As built, while the trial waits for a slot of `program_slots`."""
    program_slots: "ProgramSlots | None" = None
    slot: int = -1
    evaluated_state: TrialState | None = None
    """The state at the last evaluation, which is saved."""
    best_losses: list[float] = field(default_factory=list)
    """The best evaluations, as `loss_of` has them: those that `checkpoint.keep_best` keeps."""
    saved_step: int = -1
    saved_scalars: dict[str, float] = field(default_factory=dict)
    """Numbers that are saved with `evaluated_state`."""
    metrics: dict[str, float] = field(default_factory=dict)
    loss_sum: float = 0.0
    losses: int = 0
    last_finite: float = math.nan
    device_s: float = 0.0
    """Time of the device, divided by the number of trials that shared it."""
    steps_s: float = 0.0
    """Time of the device since the last evaluation, undivided."""

    def __post_init__(self) -> None:
        self.files = TrialFiles(self.folder)
        self._sorted_evaluation_steps = sorted(self.evaluation_steps)

    @property
    def evaluated_step(self) -> int:
        return self.evaluated_state.steps_done if self.evaluated_state is not None else 0

    @property
    def next_evaluation_step(self) -> int:
        """The step of the next evaluation; after the last one, that of the last one."""
        steps = self._sorted_evaluation_steps
        following = bisect.bisect_right(steps, self.evaluated_step)
        return steps[min(following, len(steps) - 1)]

    @property
    def unreported_evaluation(self) -> bool:
        """Whether it is at a step with an evaluation that Tune does not know."""
        at_end = self.steps_done == self.variant.total_steps
        new = self.steps_done > self.reported_step and self.steps_done in self.evaluation_steps
        return at_end or new

    @property
    def evaluation_due(self) -> bool:
        at_step = self.steps_done == self.next_evaluation_step
        return at_step and self.result_requested and not self.ended


class TrialFiles:
    """The results that an instance writes into the trial's folder: none once it was stopped.

    The call that waits for a result may write it late, when the next instance has written more.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._closed = False

    def write(self, name: str, text: str) -> bool:
        """Write a file whole; False if the instance was stopped."""
        with self._lock:
            if not self._closed:
                write_atomic(self._folder / name, text)
            return not self._closed

    def close(self) -> None:
        """Write nothing any more, from when this returns."""
        with self._lock:
            self._closed = True


class TrialRegistry:
    """The trials of an engine by lease. A lock guards it: every thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trials: dict[str, EngineTrial] = {}

    def add(self, trial: EngineTrial) -> None:
        with self._lock:
            self._trials[trial.lease] = trial

    def get(self, lease: str) -> EngineTrial:
        """Raises SupersededError after the trial was stopped."""
        with self._lock:
            if lease not in self._trials:
                raise SupersededError(lease)
            return self._trials[lease]

    def pop(self, lease: str) -> EngineTrial | None:
        with self._lock:
            return self._trials.pop(lease, None)

    def all(self) -> list[EngineTrial]:
        with self._lock:
            return list(self._trials.values())
