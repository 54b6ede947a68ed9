"""Trials that failed: run again at a resume, and when their failures end the sweep."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from trainers.spec import RunSpec
from tuning.spaces.distributions import Distribution, identical
from tuning.spaces.suggestion import assignments
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import failure_kind
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, Sweep

MIN_SAME_FAILURES = 3
"""Failures by one mistake before it is taken for a mistake of all trials."""
BY_ITS_VALUES = re.compile(r"not finite|loss is (?:nan|-?inf)|out of memory|can't allocate memory")
"""Failures that say something about a trial's parameters, such as a learning rate or a width, and
nothing about the code: another trial may do better."""
OF_A_FIELD = re.compile(r"([a-z_]+)\.[a-z_.]+: ")
"""The begin of a reason that names a field of the spec."""


def run_failed_again(sweep: Sweep) -> list[int]:
    """Have the trials that failed run again from their newest checkpoints; returns their numbers.

    To be called before Ray Tune is started, by the process that has locked the sweep's folder. The
    journal then has no end of these trials, so that the search learns from the next one.
    """
    journal = Journal(sweep.folder / JOURNAL_FILE)
    again = []
    for number in [*journal.parameters, *journal.repeats]:
        folder = sweep.trial_folder(number)
        failed = (folder / FAILED_FILE).exists()
        end = journal.ends.get(number)
        lost = end is not None and end["value"] is None and not (folder / ENDED_FILE).exists()
        if failed or lost:
            if end is not None:
                journal.record_restart(number)
            (folder / FAILED_FILE).unlink(missing_ok=True)
            again.append(number)
    return again


class MistakeWatch:
    """Notices a mistake that every trial of a sweep makes.

    That is one in a field of the spec that is the same for all, or one by which at least
    `MIN_SAME_FAILURES` trials failed before any trial of this command was evaluated, and which no
    single parameter explains: the trials that failed have two values of each choice, and values in
    both halves of each range.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._evaluated = False
        self._failed: defaultdict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        """Kind of the failure -> number of each such trial -> its parameters."""
        self.line: str | None = None
        """The mistake, once it is known to be one of all trials."""

    def on_trial_event(self, event: str, number: int, result: Mapping[str, Any]) -> bool:
        """A `tuning.tuner.TrialCallback`; True when the sweep is to be ended by this event."""
        self._evaluated |= event == "result"
        if self._evaluated or event != "error" or self.line is not None:
            return False
        reason = (self._sweep.trial_folder(number) / FAILED_FILE).read_text()
        if BY_ITS_VALUES.search(reason):
            return False
        parameters = Journal(self._sweep.folder / JOURNAL_FILE).parameters.get(number)
        if parameters is None:  # it repeats another trial
            return False
        if _is_of_a_field_of_all(reason, parameters):
            self.line = f"trial {number:04d} failed as all would: {reason}"
            return True
        same = self._failed[failure_kind(reason)]
        same[number] = parameters
        if len(same) < MIN_SAME_FAILURES or not self._parameters_vary(list(same.values())):
            return False
        self.line = f"{len(same)} of the first trials failed alike: {reason}"
        return True

    def _parameters_vary(self, failed: Sequence[Mapping[str, Any]]) -> bool:
        return all(
            _varies(space, [each[path] for each in failed if path in each])
            for path, space in self._sweep.spec.parameters.items()
            if space.same_as is None
        )


def _is_of_a_field_of_all(reason: str, parameters: Mapping[str, Any]) -> bool:
    """Whether the reason names a field in a section of the spec in which nothing is varied."""
    field = OF_A_FIELD.match(reason)
    varied = {path.partition(".")[0] for path in assignments(parameters)}
    return field is not None and field[1] in RunSpec.model_fields and field[1] not in varied


def _varies(space: Distribution, values: Sequence[Any]) -> bool:
    """Whether the values lie in different parts of a parameter's space, or it has one value only.

    A parameter whose conditions hold for none of the trials, so that there are no values, does not
    vary: it may make the difference.
    """
    if space.choice is not None:
        several = any(not identical(space.choice[0], each) for each in space.choice)
        return not several or any(not identical(values[0], each) for each in values[1:])
    low, high = space.bounds or (0, 0)
    if low == high:
        return True
    middle = (low * high) ** 0.5 if space.is_log else (low + high) / 2
    return bool(values) and min(values) <= middle <= max(values)
