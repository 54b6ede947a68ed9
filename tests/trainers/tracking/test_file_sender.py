"""Files have a queue of their own: one that cannot be sent delays nothing, and none is lost."""

import threading
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.tracking.file_sender import FileSender, located, portable
from trainers.tracking.mlflow_store import MissingFileError, MlflowStore
from trainers.tracking.operation_log import OperationLog
from trainers.tracking.refusals import Refusals


class AnsweredError(Exception):
    """An HTTP error of `requests`, as far as anybody looks at it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} for a file")
        self.response = type("Response", (), {"status_code": status})()


class Shelf:
    """In the place of MLflow: takes files, but for those that have an error."""

    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}
        self.taken: list[str] = []
        self.tags: dict[str, str] = {}

    def send(self, operation: dict[str, Any]) -> None:
        if operation["do"] == "tag":
            self.tags |= operation["tags"]
            return
        path = operation.get("path") or operation.get("folder") or operation["file"]
        name = path.rpartition("/")[2]
        if name in self.errors:
            raise self.errors[name]
        self.taken.append(name)


def opened(folder: Path, shelf: Shelf) -> tuple[OperationLog, FileSender, Refusals]:
    log, refusals = OperationLog(folder / "track"), Refusals()
    files = FileSender(log, cast(MlflowStore, shelf), refusals)
    for operation, begin, end in log.outline():
        files.observe(operation, begin, end)
    return log, files, refusals


def add(log: OperationLog, files: FileSender, *names: str) -> None:
    for name in names:
        operation = {"do": "artifact", "run": "a", "path": name}
        files.observe(operation, *log.append(operation))


def attempt(files: FileSender) -> Exception | None:
    try:
        files.send(threading.Event())
    except Exception as error:
        return error
    return None


def test_a_file_that_cannot_be_sent_does_not_delay_the_others(tmp_path: Path) -> None:
    shelf = Shelf()
    log, files, refusals = opened(tmp_path, shelf)
    add(log, files, "a", "b", "c")
    log.commit(log.append({"do": "tag", "run": "a", "tags": {}})[1])
    shelf.errors["a"] = PermissionError("read-only")
    assert isinstance(attempt(files), PermissionError)
    assert (shelf.taken, files.pending) == (["b", "c"], 1)
    log.close()
    log, files, refusals = opened(tmp_path, shelf)  # after a crash
    assert files.pending == 3, "sent twice rather than not at all"
    del shelf.errors["a"]
    assert attempt(files) is None
    assert (files.pending, files.pending_bytes) == (0, 0)
    log.close()
    log, files, _ = opened(tmp_path, shelf)
    assert files.pending == 0
    assert set(shelf.taken) == {"a", "b", "c"}
    assert refusals.line() is None
    log.close()


def test_a_file_waits_for_what_comes_before_it(tmp_path: Path) -> None:
    """Its run must exist in MLflow, with its parameters and tags."""
    shelf = Shelf()
    log, files, _ = opened(tmp_path, shelf)
    _, end = log.append({"do": "start", "key": "a", "id": "1", "params": {}, "tags": {}})
    add(log, files, "a")
    log.commit(end)
    assert attempt(files) is None
    assert shelf.taken == []
    log.commit(end + log.pending_bytes)
    assert attempt(files) is None
    assert shelf.taken == ["a"]
    log.close()


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (MissingFileError("b is gone"), True),
        (AnsweredError(413), True),
        (AnsweredError(405), True),
        (AnsweredError(403), False),
        (AnsweredError(401), False),
        (AnsweredError(429), False),
        (AnsweredError(503), False),
        (OSError(28, "No space left on device"), False),
        (ConnectionError("away"), False),
    ],
)
def test_what_is_refused_for_good_is_told_and_left_out(
    error: Exception, refused: bool, tmp_path: Path
) -> None:
    shelf = Shelf()
    log, files, refusals = opened(tmp_path, shelf)
    add(log, files, "a", "b", "c")
    log.commit(log.pending_bytes)
    shelf.errors["b"] = error
    assert (attempt(files) is None) == refused
    assert shelf.taken == ["a", "c"]
    assert files.pending == (0 if refused else 1)
    assert (refusals.line() is not None) == refused
    assert ("heliostat.refused.artifact" in shelf.tags) == refused
    log.close()


def test_texts_too_long_for_mlflow_are_files(tmp_path: Path) -> None:
    """So they do not hold up the start of their run where no artifact can be written."""
    shelf = Shelf()
    log, files, _ = opened(tmp_path, shelf)
    params = {"model.layers": list(range(3000)), "note": "x" * 100, "seed": 3}
    tags = {"heliostat.reason": "y" * 9000}
    for operation in (
        {"do": "start", "id": "1", "key": "a", "params": params, "tags": {}},
        {"do": "finish", "run": "a", "status": "FAILED", "tags": tags},
    ):
        files.observe(operation, *log.append(operation))
    assert files.pending == 2
    log.commit(log.pending_bytes)
    assert attempt(files) is None
    assert shelf.taken == ["model.layers.txt", "heliostat.reason.txt"]
    log.close()


EVENTS = st.lists(
    st.sampled_from(["add", "add", "sent", "fail", "heal", "send", "crash"]), max_size=25
)


@settings(deadline=None, max_examples=25)
@given(EVENTS)
def test_every_file_is_sent_whatever_happens(tmp_path_factory: Any, events: list[str]) -> None:
    shelf, folder = Shelf(), tmp_path_factory.mktemp("run")
    log, files, _ = opened(folder, shelf)
    names: list[str] = []
    for event in events:
        if event == "add":
            names.append(f"file-{len(names)}")
            add(log, files, names[-1])
        elif event == "sent":
            log.commit(log.sent_offset + log.pending_bytes)
        elif event == "fail" and names:
            shelf.errors[names[-1]] = PermissionError("read-only")
        elif event == "heal":
            shelf.errors.clear()
        elif event == "send":
            attempt(files)
        elif event == "crash":
            log.close()
            log, files, _ = opened(folder, shelf)
    shelf.errors.clear()
    log.commit(log.sent_offset + log.pending_bytes)
    assert attempt(files) is None
    assert set(shelf.taken) == set(names)
    assert files.pending == 0
    log.close()
    log, files, _ = opened(folder, shelf)
    assert files.pending == 0
    log.close()


def test_files_of_an_earlier_version_that_were_sent_are_not_sent_again(tmp_path: Path) -> None:
    """Then there was one offset for everything."""
    shelf = Shelf()
    log, files, _ = opened(tmp_path, shelf)
    add(log, files, "old")
    log.commit(log.pending_bytes)
    add(log, files, "new")
    log.close()
    (tmp_path / "track" / "sent-files").unlink()
    log, files, _ = opened(tmp_path, shelf)
    log.commit(log.sent_offset + log.pending_bytes)
    assert attempt(files) is None
    assert shelf.taken == ["new"]
    log.close()


def test_a_file_is_found_when_the_projects_folder_was_moved(tmp_path: Path) -> None:
    before, now = tmp_path / "before" / "runs" / "mine", tmp_path / "now" / "runs" / "mine"
    now.joinpath("model").mkdir(parents=True)
    now.joinpath("spec.yaml").touch()
    assert portable(str(before / "spec.yaml"), before) == "spec.yaml"
    assert portable(str(tmp_path / "note.txt"), before) == str(tmp_path / "note.txt")
    assert located("spec.yaml", now) == now / "spec.yaml"
    # In logs of earlier versions it is absolute.
    assert located(str(before / "spec.yaml"), now) == now / "spec.yaml"
    assert located(str(before / "model"), now) == now / "model"
    assert located(str(before / "gone.txt"), now) == before / "gone.txt"
    assert located(str(tmp_path / "note.txt"), now) == tmp_path / "note.txt"
