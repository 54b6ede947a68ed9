"""A committed folder is complete, in a local folder and at a URI."""

import json
from collections.abc import Callable
from pathlib import Path

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
