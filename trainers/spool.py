"""An append-only file of what MLflow is to be told, and how much of it has been told."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.files import write_atomic

Row = tuple[str, float, int, int]
"""A metric: name, value, step, time stamp in ms since the epoch."""

FILE = "spool.jsonl"
BATCH = 1000
"""MLflow takes at most this many metrics at once."""
OPERATIONS = 100
"""The most operations in a group."""


def now_ms() -> int:
    """Milliseconds since the epoch, MLflow's unit."""
    return time.time_ns() // 1_000_000


class Spool:
    """An append-only file of JSON lines, and how much of it has been sent."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._sent_path = folder / FILE, folder / "sent"
        self._cut_torn_line()
        self._file = self._path.open("ab")
        self.sent = int(self._sent_path.read_text()) if self._sent_path.exists() else 0

    def _cut_torn_line(self) -> None:
        """A crash can leave half a line at the end; nobody was told that it was safe."""
        if not self._path.exists():
            return
        with self._path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                file.truncate(whole)

    def append(self, operation: Mapping[str, Any]) -> None:
        """Returns when the operation would survive the death of this process."""
        self._file.write(json.dumps(operation, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The operations from byte `start` on, each with the byte after it."""
        return _read(self._path, start)

    def commit(self, offset: int) -> None:
        """Record that all before byte `offset` has been sent."""
        write_atomic(self._sent_path, str(offset))
        self.sent = offset

    @property
    def pending_bytes(self) -> int:
        return self._path.stat().st_size - self.sent


def logged(folder: Path, run: str) -> Iterator[Row]:
    """Every metric of a run that is in the spool in `folder`, which others may be writing to."""
    for operation, _ in _read(folder / FILE, 0):
        if operation["do"] == "log" and operation["run"] == run:
            yield from (tuple(row) for row in operation["rows"])


def _read(path: Path, start: int) -> Iterator[tuple[dict[str, Any], int]]:
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield json.loads(line), start


def batches(
    operations: Iterator[tuple[dict[str, Any], int]],
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Operations in groups, each with the byte after it; a run's metrics in a group as one.

    The operations of one run stay in order. What is sent again after a crash is at most a group.
    """
    group: list[dict[str, Any]] = []
    open_logs: dict[str, list[Row]] = {}
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
        if count >= BATCH or len(group) >= OPERATIONS:
            yield group, end
            group, open_logs, count = [], {}, 0
    if group:
        yield group, end
