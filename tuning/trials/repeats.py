"""The best configurations of a sweep, each trained several times: with other seeds, on other folds.

These trainings are trials like the others, with numbers and folders of their own, but no scheduler
ends them early and the search does not learn from them. They begin when all trials of the search
have ended. A configuration is then ranked by the mean over its trainings.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tuning.spaces.distributions import identical
from tuning.trials.journal import Journal
from tuning.trials.ranking import loss, selected_value
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, Sweep, last_result

if TYPE_CHECKING:
    from tuning.trials.leaderboard import TrialResult

CONFIDENCE = 0.95
"""Of the interval of a mean."""
REPEATS_FIELD = "repeats"
"""Field of a trial's configuration: the number of the trial that it repeats."""


@dataclass(frozen=True)
class Repeated:
    """The trainings of one configuration that have ended."""

    values: Sequence[float]
    """The metric of each; NaN for one that failed."""
    planned: int
    """How many there are to be."""

    @property
    def complete(self) -> bool:
        return len(self.values) == self.planned

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def half_width(self) -> float:
        """Of the interval of the mean, by Student's t; NaN for a single value."""
        from scipy.special import stdtrit

        count, mean = len(self.values), self.mean
        if count < 2:
            return math.nan
        variance = math.fsum((value - mean) ** 2 for value in self.values) / (count - 1)
        return float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / count)

    def __str__(self) -> str:
        count = f"{len(self.values)}{'' if self.complete else f' of {self.planned}'}"
        return f"{self.mean:.4f} ± {self.half_width:.2g} of {count}"


def plan_repeats(
    sweep: Sweep, finalists: Mapping[int, Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Journal the trainings of the finalists that are missing; the search must have ended.

    `finalists` has the parameters of each by its number. Returns the configuration for Ray Tune of
    each training that has not ended, by its number.
    """
    journal = Journal(sweep.folder / JOURNAL_FILE)
    left: dict[int, dict[str, Any]] = {}
    for of, parameters in finalists.items():
        known = {n: repeat.parameters for n, repeat in journal.repeats.items() if repeat.of == of}
        for setting in _settings(sweep):
            if setting == _own_setting(sweep):
                continue
            wanted = {**parameters, **setting}
            number = next((n for n, each in known.items() if identical(each, wanted)), None)
            if number is None:
                number = journal.next_number
                journal.record_repeat(number, of, wanted)
            if not _has_ended(sweep, number):
                left[number] = {"trial": number, REPEATS_FIELD: of, **wanted}
    return left


def repeated_trials(sweep: Sweep, journal: Journal) -> dict[int, Repeated]:
    """Number of each trial that was repeated -> its trainings and their values."""
    if not sweep.spec.repeated_fields:
        return {}
    settings = _settings(sweep)
    values: defaultdict[int, list[float]] = defaultdict(list)
    for number, repeat in journal.repeats.items():
        setting = {path: repeat.parameters.get(path) for path in sweep.spec.repeated_fields}
        if setting not in settings or not _has_ended(sweep, number):
            continue
        if _own_setting(sweep) in settings and repeat.of not in values:
            values[repeat.of].append(_value(sweep, repeat.of))
        values[repeat.of].append(_value(sweep, number))
    return {number: Repeated(found, len(settings)) for number, found in values.items()}


def best_mean_first(
    sweep: Sweep, results: Sequence["TrialResult"], journal: Journal
) -> list["TrialResult"]:
    """The ranked results of a sweep, with those first, by their means, that were repeated.

    A configuration that failed in one of its trainings, or was not trained as often as the others,
    keeps its place among the rest.
    """
    repeated = repeated_trials(sweep, journal)
    known = [replace(each, repeated=repeated.get(each.number)) for each in results]
    means = {
        each.number: loss(sweep.spec, each.repeated.mean)
        for each in known
        if each.repeated is not None and each.repeated.complete
    }
    return sorted(known, key=lambda each: means.get(each.number, math.inf))


def _has_ended(sweep: Sweep, number: int) -> bool:
    folder = sweep.trial_folder(number)
    return (folder / ENDED_FILE).exists() or (folder / FAILED_FILE).exists()


def _value(sweep: Sweep, number: int) -> float:
    """The metric that counts of a trial; NaN if it failed or was ended before it was complete."""
    folder = sweep.trial_folder(number)
    last = last_result(folder)
    whole = last.get("complete") and not (folder / FAILED_FILE).exists()
    value = selected_value(sweep.spec, last) if whole else None
    return math.nan if value is None else value


def _settings(sweep: Sweep) -> list[dict[str, Any]]:
    return sweep.spec.repeat_settings(int(_field(sweep, "train.seed")))


def _own_setting(sweep: Sweep) -> dict[str, Any]:
    """The setting with which the trials of the search are trained: the fields of the file."""
    return {path: _field(sweep, path) for path in sweep.spec.repeated_fields}


def _field(sweep: Sweep, path: str) -> Any:
    return functools.reduce(lambda section, key: section[key], path.split("."), sweep.spec_data)
