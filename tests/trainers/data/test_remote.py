"""A data set at a URI is whole, whatever other processes and machines do at the same time."""

import hashlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trainers.data.remote import remote_dataset
from trainers.stores import MANIFEST

Build = Callable[[Path], dict[str, Any]]
FILES = {"a.parquet": "first", "b.parquet": "second"}


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    be_on_machine("one", tmp_path, monkeypatch)
    return f"file://{tmp_path}/bucket"


def be_on_machine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine has its own cache folder."""
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / name)


def write(folder: Path) -> dict[str, Any]:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return manifest()


def manifest() -> dict[str, Any]:
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    return {"files": {name: {"sha256": digest} for name, digest in digests.items()}}


def content(folder: Path) -> dict[str, str]:
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert json.loads(files.pop(MANIFEST)) == manifest()
    return files


def test_a_second_process_of_the_machine_waits_for_the_first(uri: str) -> None:
    """Both build in the same folder of the machine's cache."""
    second_builds = threading.Event()
    second: list[Future[Path]] = []

    def build_first(folder: Path) -> dict[str, Any]:
        found = write(folder)
        second.append(pool.submit(remote_dataset, uri, "set", build_second))
        second_builds.wait(0.5)
        return found

    def build_second(folder: Path) -> dict[str, Any]:
        second_builds.set()
        return write(folder)

    with ThreadPoolExecutor(1) as pool:
        first = remote_dataset(uri, "set", build_first)
    assert second[0].result() == first
    assert content(first) == FILES
    assert not second_builds.is_set()


def test_a_killed_process_leaves_nothing_in_the_next_build(uri: str) -> None:
    def build_and_die(folder: Path) -> dict[str, Any]:
        (folder / "left.parquet").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remote_dataset(uri, "set", build_and_die)
    assert content(remote_dataset(uri, "set", write)) == FILES


def test_another_machine_may_be_faster(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_slowly(folder: Path) -> dict[str, Any]:
        be_on_machine("two", tmp_path, monkeypatch)
        assert content(remote_dataset(uri, "set", write)) == FILES
        return write(folder)

    assert content(remote_dataset(uri, "set", build_slowly)) == FILES


@pytest.mark.parametrize("fails", [False, True])
def test_what_another_machine_has_uploaded_stays(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A build that starts, or fails, between two uploads of another one deletes nothing."""

    def build_slowly(folder: Path) -> dict[str, Any]:
        be_on_machine("two", tmp_path, monkeypatch)
        remote_dataset(uri, "set", write_in_between)
        return write(folder)

    def write_in_between(folder: Path) -> dict[str, Any]:
        """As if the files of the first machine arrive now."""
        remote = tmp_path / "bucket" / "datasets" / "set"
        remote.mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            (remote / name).write_text(text)
        if fails:
            raise OSError("no space left")
        (folder / "a.parquet").write_text(FILES["a.parquet"])
        return {"files": {"a.parquet": manifest()["files"]["a.parquet"]}}

    if fails:
        with pytest.raises(OSError, match="no space"):
            remote_dataset(uri, "set", build_slowly)
    else:
        remote_dataset(uri, "set", build_slowly)
    remote = tmp_path / "bucket" / "datasets" / "set"
    assert {name: (remote / name).read_text() for name in FILES} == FILES
