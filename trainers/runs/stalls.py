"""The driver's side of workers that hang: which one is to blame, and news of it."""

import contextlib
import time
from collections.abc import Collection
from pathlib import Path

from trainers.engine.stall_files import Stall, rank_and_count, read_stall, read_stalls, stall_paths


def last_stall(folder: Path, workers: Collection[int] | None = None) -> Stall | None:
    """The stall that ended the last start of one of `workers`, if it was one.

    Of workers that waited for one another it is the one that all others waited for.
    """
    newest = {rank_and_count(path)[0]: path for path in stall_paths(folder)}
    found = [stall for path in newest.values() if (stall := read_stall(path)) is not None]
    if workers is not None and not any(stall.rank in workers for stall in found):
        return None
    return likely_culprit(found)


def likely_culprit(found: list[Stall]) -> Stall | None:
    """The one among workers that hung together which the others waited for."""
    return min(found, key=lambda stall: (stall.waiting, stall.rank), default=None)


class StallWatch:
    """Tells of stalls as they appear in a run's folder; for who started the workers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reported = {stall.path for stall in read_stalls(folder)}
        self._waiting: set[Path] = set()
        self._next = 0.0

    def poll(self) -> Stall | None:
        """A new stall, once a second at most and when all workers have written their stacks."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + 1
        found = [stall for stall in read_stalls(self._folder) if stall.path not in self._reported]
        paths = {stall.path for stall in found}
        if paths != self._waiting:
            self._waiting = paths
            return None
        self._reported |= paths
        self._waiting = set()
        return likely_culprit(found)

    def remove_empty(self) -> None:
        """Remove what workers left that did not hang but were ended in another way."""
        for path in stall_paths(self._folder):
            if read_stall(path) is None:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or never made
            self._folder.rmdir()
