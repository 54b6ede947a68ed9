"""The driver's side of workers that hang: notices stalls, and says which worker caused them.

`trainers.engine.heartbeat` is the worker's side.
"""

import contextlib
import time
from collections.abc import Collection
from pathlib import Path

from trainers.engine.stall_files import Stall, rank_and_count, read_stall, read_stalls, stall_paths


def last_stall(folder: Path, workers: Collection[int] | None = None) -> Stall | None:
    """The stall that ended the newest start of one of `workers`; None if a stall did not end it.

    Where workers waited for one another, it is the stall of the one that all others waited for.
    """
    latest = {rank_and_count(path)[0]: path for path in stall_paths(folder)}
    found = [stall for path in latest.values() if (stall := read_stall(path)) is not None]
    if workers is not None and not any(stall.rank in workers for stall in found):
        return None
    return likely_culprit(found)


def likely_culprit(stalls: list[Stall]) -> Stall | None:
    """Of workers that hung together, the one that the others waited for."""
    return min(stalls, key=lambda stall: (stall.waiting, stall.rank), default=None)


class StallWatch:
    """Reports new stalls of a run to the driver."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reported = {stall.path for stall in read_stalls(folder)}
        self._incomplete: set[Path] = set()
        """New stalls at the last poll: workers may still be writing their stacks."""
        self._next_poll_s = 0.0

    def poll(self) -> Stall | None:
        """A new stall, at most once a second, after all workers have written their stacks."""
        now_s = time.monotonic()
        if now_s < self._next_poll_s:
            return None
        self._next_poll_s = now_s + 1
        try:
            stalls = read_stalls(self._folder)
        except OSError:  # the file server does not answer: no reason to end the run
            return None
        found = [stall for stall in stalls if stall.path not in self._reported]
        paths = {stall.path for stall in found}
        if paths != self._incomplete:
            self._incomplete = paths
            return None
        self._reported |= paths
        self._incomplete = set()
        return likely_culprit(found)

    def remove_empty(self) -> None:
        """Delete the heartbeat files of workers that ended for another reason than a stall."""
        for path in stall_paths(self._folder):
            if read_stall(path) is None:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or never made
            self._folder.rmdir()
