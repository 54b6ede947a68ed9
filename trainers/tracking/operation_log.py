"""An append-only file of what MLflow is to be told, and how much of it has been told.

A line is with the operating system before `append` returns, so it survives the death of the
process; `sync` brings it to the disk, which the tracker does every second and before each
checkpoint of a run is given its name. So a machine that loses its power loses the metrics of its
last second, of steps that are done again. A disk that is full loses nothing while the process
lives: lines wait in memory.
"""

import errno
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cluster.base.errors import SpecError
from cluster.base.files import truncate_partial_line, write_atomic

MetricPoint = tuple[str, float, int, int]
"""A metric: name, value, step, time stamp in ms since the epoch."""

OPERATION_LOG_FILE = "spool.jsonl"
MAX_METRICS_PER_BATCH = 1000
"""MLflow takes at most this many metrics at once."""
MAX_OPERATIONS_PER_BATCH = 100
"""The most operations in a group."""


def now_ms() -> int:
    """Milliseconds since the epoch, MLflow's unit."""
    return time.time_ns() // 1_000_000


class OperationLog:
    """An append-only file of JSON lines, and how much of it has been sent. It has one writer."""

    def __init__(self, folder: Path, wait_s: float = 0) -> None:
        """Raises SpecError when `folder` has another writer for `wait_s`, or cannot be written."""
        self._path, self._sent_path = folder / OPERATION_LOG_FILE, folder / "sent"
        self._unwritten: deque[bytes] = deque()
        self._synced_offset = 0
        self._lock = threading.Lock()
        self.write_error: str | None = None
        """Why lines wait in memory, if any do."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer_lock = FileLock(folder / ".lock", timeout=wait_s)
            self._writer_lock.acquire()
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            sent = int(self._sent_path.read_text()) if self._sent_path.exists() else 0
        except Timeout:
            raise SpecError(f"{folder}: another process is writing what is tracked there") from None
        except OSError as error:
            raise SpecError(f"{folder}: cannot keep what is tracked: {error.strerror}") from None
        self._end_offset = truncate_partial_line(self._file)
        # A machine that lost its power can know of more that was sent than it still has.
        self.sent_offset = min(sent, self._end_offset)

    def append(self, operation: Mapping[str, Any]) -> None:
        """Returns when the operation would survive the death of this process; see `trouble`."""
        line = json.dumps(operation, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._unwritten.append(line)
            self._write()

    def write(self) -> None:
        """Write the lines that wait, if there is room for them by now."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        """What was written of a line that did not fit is taken back."""
        while self._unwritten:
            line = self._unwritten[0]
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.ftruncate(self._file, self._end_offset)
                self.write_error = f"{self._path}: {error.strerror}; kept in memory"
                return
            self._end_offset += len(line)
            self._unwritten.popleft()
        self.write_error = None

    def sync(self) -> None:
        """Returns when all that was written would survive the death of this machine."""
        end = self._end_offset
        if end > self._synced_offset:
            os.fsync(self._file)
            self._synced_offset = end

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The operations from byte `start` on, each with the byte after it."""
        return _read(self._path, start)

    def commit(self, offset: int) -> None:
        """Record that all before byte `offset` has been sent."""
        write_atomic(self._sent_path, str(offset))
        self.sent_offset = offset

    @property
    def pending_bytes(self) -> int:
        return self._end_offset - self.sent_offset + sum(map(len, self._unwritten))

    def close(self) -> None:
        """Let another writer go on."""
        os.close(self._file)
        self._writer_lock.release()


def read_operations(folder: Path) -> Iterator[dict[str, Any]]:
    """Every operation in the spool in `folder`, sent or not; others may be writing to it."""
    return (operation for operation, _ in _read(folder / OPERATION_LOG_FILE, 0))


def read_metrics(folder: Path, run: str) -> Iterator[MetricPoint]:
    """Every metric of a run that is in the spool in `folder`, which others may be writing to."""
    for operation in read_operations(folder):
        if operation["do"] == "log" and operation["run"] == run:
            yield from (tuple(row) for row in operation["rows"])


def mlflow_run_id(folder: Path, run: str) -> str | None:
    """MLflow's name for a run whose spool is in `folder`; None before it has made the run."""
    found = None
    for operation in read_operations(folder):
        if operation["do"] == "made" and operation["key"] == run:
            found = operation["id"]
    return found


def _read(path: Path, start: int) -> Iterator[tuple[dict[str, Any], int]]:
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            try:
                yield json.loads(line), start
            except ValueError:
                print(f"{path}: the line before byte {start} is damaged; left out", flush=True)


def group_operations(
    operations: Iterator[tuple[dict[str, Any], int]],
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Operations in groups, each with the byte after it; a run's metrics in a group as one.

    The operations of one run stay in order. What is sent again after a crash is at most a group.
    """
    group: list[dict[str, Any]] = []
    open_logs: dict[str, list[MetricPoint]] = {}
    count, end = 0, 0
    for operation, end in operations:
        if operation["do"] == "log":
            run, new = operation["run"], operation["rows"]
            if run not in open_logs:
                open_logs[run] = []
                group.append({**operation, "rows": open_logs[run]})
            open_logs[run] += new
            count += len(new)
        else:
            open_logs.pop(operation.get("run", ""), None)
            group.append(operation)
        if count >= MAX_METRICS_PER_BATCH or len(group) >= MAX_OPERATIONS_PER_BATCH:
            yield group, end
            group, open_logs, count = [], {}, 0
    if group:
        yield group, end
