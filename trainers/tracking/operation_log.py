"""The operation log: an append-only file of operations for MLflow, and how much of it was sent.

A line is with the operating system before `append` returns, so it survives the death of the
process. `write_and_sync` brings it to the disk; the tracker does so every second, and before each
checkpoint of a run is given its name. A machine that loses its power therefore loses the metrics
of its last second, whose steps are done again. A full disk loses nothing while the process lives:
lines wait in memory.
"""

import errno
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from cluster.base.errors import SpecError
from cluster.base.files import truncate_partial_line, write_atomic

logger = logging.getLogger(__name__)

OPERATION_LOG_FILE = "spool.jsonl"
MAX_METRICS_PER_BATCH = 1000
"""MLflow takes at most this many metrics in one request."""
MAX_OPERATIONS_PER_BATCH = 100


class MetricPoint(NamedTuple):
    """One value of a metric. In the log, and between processes, it is a plain sequence of four."""

    name: str
    value: float
    step: int
    timestamp_ms: int
    """Milliseconds since the epoch."""


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
        """Why lines wait in memory; None when none do."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer_lock = FileLock(folder / ".lock", timeout=wait_s)
            self._writer_lock.acquire()
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            sent = int(self._sent_path.read_text()) if self._sent_path.exists() else 0
        except Timeout:
            raise SpecError(f"{folder}: another process is writing to this operation log") from None
        except OSError as error:
            raise SpecError(f"{folder}: cannot write the operation log: {error.strerror}") from None
        self._end_offset = truncate_partial_line(self._file)
        # A machine that lost its power may have kept the offset, and not the end of the log.
        self.sent_offset = min(sent, self._end_offset)

    def append(self, operation: Mapping[str, Any]) -> None:
        """Returns when the operation would survive this process; but see `write_error`."""
        line = json.dumps(operation, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._unwritten.append(line)
            self._write()

    def write_and_sync(self) -> None:
        """Write the lines that wait, if there is room now; then bring everything to the disk."""
        with self._lock:
            self._write()
        end = self._end_offset
        if end > self._synced_offset:
            os.fsync(self._file)
            self._synced_offset = end

    def _write(self) -> None:
        """A partially written line is truncated."""
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

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The operations from byte `start` on, each with the offset of its end."""
        return _read(self._path, start)

    def commit(self, offset: int) -> None:
        """Record that everything before byte `offset` has been sent."""
        write_atomic(self._sent_path, str(offset))
        self.sent_offset = offset

    @property
    def pending_bytes(self) -> int:
        return self._end_offset - self.sent_offset + sum(map(len, self._unwritten))

    def close(self) -> None:
        """Let another writer take over."""
        os.close(self._file)
        self._writer_lock.release()


def read_operations(folder: Path) -> Iterator[dict[str, Any]]:
    """Every operation in the log in `folder`, sent or not; another process may be writing."""
    return (operation for operation, _ in _read(folder / OPERATION_LOG_FILE, 0))


def read_metrics(folder: Path, run: str) -> Iterator[MetricPoint]:
    """Every metric of a run's past in the log in `folder`; another process may be writing."""
    points: list[MetricPoint] = []
    for operation in read_operations(folder):
        if operation.get("run") != run:
            continue
        if operation["do"] == "log":
            points += (MetricPoint(*row) for row in operation["rows"])
        elif operation["do"] == "rewind":
            points = [point for point in points if point.step < operation["step"]]
    yield from points


def mlflow_run_id(folder: Path, run: str) -> str | None:
    """MLflow's id of a run whose log is in `folder`; None before the run exists there."""
    return mlflow_run_ids(folder).get(run)


def mlflow_run_ids(folder: Path) -> dict[str, str]:
    """MLflow's ids of all runs whose log is in `folder`, by key; empty without a log."""
    try:
        return {
            operation["key"]: operation["id"]
            for operation in read_operations(folder)
            if operation["do"] == "made"
        }
    except FileNotFoundError:
        return {}


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
                logger.warning("%s: skipped a damaged line that ends at byte %d", path, start)


def group_operations(
    operations: Iterator[tuple[dict[str, Any], int]],
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Operations in groups, each with the offset of its end; a run's metrics in a group are one.

    The operations of one run stay in order. At most one group is sent again after a crash.
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
