"""The operation log: an append-only file of operations for MLflow, and how much of it was sent.

There are two offsets: everything before the first one was sent, but for files (artifacts and
models), which have the second one. A line is with the operating system before `append` returns, so
it survives the death of the process. `write_and_sync` brings it to the disk; the tracker does so
every second, and before each checkpoint of a run is given its name. A machine that loses its power
therefore loses the metrics of its last second, whose steps are done again. A full disk loses
nothing while the process lives: lines wait in memory.
"""

import errno
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from cluster.base.errors import SpecError
from cluster.base.files import truncate_partial_line, write_atomic
from trainers.tracking.log_index import LogIndex, lines_from, run_lines

logger = logging.getLogger(__name__)

OPERATION_LOG_FILE = "spool.jsonl"
MAX_METRICS_PER_BATCH = 1000
"""MLflow takes at most this many metrics in one request."""
MAX_OPERATIONS_PER_BATCH = 100
END_TAGS = ("heliostat.reason", "heliostat.stopped")
"""Tags that say how a run ended, which it has no more when it goes on."""
_METRICS = re.compile(rb'{"do":"log","run":"([^"\\]*)",(?:("series")|"rows"):')
"""The beginning of a line of metrics, as `append` writes it."""


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
        self.folder = folder.absolute()
        self._path, self._sent_path = folder / OPERATION_LOG_FILE, folder / "sent"
        self._files_sent_path = folder / "sent-files"
        self._unwritten: deque[tuple[bytes, str]] = deque()
        self._synced_offset = 0
        self._lock = threading.Lock()
        self.write_error: str | None = None
        """Why lines wait in memory; None when none do."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer_lock = FileLock(folder / ".lock", timeout=wait_s)
            self._writer_lock.acquire()
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            sent = _offset(self._sent_path, 0)
            # Earlier versions sent files in their turn.
            files_sent = _offset(self._files_sent_path, sent)
            self._next_offset = self._end_offset = truncate_partial_line(self._file)
            self._index = LogIndex(self._path, self._end_offset)
            # A machine that lost its power may have kept an offset, and not the end of the log.
            self.sent_offset = min(sent, self._end_offset)
            self.files_sent_offset = min(files_sent, self._end_offset)
            if not self._files_sent_path.exists():
                self.commit_files(self.files_sent_offset)
        except Timeout:
            raise SpecError(f"{folder}: another process is writing to this operation log") from None
        except OSError as error:
            raise SpecError(f"{folder}: cannot write the operation log: {error.strerror}") from None

    def append(self, operation: Mapping[str, Any]) -> tuple[int, int]:
        """Returns the offsets of the line's begin and end, when it would survive this process; but
        see `write_error`.
        """
        line = json.dumps(operation, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            begin = self._next_offset
            self._next_offset += len(line)
            self._unwritten.append((line, operation.get("run", operation.get("key", ""))))
            self._write()
            return begin, self._next_offset

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
            line, run = self._unwritten[0]
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.ftruncate(self._file, self._end_offset)
                self.write_error = f"{self._path}: {error.strerror}; kept in memory"
                return
            self._index.add(run, self._end_offset)
            self._end_offset += len(line)
            self._unwritten.popleft()
        self.write_error = None

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The operations from byte `start` on, each with the offset of its end."""
        for begin, line in lines_from(self._path, start):
            operation = _parse(self._path, begin, line)
            if operation is not None:
                yield operation, begin + len(line)

    def read_at(self, begin: int) -> dict[str, Any]:
        """The operation whose line begins at byte `begin`."""
        _, line = next(lines_from(self._path, begin))
        operation: dict[str, Any] = json.loads(line)
        return operation

    def read_run(self, run: str, end: int | None = None) -> Iterator[dict[str, Any]]:
        """The operations of a run, those before byte `end`."""
        return _read_run(self._path, run, end)

    def outline(self) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Every operation with the offsets of its begin and end; those of metrics without them."""
        for begin, line in lines_from(self._path, 0):
            operation = _outline_of_metrics(line) or _parse(self._path, begin, line)
            if operation is not None:
                yield operation, begin, begin + len(line)

    def commit(self, offset: int) -> None:
        """Record that everything before byte `offset` has been sent, but for files."""
        write_atomic(self._sent_path, str(offset))
        self.sent_offset = offset

    def commit_files(self, offset: int) -> None:
        """Record that the files of everything before byte `offset` have been sent."""
        write_atomic(self._files_sent_path, str(offset))
        self.files_sent_offset = offset

    @property
    def pending_bytes(self) -> int:
        """What was not sent yet, without files."""
        return self._next_offset - self.sent_offset

    def close(self) -> None:
        """Let another writer take over."""
        self._index.close()
        os.close(self._file)
        self._writer_lock.release()


def _offset(path: Path, default: int) -> int:
    return int(path.read_text()) if path.exists() else default


def read_operations(folder: Path) -> Iterator[dict[str, Any]]:
    """Every operation in the log in `folder`, sent or not; another process may be writing."""
    path = folder / OPERATION_LOG_FILE
    parsed = (_parse(path, begin, line) for begin, line in lines_from(path, 0))
    return (operation for operation in parsed if operation is not None)


def read_metrics(folder: Path, run: str) -> Iterator[MetricPoint]:
    """Every metric of a run's past in the log in `folder`; another process may be writing."""
    points: list[MetricPoint] = []
    for operation in _read_run(folder / OPERATION_LOG_FILE, run):
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
    path = folder / OPERATION_LOG_FILE
    lines = lines_from(path, 0) if path.exists() else ()
    made = (_parse(path, begin, line) for begin, line in lines if b'"made"' in line)
    return {each["key"]: each["id"] for each in made if each and each["do"] == "made"}


def _parse(path: Path, begin: int, line: bytes) -> dict[str, Any] | None:
    """The operation of a line; None for a damaged line."""
    try:
        operation: dict[str, Any] = json.loads(line)
    except ValueError:
        logger.warning("%s: skipped a damaged line that begins at byte %d", path, begin)
        return None
    return operation


def _outline_of_metrics(line: bytes) -> dict[str, Any] | None:
    """An operation of metrics without its points; None for another one."""
    found = _METRICS.match(line)
    if found is None:
        return None
    operation: dict[str, Any] = {"do": "log", "run": found[1].decode()}
    return {**operation, "series": None} if found[2] else operation


def _read_run(path: Path, run: str, end: int | None = None) -> Iterator[dict[str, Any]]:
    for begin, line in run_lines(path, run):
        if end is not None and begin >= end:
            return
        operation = _parse(path, begin, line)
        if operation is not None:
            yield operation


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
