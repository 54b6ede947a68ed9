"""Workers that hang: ended with their stacks on disk, told of in a line, started again.

A worker says before each step that it is alive. When it has not for `train.stall_timeout_s`,
Python's faulthandler writes down where all its threads are and ends the process, from a thread
of its own in C, which runs also while something else holds the interpreter. Ray Train takes it
from there: a dead worker is replaced.
"""

import contextlib
import faulthandler
import mmap
import os
import platform
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

STALLS = "stalls"
START_ALLOWANCE = 3
"""How many times `train.stall_timeout_s` a start may take up to the end of its first step: it
builds the model, reads the checkpoint and compiles."""
HEAD_BYTES = 256
STEP = slice(5, 15)
"""Where the head of the file has the step."""
WAITING = (
    *("torch/distributed/", "torch/nn/parallel/", "torch/autograd/graph.py"),
    *("trainers/engine/loop.py", "trainers/engine/step.py", "trainers/engine/strategy.py"),
)
"""Where a worker's innermost call is while it waits for the others, or for its device."""


class _Watchdog:
    """Ends this process, its stack on disk, unless `alive` is called often enough."""

    def __init__(self, folder: Path, rank: int, world: int, timeout_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = _next_path(folder, rank)
        self._file = self._path.open("w+b", buffering=0)
        self._file.write(b" " * HEAD_BYTES)  # the stack goes behind it
        self._page = mmap.mmap(self._file.fileno(), HEAD_BYTES)
        self._who = f"worker {rank} of {world}, process {os.getpid()} on {platform.node()}"
        self._timeout_s = timeout_s
        self._allowed_s = timeout_s * START_ALLOWANCE
        self._step = 0
        self._next = self._next_arming = 0.0
        self.alive(None)

    def alive(self, step: int | None) -> None:
        if step is not None:
            if self._step and self._allowed_s != self._timeout_s:
                self._allowed_s, self._next, self._next_arming = self._timeout_s, 0.0, 0.0
            self._step = step + 1
            self._page[STEP] = b"%10d" % self._step
        now = time.time()
        if now >= self._next:
            self._renew(now)

    def _renew(self, now: float) -> None:
        """Write down the time, and set the alarm anew when it is due.

        Alarms ring at whole tenths of the time-out on everybody's clock, so that workers which
        wait for one another end together, each with its stack written.
        """
        tenth = self._timeout_s / 10
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(now))
        head = (
            f"step {self._step:10d}, {self._who}, last seen at {since}\n"
            f"Its threads after {self._allowed_s:g} s without a step:\n"
        )
        self._page[:] = head.encode().ljust(HEAD_BYTES - 1)[: HEAD_BYTES - 1] + b"\n"
        if now >= self._next_arming:
            self._next_arming = tenth * (now // tenth + 1)
            left_s = self._next_arming + self._allowed_s - now
            faulthandler.dump_traceback_later(left_s, exit=True, file=self._file)
        self._next = min(self._next_arming, now + 1)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._page.close()
        self._file.close()
        self._path.unlink(missing_ok=True)


_watchdog: _Watchdog | None = None
"""One for the process, as faulthandler has one alarm."""


@contextlib.contextmanager
def watched(folder: Path, rank: int, world: int, timeout_s: float) -> Iterator[None]:
    """End this process when the code in here has not called `alive` for `timeout_s` seconds.

    The stacks of its threads are then in `folder`, under the worker's rank.
    """
    global _watchdog
    _watchdog = _Watchdog(folder, rank, world, timeout_s)
    try:
        yield
    finally:
        _watchdog.close()
        _watchdog = None


def alive(step: int | None = None) -> None:
    """A sign of life, before step `step` or within an evaluation; nothing where none is awaited."""
    if _watchdog is not None:
        _watchdog.alive(step)


@dataclass(frozen=True)
class Stall:
    """A worker that hung, as its file tells it."""

    worker: int
    step: int
    """The step that hung, counted from 1; 0 before the first one."""
    allowed_s: float
    waiting: bool
    """Whether it waited for another worker, or for its device."""
    path: Path

    def __str__(self) -> str:
        where = f"at step {self.step}" if self.step else "before its first step"
        return (
            f"worker {self.worker} made no step for {self.allowed_s:g} s {where}; "
            f"its stack: {self.path}"
        )


def stalls(folder: Path) -> list[Stall]:
    """All stalls of the run that keeps them in `folder`, the newest of each worker last."""
    return [stall for path in _paths(folder) if (stall := _read(path)) is not None]


def last_stall(folder: Path, workers: Collection[int] | None = None) -> Stall | None:
    """The stall that ended the last start of one of `workers`, if it was one.

    Of workers that waited for one another it is the one that all others waited for.
    """
    newest = {_numbers(path)[0]: path for path in _paths(folder)}
    found = [stall for path in newest.values() if (stall := _read(path)) is not None]
    if workers is not None and not any(stall.worker in workers for stall in found):
        return None
    return blamed(found)


def blamed(found: list[Stall]) -> Stall | None:
    """The one among workers that hung together which the others waited for."""
    return min(found, key=lambda stall: (stall.waiting, stall.worker), default=None)


class StallWatch:
    """Tells of stalls as they appear in a run's folder; for who started the workers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told = {stall.path for stall in stalls(folder)}
        self._waiting: set[Path] = set()
        self._next = 0.0

    def news(self) -> Stall | None:
        """A new stall, once a second at most and when all workers have written their stacks."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + 1
        found = [stall for stall in stalls(self._folder) if stall.path not in self._told]
        paths = {stall.path for stall in found}
        if paths != self._waiting:
            self._waiting = paths
            return None
        self._told |= paths
        self._waiting = set()
        return blamed(found)

    def tidy(self) -> None:
        """Remove what workers left that did not hang but were ended in another way."""
        for path in _paths(self._folder):
            if _read(path) is None:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty, or never made
            self._folder.rmdir()


def _paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("worker-*-*.txt"), key=_numbers)


def _numbers(path: Path) -> tuple[int, int]:
    """The rank and the count in a name."""
    _, rank, count = path.stem.split("-")
    return int(rank), int(count)


def _next_path(folder: Path, rank: int) -> Path:
    """The worker's next file: a count above those of its stalls."""
    counts = [_numbers(stall.path)[1] for stall in stalls(folder) if stall.worker == rank]
    return folder / f"worker-{rank}-{max(counts, default=0) + 1}.txt"


def _read(path: Path) -> Stall | None:
    """What a file tells; None when there is no stack in it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    stack = content[HEAD_BYTES:].decode(errors="replace")
    if not stack:
        return None
    head = content[:HEAD_BYTES].decode(errors="replace")
    allowed = re.search(r"after (\S+) s without", head)
    threads = re.split(r"^(?:Current t|T)hread ", stack, flags=re.MULTILINE)
    trains = next((thread for thread in threads if "/trainers/loop.py" in thread), "")
    innermost = re.search(r'File "(.*?)"', trains)
    return Stall(
        worker=_numbers(path)[0],
        step=int(head[STEP]),
        allowed_s=float(allowed[1]) if allowed else 0.0,
        waiting=innermost is not None and any(part in innermost[1] for part in WAITING),
        path=path,
    )
