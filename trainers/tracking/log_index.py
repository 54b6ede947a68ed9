"""Where in an operation log the lines of each run are, so that nobody reads 700 MB for one trial.

The index is a file of records: a hash of the run's key, and the offset of a line. It is as good as
its length: what a crash left out is looked for in the log itself, from the last record on.
"""

import hashlib
import json
import os
import re
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

INDEX_FILE = "spool.index"
RECORD = struct.Struct("=8sQ")
"""The hash of a run's key, and the offset of a line of the run."""
_HEAD = re.compile(rb'{"do":"\w+",(?:"id":"\w*",)?"(?:run|key)":"([^"\\]*)"')
"""The beginning of a line, as `OperationLog.append` writes it; a key of other characters than
ASCII, or with quotes, is escaped and does not match."""


def run_of(line: bytes) -> str | None:
    """The key of the run of a line of the log; None where the line is damaged.

    The metrics are not parsed, which would take most of the time.
    """
    found = _HEAD.match(line)
    if found is not None:
        return found[1].decode()
    try:
        operation = json.loads(line)
        return str(operation.get("run", operation.get("key", "")))
    except (ValueError, AttributeError):
        return None


def _hash(run: str) -> bytes:
    return hashlib.blake2b(run.encode(), digest_size=8).digest()


class LogIndex:
    """The index of a log, beside its one writer. A failure leaves it shorter, never wrong."""

    def __init__(self, log: Path, log_end: int) -> None:
        """Completes the index of a log whose last whole line ends at `log_end`."""
        path = log.with_name(INDEX_FILE)
        self._file: int | None = None
        try:
            records, start = _records(path, log_end)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, len(records))
            for offset, line in lines_from(log, start):
                if offset > start or not records:
                    self.add(run_of(line), offset)
        except OSError:
            self.close()

    def add(self, run: str | None, offset: int) -> None:
        """Record that the line at `offset` is of `run`; a damaged line is of none."""
        if self._file is None or run is None:
            return
        try:
            whole = os.write(self._file, RECORD.pack(_hash(run), offset)) == RECORD.size
        except OSError:
            whole = False
        if not whole:  # a later record would hide that this one is missing
            self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def run_lines(log: Path, run: str) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a run in their order, each with its offset.

    Another process may be writing to the log. Raises FileNotFoundError without a log.
    """
    lines, start = _indexed_lines(log, run)
    yield from lines
    for offset, line in lines_from(log, start):
        if run_of(line) == run:
            yield offset, line


def _indexed_lines(log: Path, run: str) -> tuple[list[tuple[int, bytes]], int]:
    """The lines of a run by the index, and the offset from which the log must be looked through."""
    records, start = _records(log.with_name(INDEX_FILE), log.stat().st_size)
    wanted = _hash(run)
    found: list[tuple[int, bytes]] = []
    with log.open("rb") as file:
        at = records.find(wanted)
        while at >= 0:
            if at % RECORD.size == 0:
                offset = RECORD.unpack_from(records, at)[1]
                if offset >= start:
                    break
                file.seek(offset)
                line = file.readline()
                key = run_of(line)
                if key is None or _hash(key) != wanted:
                    return [], 0  # the index is of another log
                if key == run:
                    found.append((offset, line))
            at = records.find(wanted, at + 1)
    return found, start


def _records(path: Path, log_end: int) -> tuple[bytes, int]:
    """The records of an index as far as they are whole and in order, and the last one's offset."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b"", 0
    content = content[: len(content) // RECORD.size * RECORD.size]
    numbers = array("Q", content)
    last = -1
    for count, (key, offset) in enumerate(zip(numbers[::2], numbers[1::2], strict=True)):
        if not key or not last < offset < log_end:  # zeros: a machine lost its power
            content = content[: count * RECORD.size]
            break
        last = offset
    return content, max(last, 0)


def lines_from(log: Path, start: int) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a log from byte `start` on, each with its offset."""
    with log.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield start, line
            start += len(line)
