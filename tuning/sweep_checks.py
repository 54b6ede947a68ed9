"""What may change in a sweep that has begun, checked before Ray starts."""

from collections.abc import Sequence
from pathlib import Path

from cluster.base.errors import SpecError
from tuning.trials.journal import Journal
from tuning.trials.searches import EXHAUSTIVE
from tuning.trials.space import SweepSpec
from tuning.trials.trial import JOURNAL_FILE

CHANGEABLE = (
    *("budget", "cost"),
    *("sweep.trials", "sweep.repeat", "sweep.folds", "sweep.finalists", "sweep.concurrency"),
)
"""Sections and fields of the spec that may change in a sweep that has begun."""


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise SpecError for a field that cannot change in a sweep that has begun."""
    for assignment in overrides:
        path = assignment.partition("=")[0].strip()
        if not any(path == each or path.startswith(f"{each}.") for each in CHANGEABLE):
            raise SpecError(f"--set {assignment}: cannot change in a sweep that has begun")


def check_trials(folder: Path, sweep: SweepSpec, overrides: Sequence[str]) -> None:
    """Raise SpecError where `sweep.trials` of a sweep that has begun is changed in vain."""
    if not any(assignment.startswith("sweep.trials=") for assignment in overrides):
        return
    if sweep.search in EXHAUSTIVE:
        raise SpecError(f"sweep.trials: {sweep.search} tries each combination, and no more")
    begun = len(Journal(folder / JOURNAL_FILE).parameters)
    if sweep.trials < begun:
        raise SpecError(f"sweep.trials: {begun} have begun already (got {sweep.trials})")
