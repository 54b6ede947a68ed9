"""How a trial of pbt takes over the state of another one: by files, so that no crash undoes half.

The driver copies the other trial's checkpoint beside the trial's own ones, under a name that no
search for checkpoints finds, and then records the change in the journal, with which it counts. The
trial, which is started again, makes the copy its only checkpoint. A copy without a line in the
journal is of a driver that was killed in between; it counts for nothing.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.place import checkpoint_name, copy_checkpoint, current_store
from trainers.run_folder import CHECKPOINTS
from trainers.stores import MANIFEST
from trainers.tracking.operation_log import now_ms
from tuning.trials.journal import Change, Journal

CHANGES = "changes"
"""Field of a trial's result: how many changes had been made to the evaluated state; none without.
"""


@dataclass(frozen=True)
class Beginning:
    """Where a trial begins or goes on."""

    parameters: Mapping[str, Any]
    changes: int
    """How many changes have been made to its state."""
    known_step: int
    """Step of the last evaluation that Tune knows of this state; 0 for none."""


def offer_state(donor: Path, step: int, taker: Path, change: int) -> bool:
    """Copy a trial's checkpoint after `step` steps for another one's change of this number.

    `donor` and `taker` are the trials' folders. Returns False if the checkpoint is gone.
    """
    source, target = current_store(donor / CHECKPOINTS), current_store(taker / CHECKPOINTS)
    try:
        copy_checkpoint(source, target, checkpoint_name(step), _copy_name(change))
    except FileNotFoundError:
        return False
    return True


def begin_trial(
    number: int, folder: Path, journal: Journal, last: Mapping[str, Any], tracker: Any, key: str
) -> Beginning:
    """Where the trial in `folder` goes on, after it took over the state that it was offered.

    `last` is its last result. The tracker is told of the take-over, and of the parameters.
    """
    changes = journal.changes.get(number, [])
    beginning = Beginning(
        journal.parameters_after(number),
        len(changes),
        _known_step(changes, last),
    )
    if changes and _take(folder / CHECKPOINTS, len(changes), changes[-1]):
        import ray

        ray.get(tracker.rewind.remote(key, changes[-1].step))
        current_store(folder / CHECKPOINTS).remove(_copy_name(len(changes)))
    _discard(folder / CHECKPOINTS, len(changes) + 1)
    _track_parameters(tracker, key, journal.parameters[number], changes)
    return beginning


def _known_step(changes: list[Change], last: Mapping[str, Any]) -> int:
    if changes and last.get(CHANGES, 0) < len(changes):  # the last result is of an earlier state
        return changes[-1].step
    return int(last.get("step", 0))


def _take(folder: Path, number: int, change: Change) -> bool:
    """Make the state that was offered for a change the only checkpoint of a trial.

    Returns False if the trial has done so before.
    """
    store = current_store(folder)
    with contextlib.suppress(FileNotFoundError):
        copy = store.download(_copy_name(number))
        if (copy / MANIFEST).exists():
            donor = "an unknown trial" if change.donor is None else f"{change.donor:04d}"
            Checkpoints(folder).replace_by(copy, f"{donor}, step {change.step}")
            return True
    return False


def _discard(folder: Path, change: int) -> None:
    """Delete the copy of a driver that was killed before the change counted."""
    with contextlib.suppress(FileNotFoundError):
        current_store(folder).remove(_copy_name(change))


def _copy_name(change: int) -> str:
    return f"taken-{change:08d}"


def _track_parameters(
    tracker: Any, key: str, first: Mapping[str, Any], changes: list[Change]
) -> None:
    """Log the parameters in effect as metrics named by their paths, where they are numbers.

    What was logged before is dropped by the tracker. A tag has all changes in words.
    """
    step, parameters = (changes[-1].step, changes[-1].parameters) if changes else (0, first)
    points = [
        (path, float(value), step, now_ms())
        for path, value in parameters.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    tracker.log_points.remote(key, points)
    if changes:
        tracker.set_tags.remote(key, {"heliostat.changes": describe_changes(first, changes)})


def changes_text(changes: int) -> str:
    """How often parameters were changed, in words."""
    return "changed once" if changes == 1 else f"changed {changes} times"


def describe_changes(first: Mapping[str, Any], changes: list[Change]) -> str:
    """The changes of a trial that began with the parameters `first`, each in a line."""
    lines = []
    for before, change in zip([first, *(c.parameters for c in changes)], changes, strict=False):
        donor = "an unknown trial" if change.donor is None else f"trial {change.donor:04d}"
        news = [f"{p} {v}" for p, v in change.parameters.items() if before.get(p) != v]
        lines.append(f"step {change.step}: from {donor}; {', '.join(news) or 'nothing new'}")
    return "\n".join(lines)
