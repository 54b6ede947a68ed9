"""The watchdog of a worker: a process that hangs is ended, with the stacks of its threads on disk.

A worker calls `heartbeat` before each step. When it has not for `train.stall_timeout_s`, Python's
faulthandler dumps the stacks and ends the process. It does so from a C thread of its own, which
runs even while another thread holds the interpreter's lock. Ray Train then replaces the dead
worker.

A worker that waits for storage is alive, however long it takes: its timer stands still meanwhile.
All times are those of a monotonic clock, since the time of day may be set while a worker runs.
"""

import contextlib
import faulthandler
import mmap
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from trainers.engine.stall_files import (
    HEADER_BYTES,
    START_TIMEOUT_FACTOR,
    STEP_FIELD,
    next_stall_path,
)
from trainers.stores import external_waits_in


class _Watchdog:
    """Ends this process, with its stacks on disk, unless `heartbeat` is called often enough.

    It watches the thread that created it. What other threads do is no sign of life.
    """

    def __init__(self, folder: Path, rank: int, world: int, timeout_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = next_stall_path(folder, rank)
        self._file = self._path.open("w+b", buffering=0)
        self._file.write(b" " * HEADER_BYTES)  # the stacks follow it
        self._page = mmap.mmap(self._file.fileno(), HEADER_BYTES)
        self._who = f"worker {rank} of {world}, process {os.getpid()} on {platform.node()}"
        self._thread = threading.get_ident()
        self._time_of_day_s = time.time() - time.monotonic()
        self._timeout_s = timeout_s
        self._allowed_s = timeout_s * START_TIMEOUT_FACTOR
        self._step = self._waits = 0
        self._next = self._next_arming = 0.0
        self.heartbeat(None)

    def heartbeat(self, step: int | None) -> None:
        if threading.get_ident() != self._thread:
            return
        if step is not None:
            if self._step and self._allowed_s != self._timeout_s:
                self._allowed_s, self._next, self._next_arming = self._timeout_s, 0.0, 0.0
            self._step = step + 1
            self._page[STEP_FIELD] = b"%10d" % self._step
        now = time.monotonic()
        if now >= self._next:
            self._rearm(now)

    @contextlib.contextmanager
    def external_wait(self) -> Iterator[None]:
        """In here the watched thread waits for others, and the timer stands still."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._waits += 1
        faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self._waits -= 1
            self._next = self._next_arming = 0.0
            self.heartbeat(None)

    def _rearm(self, now: float) -> None:
        """Write the time into the file, and reset faulthandler's timer when that is due.

        Timers expire at whole tenths of the time-out by the time of day at which the watchdogs
        began, which is the same on all machines. So workers that wait for one another end
        together, each with its stacks written.
        """
        if self._waits:
            return
        tenth = self._timeout_s / 10
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        head = (
            f"step {self._step:10d}, {self._who}, last seen at {since}\n"
            f"Its threads after {self._allowed_s:g} s without a step:\n"
        )
        self._page[:] = head.encode().ljust(HEADER_BYTES - 1)[: HEADER_BYTES - 1] + b"\n"
        if now >= self._next_arming:
            tenths = (now + self._time_of_day_s) // tenth + 1
            self._next_arming = tenth * tenths - self._time_of_day_s
            left_s = self._next_arming + self._allowed_s - now
            faulthandler.dump_traceback_later(left_s, exit=True, file=self._file)
        self._next = min(self._next_arming, now + 1)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._page.close()
        self._file.close()
        self._path.unlink(missing_ok=True)


_watchdog: _Watchdog | None = None
"""One per process, as faulthandler has one timer."""


@contextlib.contextmanager
def stall_watchdog(folder: Path, rank: int, world: int, timeout_s: float) -> Iterator[None]:
    """End this process when the code in here has not called `heartbeat` for `timeout_s` seconds.

    The stacks of its threads are then in a file in `folder`, named after the rank.
    """
    global _watchdog
    _watchdog = _Watchdog(folder, rank, world, timeout_s)
    try:
        with external_waits_in(_watchdog.external_wait):
            yield
    finally:
        _watchdog.close()
        _watchdog = None


def heartbeat(step: int | None = None) -> None:
    """Reset the watchdog, if there is one; `step` is the step that begins, None elsewhere."""
    if _watchdog is not None:
        _watchdog.heartbeat(step)
