"""Population based training as a Ray Tune scheduler.

After every `scheduler.every_epochs` of a trial it is compared with the others. One of the worst
quarter goes on with the state of one of the best quarter, and with that one's parameters, changed
a little (Jaderberg et al., arXiv 1711.09846; asynchronous, as in their appendix A.1). Ray's own
class loses which parameters led to which state, leaves trials alone whose metric is NaN, and keeps
a checkpoint of each evaluation.

Fields that decide about the shape of the model, the data or the length of the run are taken over
as they are, since the state fits no others.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from trainers.changes import can_change
from tuning.spaces.distributions import Distribution, Parameters
from tuning.spaces.suggestion import assignments, possible_parameters
from tuning.trials.journal import Change, Journal
from tuning.trials.ranking import loss, selected, violation
from tuning.trials.take_over import CHANGES, offer_state
from tuning.trials.trial import ENDED_FILE, JOURNAL_FILE, Sweep, last_result

QUARTER = 0.25
"""Share of the trials that take over, and of those whose state is taken over."""
RESAMPLED = 0.25
"""How often a parameter gets a new value at random, and not one near the old one."""
FACTORS = (0.8, 1.2)
WAITING = (Trial.PENDING, Trial.PAUSED)


@dataclass
class _Member:
    """A trial that has not ended."""

    loss: float | None = None
    """The smaller the better; infinity for NaN, and where it breaks a constraint. None before the
    first evaluation of its state."""
    step: int = 0
    """Step of the state that counts, of which there is a checkpoint."""
    state_epoch: float = 0.0
    """The same in epochs."""
    changes: int = 0
    """How many changes were made to that state."""
    epoch: float = 0.0
    """Epoch of its last evaluation."""
    compared_epoch: float = 0.0
    """Epoch at which it was last compared."""


class PopulationBasedTraining(FIFOScheduler):  # type: ignore[misc]
    """Trials by their number. Its memory can be lost: it is made again from files."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep
        self._members: dict[int, _Member] = {}
        self._open()

    def _open(self) -> None:
        self._journal = Journal(self._sweep.folder / JOURNAL_FILE)
        made = sum(map(len, self._journal.changes.values()))
        self._random = random.Random(f"{self._sweep.spec.seed}, {made}")

    def __getstate__(self) -> dict[str, Any]:
        read_again = ("_journal", "_random")
        return {name: value for name, value in self.__dict__.items() if name not in read_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A new trial, or one that Tune knew before; then the journal knows better."""
        if trial.is_finished():
            return
        number = trial.config["trial"]
        self._journal.refresh()
        last = last_result(self._sweep.trial_folder(number))
        self._note_unknown_change(trial, last)
        trial.set_config({"trial": number, **self._journal.parameters_after(number)})
        member = self._members[number] = _Member()
        changes = len(self._journal.changes.get(number, []))
        if last and last.get(CHANGES, 0) == changes and not self._has_ended(number, last):
            self._note_result(member, last)
            member.compared_epoch = member.epoch

    def _note_unknown_change(self, trial: Trial, last: Mapping[str, Any]) -> None:
        """Record other parameters than the suggested ones, which an earlier release did not."""
        number = trial.config["trial"]
        known = {path: value for path, value in trial.config.items() if path != "trial"}
        if number not in self._journal.changes and known != self._journal.parameters[number]:
            change = Change(int(last.get("step", 0)), known, None, 0)
            self._journal.record_change(number, change)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        number = trial.config["trial"]
        if self._has_ended(number, result):  # its state is at an end: nobody goes on from it
            self._members.pop(number, None)
            return str(TrialScheduler.CONTINUE)
        member = self._members[number]
        self._note_result(member, result)
        if member.epoch - member.compared_epoch < self._sweep.spec.scheduler.every_epochs - 1e-9:
            return str(TrialScheduler.CONTINUE)
        member.compared_epoch = member.epoch
        takes = self._take_over(number)
        if takes or _waiting(tune_controller):
            tune_controller.pause_trial(trial, should_checkpoint=False)
            if takes:
                trial.set_config({"trial": number, **self._journal.parameters_after(number)})
            return str(TrialScheduler.NOOP)
        return str(TrialScheduler.CONTINUE)

    def _has_ended(self, number: int, result: Mapping[str, Any]) -> bool:
        """Whether a trial with this last result has ended, as Tune may not know after a resume."""
        ended = self._sweep.trial_folder(number) / ENDED_FILE
        return bool(result.get("complete")) or ended.exists()

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._members.pop(trial.config["trial"], None)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        self._members.pop(trial.config["trial"], None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        self._members.pop(trial.config["trial"], None)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Of the trials that wait, the one that has been trained least."""

        def epoch(trial: Trial) -> float:
            return self._members.get(trial.config["trial"], _Member()).epoch

        return min(_waiting(tune_controller), key=epoch, default=None)

    def debug_string(self) -> str:
        return f"PopulationBasedTraining: {len(self._members)} trials"

    def _note_result(self, member: _Member, result: Mapping[str, Any]) -> None:
        spec = self._sweep.spec
        counted = selected(spec, result)
        broken = violation(spec, counted) > 0
        member.loss = math.inf if broken else loss(spec, counted.get(spec.metric))
        member.step, member.state_epoch = int(counted["step"]), float(counted["epoch"])
        member.epoch = float(result["epoch"])
        member.changes = int(result.get(CHANGES, 0))

    def _take_over(self, number: int) -> bool:
        """Have a trial of the worst quarter take over; whether it does."""
        donor = self._donor_of(number)
        if donor is None:
            return False
        state, folder = self._members[donor], self._sweep.trial_folder
        change = len(self._journal.changes.get(number, [])) + 1
        if not offer_state(folder(donor), state.step, folder(number), change):
            return False
        before = self._journal.parameters_after(donor, state.changes)
        parameters = explored(self._sweep.spec.parameters, before, self._random)
        self._journal.record_change(number, Change(state.step, parameters, donor, state.changes))
        epoch = state.state_epoch
        self._members[number] = _Member(epoch=epoch, compared_epoch=epoch, changes=change)
        return True

    def _donor_of(self, number: int) -> int | None:
        """A trial of the best quarter for one of the worst; None for every other trial."""
        known = {n: m.loss for n, m in self._members.items() if m.loss is not None}
        ranked = sorted(known, key=lambda n: known[n])
        count = min(math.ceil(len(ranked) * QUARTER), len(ranked) // 2)
        if not count or number not in ranked[-count:]:
            return None
        best = [donor for donor in ranked[:count] if known[donor] < known[number]]
        return self._random.choice(best) if best else None


def _waiting(tune_controller: Any) -> list[Trial]:
    return [trial for trial in tune_controller.get_live_trials() if trial.status in WAITING]


def explored(
    space: Parameters, parameters: Mapping[str, Any], rng: random.Random
) -> dict[str, Any]:
    """Parameters near the given ones, within the space. What cannot change stays."""

    def options(path: str, distribution: Distribution) -> list[Any]:
        if path not in parameters:  # its condition holds only now
            return [distribution.sample(rng)]
        if not _changes(path, distribution):
            return [parameters[path]]
        if rng.random() < RESAMPLED:
            return [distribution.sample(rng)]
        return [_neighbour(distribution, parameters[path], rng)]

    return next(possible_parameters(space, options))


def _changes(path: str, distribution: Distribution) -> bool:
    """Whether a parameter can have another value from some step on.

    Fields of the model that are whole numbers or choices are taken for its shape.
    """
    values = distribution.choice or [None]
    fields = {field for value in values for field in assignments({path: value})}
    discrete = distribution.choice is not None or distribution.is_integer
    if discrete and any(field.partition(".")[0] == "model" for field in fields):
        return False
    return all(map(can_change, fields))


def _neighbour(distribution: Distribution, value: Any, rng: random.Random) -> Any:
    """A value next to the given one in a choice or a row of steps, otherwise a fifth away."""
    factor = rng.choice(FACTORS)
    if distribution.choice is not None:
        try:
            place = distribution.optuna_value(value)
        except ValueError:  # of a file that was edited
            return distribution.sample(rng)
        place += 1 if factor > 1 else -1
        return distribution.choice[min(max(place, 0), len(distribution.choice) - 1)]
    assert distribution.bounds is not None
    low, high = distribution.bounds
    step = distribution.step or (1 if distribution.is_integer else 0)
    moved = value * factor
    if step and abs(moved - value) < step:
        moved = value + (step if factor > 1 else -step)
    if distribution.is_integer:
        moved = int(low) + round((moved - low) / step) * int(step)
        return int(min(max(moved, low), high))
    return distribution.from_optuna(min(max(moved, low), high))
