"""From the operation log to MLflow: the files of runs, which nothing else waits for.

A place for artifacts that is full, away, or must not be written, and a model that takes minutes,
delay no metric and no status. A file that cannot be sent does not delay the others either.
"""

import threading
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from trainers.tracking.mlflow_limits import long_texts
from trainers.tracking.mlflow_store import MlflowStore, is_permanent_error
from trainers.tracking.operation_log import OperationLog
from trainers.tracking.refusals import Refusals
from trainers.tracking.sender import FILES

REFUSED = {400, 404, 405, 409, 411, 413, 414, 415, 422, 501}
"""HTTP status of the answer to a file that would be the same each time, as from a proxy with a
limit on sizes. A login, a rate or a server that fails may be better later."""


class _Waiting(NamedTuple):
    """The files of an operation in the log, and the offsets of its line."""

    files: list[dict[str, Any]]
    begin: int
    end: int


def files_of(operation: dict[str, Any]) -> list[dict[str, Any]]:
    """What of an operation is a file: an artifact, a model, a text too long for MLflow."""
    if operation["do"] in FILES:
        return [operation]
    run = operation.get("run", operation.get("key"))
    return [
        {"do": "text", "run": run, "file": file, "text": text}
        for file, text in long_texts(operation).items()
    ]


def portable(path: str, run_folder: Path) -> str:
    """A path for the log, relative to the run's folder, which may be moved, if it is in it."""
    absolute = Path(path).absolute()
    inside = absolute.is_relative_to(run_folder)
    return str(absolute.relative_to(run_folder) if inside else absolute)


def located(path: str, run_folder: Path) -> Path:
    """Where a path in the log is now, also one that was absolute when the folder was moved."""
    found = run_folder / path
    if not found.exists() and run_folder.name in found.parts:
        parts = found.parts
        inside = parts[len(parts) - parts[::-1].index(run_folder.name) :]
        moved = run_folder.joinpath(*inside)
        return moved if moved.exists() else found
    return found


class FileSender:
    """Sends the files of a log, each after everything that the log has before it."""

    def __init__(self, log: OperationLog, store: MlflowStore, refusals: Refusals) -> None:
        self._log, self._store, self._refusals = log, store, refusals
        self._waiting: deque[_Waiting] = deque()
        self._sent = self._tried = log.files_sent_offset

    def observe(self, operation: dict[str, Any], begin: int, end: int) -> None:
        """Take the files of an operation in the log, unless they were sent."""
        if end > self._log.files_sent_offset and (files := files_of(operation)):
            self._waiting.append(_Waiting(files, begin, end))

    @property
    def pending(self) -> int:
        """Files that were not sent yet."""
        return sum(len(waiting.files) for waiting in list(self._waiting))

    @property
    def untried(self) -> bool:
        """Whether there are files that nobody has tried to send."""
        return any(waiting.end > self._tried for waiting in list(self._waiting))

    @property
    def pending_bytes(self) -> int:
        """Bytes of their lines in the log that come before the offset of what was sent."""
        sent = self._log.sent_offset
        return sum(min(each.end, sent) - min(each.begin, sent) for each in list(self._waiting))

    def send(self, closed: threading.Event) -> None:
        """Send every file whose turn it is; raises the first error when all were tried."""
        first_error: Exception | None = None
        for waiting in list(self._waiting):
            if closed.is_set() or waiting.end > self._log.sent_offset:
                break
            try:
                for file in waiting.files:
                    self._send_one(file)
            except Exception as error:
                first_error = first_error or error
                continue
            finally:
                self._tried = max(self._tried, waiting.end)
            self._waiting.remove(waiting)
            self._sent = max(self._sent, waiting.end)
            left = [each.begin for each in list(self._waiting)]
            self._log.commit_files(min([self._sent, *left]))
        if first_error is not None:
            raise first_error

    def _send_one(self, file: dict[str, Any]) -> None:
        try:
            self._store.send({**file, **self._found(file)})
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if not is_permanent_error(error) and status not in REFUSED:
                raise
            tag = self._refusals.add(file, error)
            try:
                self._store.send(tag)
            except Exception as again:
                if not is_permanent_error(again):
                    raise

    def _found(self, file: dict[str, Any]) -> dict[str, str]:
        return {
            name: str(located(file[name], self._log.folder.parent))
            for name in ("path", "folder")
            if name in file
        }
