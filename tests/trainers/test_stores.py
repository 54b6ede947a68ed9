"""A committed folder is complete, in a local folder and at a URI."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.base.errors import SpecError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.state import load_model_weights
from trainers.spec import CheckpointSpec
from trainers.stores import MANIFEST, LocalStore, RemoteStore, Store

Open = Callable[[], Store]


@pytest.fixture(params=["folder", "uri"])
def open_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Open:
    """Opens the same store again, as another process would."""
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / "cache")
    if request.param == "folder":
        return lambda: LocalStore(tmp_path / "place")
    return lambda: RemoteStore(f"file://{tmp_path}/place", "run")


def build(store: Store, name: str, **files: str) -> None:
    """Write a folder, without the commit."""
    store.start_write(name)
    for file, text in files.items():
        (store.staging_dir(name) / file).write_text(text)
        store.upload(name, file)
    manifest = {"files": dict.fromkeys(files)}
    (store.staging_dir(name) / MANIFEST).write_text(json.dumps(manifest))


def content(store: Store, name: str) -> dict[str, str]:
    files = {path.name: path.read_text() for path in store.download(name).iterdir()}
    assert json.loads(files.pop(MANIFEST)) == json.loads(store.read_manifest(name))
    return files


def test_a_committed_folder_is_found_again(open_store: Open) -> None:
    store = open_store()
    build(store, "step-2", a="1", b="2")
    store.commit("step-2")
    build(store, "step-1", a="3")
    store.commit("step-1")
    for each in (store, open_store()):
        assert each.names() == ["step-1", "step-2"]
        assert content(each, "step-2") == {"a": "1", "b": "2"}
        assert content(each, "step-1") == {"a": "3"}


def test_an_uncommitted_folder_is_not_listed(open_store: Open) -> None:
    store = open_store()
    assert store.names() == []
    build(store, "step-1", a="half")
    assert open_store().names() == []


def test_an_interrupted_write_leaves_nothing_in_the_next_one(open_store: Open) -> None:
    build(open_store(), "step-1", left="over")
    store = open_store()
    build(store, "step-1", a="new")
    store.commit("step-1")
    assert content(open_store(), "step-1") == {"a": "new"}


def test_an_aborted_folder_is_deleted(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    build(store, "step-1", a="half")
    store.abort("step-1")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_committed_folder_cannot_be_aborted(open_store: Open) -> None:
    """As after an error right after the commit."""
    store = open_store()
    build(store, "step-1", a="whole")
    store.commit("step-1")
    store.abort("step-1")
    assert content(open_store(), "step-1") == {"a": "whole"}


def test_a_commit_replaces_an_older_folder(open_store: Open) -> None:
    store, other = open_store(), open_store()
    for text in ("old", "new"):
        build(store, "step-1", a=text)
        store.commit("step-1")
        assert content(other, "step-1") == {"a": text}


def test_a_removed_folder_is_deleted(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    for name in ("step-1", "step-2"):
        build(store, name, a=name)
        store.commit(name)
        store.download(name)
    store.remove("step-1")
    assert open_store().names() == ["step-2"]
    assert not list(tmp_path.rglob("step-1"))


def test_a_removal_that_was_cut_leaves_no_half_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path / "place")
    for name in ("step-1", "step-2"):
        build(store, name, a=name)
        store.commit(name)

    class KilledError(BaseException):
        pass

    def killed(path: Path, **_: object) -> None:
        if path.exists():
            next(path.iterdir()).unlink()
            raise KilledError

    with monkeypatch.context() as patches:
        patches.setattr(shutil, "rmtree", killed)
        with pytest.raises(KilledError):
            store.remove("step-1")
    assert store.names() == ["step-2"]
    build(store, "step-3", a="step-3")
    store.commit("step-3")
    assert {name: content(store, name) for name in store.names()} == {
        name: {"a": name} for name in ("step-2", "step-3")
    }
    assert not list(tmp_path.rglob("*step-1"))


@pytest.mark.parametrize("uri", ["nonsense", "nosuch://bucket/x", "s3://"])
def test_an_unusable_uri_is_reported_in_one_line(uri: str) -> None:
    with pytest.raises(SpecError, match=r"^checkpoint\.uri: .* cannot be used: ") as caught:
        RemoteStore(uri, "run")
    assert "\n" not in str(caught.value)


def test_checkpoints_at_a_uri_are_found_by_their_folder(tmp_path: Path) -> None:
    """With the run's folder, without its spec."""
    folder, uri = tmp_path / "runs" / "mine" / "checkpoints", f"file://{tmp_path}/bucket"
    network = nn.Linear(2, 3)
    checkpoints = Checkpoints(folder, CheckpointSpec(uri=uri, keep=2))
    for step in (1, 2, 3):
        checkpoints.save(step, network, torch.optim.SGD(network.parameters()))
    checkpoints.wait()
    assert not list(folder.glob("step-*"))
    kept = sorted(path.name for path in (tmp_path / "bucket").glob("*/step-*"))
    assert kept == ["step-00000002", "step-00000003"]
    newest = Checkpoints(folder).latest()
    assert newest is not None
    other = nn.Linear(2, 3)
    load_model_weights(newest, other)
    assert other.weight.equal(network.weight)


def test_a_damaged_copy_is_no_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that had not reached the disk when the machine lost its power."""
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / "cache")
    network = nn.Linear(2, 3)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointSpec(uri=f"file://{tmp_path}/b"))
    checkpoints.save(1, network, torch.optim.SGD(network.parameters()))
    checkpoints.wait()
    (state,) = (tmp_path / "cache").glob("*/step-00000001/*.safetensors")
    state.write_bytes(bytes(state.stat().st_size))
    newest = Checkpoints(tmp_path / "checkpoints").latest()
    assert newest is not None
    load_model_weights(newest, network)


def test_a_damaged_one_at_a_uri_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = nn.Linear(2, 3)
    folder, uri = tmp_path / "checkpoints", f"file://{tmp_path}/bucket"
    checkpoints = Checkpoints(folder, CheckpointSpec(uri=uri))
    for step in (1, 2):
        checkpoints.save(step, network, torch.optim.SGD(network.parameters()))
    checkpoints.wait()
    state = next((tmp_path / "bucket").glob("*/step-00000002/*.safetensors"))
    state.write_bytes(state.read_bytes()[:-1])
    newest = Checkpoints(folder).latest()
    assert newest is not None
    assert newest.name == "step-00000001"
    assert "state-00000.safetensors is truncated; passed over" in caplog.text


def test_what_a_killed_save_left_is_removed_by_the_next_one(
    open_store: Open, tmp_path: Path
) -> None:
    """Here and at the URI, whichever step the next save is of."""
    build(open_store(), "step-7", a="half")
    store = open_store()
    build(store, "step-9", a="whole")
    store.commit("step-9")
    assert list(tmp_path.rglob("*step-7*")) == []
    assert content(open_store(), "step-9") == {"a": "whole"}


def test_other_folders_at_a_uri_are_left_alone(tmp_path: Path, open_store: Open) -> None:
    """Such as a data set that another machine is uploading."""
    (tmp_path / "place" / "run" / "spirals-0123").mkdir(parents=True)
    (tmp_path / "place" / "run" / "spirals-0123" / "train.parquet").write_text("half")
    build(RemoteStore(f"file://{tmp_path}/place", "run"), "step-1", a="1")
    assert (tmp_path / "place" / "run" / "spirals-0123" / "train.parquet").exists()


def test_steps_are_sorted_as_numbers(open_store: Open) -> None:
    store = open_store()
    for name in ("step-100000000", "step-99999999"):
        build(store, name, a="1")
        store.commit(name)
    assert store.names() == ["step-99999999", "step-100000000"]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / "cache")
    return RemoteStore(f"file://{tmp_path}/place", "run")


def write(store: RemoteStore, name: str, **files: str) -> None:
    """Write and commit a folder with a manifest as checkpoints have it."""
    store.start_write(name)
    entries = {}
    for file, text in files.items():
        (store.staging_dir(name) / file).write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        entries[file] = {"bytes": len(text), "sha256": digest}
        store.upload(name, file)
    (store.staging_dir(name) / MANIFEST).write_text(json.dumps({"files": entries}))
    store.commit(name)


def copies(tmp_path: Path) -> list[str]:
    """The checkpoints of which this machine has a copy, whole or not."""
    return sorted(path.name for path in (tmp_path / "cache").glob("*/*") if path.is_dir())


def test_what_was_just_written_is_not_downloaded(
    remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a restart on the same machine; older copies make room."""
    for step in (1, 2, 3):
        write(remote, f"step-{step}", a=str(step))
    assert copies(tmp_path) == ["step-3"]
    opened = opened_files(monkeypatch)
    assert (remote.download("step-3") / "a").read_text() == "3"
    assert opened == [MANIFEST]
    remote.remove("step-3")
    assert copies(tmp_path) == []


def test_a_machine_downloads_the_files_of_others_only(
    remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint that two machines wrote: this one wrote `a`, and did not commit it."""
    write(remote, "step-1", a="mine", b="theirs")
    (copy,) = (tmp_path / "cache").glob("*/step-1")
    (copy / "b").unlink()
    (copy / MANIFEST).unlink()
    copy.rename(copy.with_name(".step-1"))
    fetched = opened_files(monkeypatch)
    path = remote.download("step-1")
    assert ((path / "a").read_text(), (path / "b").read_text()) == ("mine", "theirs")
    assert fetched == [MANIFEST, "b"]


def test_a_damaged_copy_is_downloaded_again(
    remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(remote, "step-1", a="mine", b="mine too")
    (copy,) = (tmp_path / "cache").glob("*/step-1")
    (copy / "b").unlink()
    (copy / "a").write_text("evil")
    path = remote.download("step-1")
    assert ((path / "a").read_text(), (path / "b").read_text()) == ("mine", "mine too")


def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read at a URI from now on."""
    opened: list[str] = []
    read = RemoteStore._open

    def noted(self: RemoteStore, name: str, file: str) -> Any:
        opened.append(file)
        return read(self, name, file)

    monkeypatch.setattr(RemoteStore, "_open", noted)
    return opened


def test_a_machine_keeps_one_fetched_checkpoint(
    remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine, which only reads, and whose last download was killed."""
    for step in (1, 2, 3):
        write(remote, f"step-{step}", a=str(step))
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / "other" / "cache")
    other = RemoteStore(f"file://{tmp_path}/place", "run")
    for step in (1, 2, 3):
        path = other.download(f"step-{step}")
        path.with_name(".fetch-0123").mkdir()
    assert copies(tmp_path / "other") == [".fetch-0123", "step-3"]
    shutil.rmtree(path)
    other.download("step-3")
    assert copies(tmp_path / "other") == ["step-3"]


def test_data_sets_of_several_runs_are_all_kept(remote: RemoteStore, tmp_path: Path) -> None:
    for name in ("spirals-1", "spirals-2"):
        write(remote, name, a=name)
        remote.download(name)
    assert copies(tmp_path) == ["spirals-1", "spirals-2"]


def test_an_emptied_store_has_nothing_anywhere(remote: RemoteStore, tmp_path: Path) -> None:
    write(remote, "step-1", a="1")
    other = RemoteStore(f"file://{tmp_path}/place", "other")
    write(other, "step-1", a="other")
    remote.clear()
    remote.clear()
    assert (remote.names(), other.names()) == ([], ["step-1"])
    assert len(copies(tmp_path)) == 1
