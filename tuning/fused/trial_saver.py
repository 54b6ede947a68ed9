"""Saves the trials of an engine.

Used by the engine's computing thread only. A checkpoint is written by a thread of its own, after
its tensors have been copied here.
"""

import bisect
import math
import time

from trainers.checkpoints.ranking import loss_of
from trainers.engine.coordination import FIRST_SAVE_S, save_interval_s
from trainers.spec import RunSpec
from tuning.fused.engine_trial import EngineTrial, TrialRegistry

LEASE_FILE = "lease"
"""In a trial's folder: the lease of the instance that may save there."""


class TrialSaver:
    """Writes checkpoints of evaluated states: when the spec says so, and from time to time."""

    def __init__(self, spec: RunSpec, trials: TrialRegistry) -> None:
        self._trials = trials
        self._failure_every_s = spec.checkpoint.failure_every_hours * 3600
        self._next_save = time.monotonic() + FIRST_SAVE_S

    def periodic_save_due(self) -> bool:
        return time.monotonic() >= self._next_save

    def saved_periodically(self) -> list[EngineTrial]:
        """The trials to save from time to time, against the loss of the engine."""
        every = (trial for trial in self._trials.all() if not trial.ended)
        return [each for each in every if each.variant.spec.checkpoint.every_steps == "auto"]

    def schedule_next(self, began: float) -> None:
        """Set the time of the next periodic save, after one that began at `began`."""
        now = time.monotonic()
        interval_s = save_interval_s(now - began, self._failure_every_s)
        self._next_save = now + max(FIRST_SAVE_S, interval_s)

    def save_if_due(self, trial: EngineTrial) -> None:
        """Save the last evaluation if the spec asks for it, whatever happens to the trial."""
        spec = trial.variant.spec.checkpoint
        every = spec.every_steps
        due = every != "auto" and trial.evaluated_step - max(0, trial.saved_step) >= every
        if self._is_among_best(trial) or due:
            self.save(trial)

    def _is_among_best(self, trial: EngineTrial) -> bool:
        """Note the last evaluation; whether it is one of the `checkpoint.keep_best` best ones.

        Those of before a restart are not known: then more are saved than are kept.
        """
        spec = trial.variant.spec.checkpoint
        loss = loss_of(trial.metrics.get(spec.metric), spec.mode)
        bisect.insort(trial.best_losses, loss)
        place = bisect.bisect_right(trial.best_losses, loss)
        del trial.best_losses[spec.keep_best :]
        return place <= spec.keep_best and loss < math.inf

    def save(self, trial: EngineTrial) -> None:
        """Begin to write the last evaluated state, unless it has been saved already.

        Raises what went wrong with the save before this one, as `Checkpoints.save` does.
        """
        state = trial.evaluated_state
        if state is None or trial.saved_step >= state.steps_done:
            return
        if (trial.folder / LEASE_FILE).read_text() != trial.lease:
            return
        assert trial.program_slots is not None
        program = trial.program_slots.program
        trial.checkpoints.save(
            state.steps_done,
            program.network_with(state),
            program.optimizer,
            trial.saved_scalars,
            trial.metrics,
            trial.reporter.flush,
        )
        trial.saved_step = state.steps_done
