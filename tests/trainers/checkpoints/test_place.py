"""A run finds its checkpoints where they were, and has them where its spec says."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.base.errors import SpecError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.place import (
    POINTER,
    copy_checkpoint,
    current_store,
    newest_checkpoint,
)
from trainers.spec import CheckpointSpec

STEPS = ["step-00000003", "step-00000004"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def uris(tmp_path: Path) -> dict[str, str | None]:
    return {"folder": None, "a": f"file://{tmp_path}/a", "b": f"file://{tmp_path}/b"}


def saved(folder: Path, uri: str | None) -> nn.Linear:
    """A model that was saved after steps 3 and 4."""
    network = nn.Linear(3, 2)
    checkpoints = Checkpoints(folder, CheckpointSpec(uri=uri))
    for step in (3, 4):
        checkpoints.save(step, network, torch.optim.SGD(network.parameters()), {"x": 0.5})
    checkpoints.wait()
    return network


def resumed(folder: Path, uri: str | None) -> tuple[int, dict[str, float], nn.Linear]:
    network = nn.Linear(3, 2)
    checkpoints = Checkpoints(folder, CheckpointSpec(uri=uri))
    return *checkpoints.resume(network, torch.optim.SGD(network.parameters())), network


def files(place: Path) -> list[str]:
    return sorted(path.parent.name for path in place.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("before", "after"),
    [("folder", "a"), ("a", "b"), ("a", "folder"), ("folder", "folder"), ("a", "a")],
)
def test_training_goes_on_from_a_checkpoint_wherever_it_was(
    before: str, after: str, uris: dict[str, str | None], tmp_path: Path
) -> None:
    """All checkpoints are moved, once, and those that look for them later find them."""
    folder = tmp_path / "runs" / "mine" / "checkpoints"
    network = saved(folder, uris[before])
    for _ in range(2):
        step, scalars, found = resumed(folder, uris[after])
        assert (step, scalars) == (4, {"x": 0.5})
        assert found.weight.equal(network.weight)
    places = {"folder": folder, "a": tmp_path / "a", "b": tmp_path / "b"}
    assert {name: files(place) for name, place in places.items()} == {
        name: STEPS if name == after else [] for name in places
    }
    assert current_store(folder).names() == STEPS
    assert (folder / POINTER).exists() == (after != "folder")
    assert Checkpoints(folder).latest() is not None


def test_a_place_that_is_gone_is_an_error_and_not_step_0(
    uris: dict[str, str | None], tmp_path: Path
) -> None:
    folder = tmp_path / "mine" / "checkpoints"
    saved(folder, uris["a"])
    pointer = (folder / POINTER).read_text()
    (folder / POINTER).write_text(pointer.replace("file:", "nosuch:"))
    with pytest.raises(
        SpecError, match=r"^checkpoint\.uri: the checkpoints of mine cannot be "
    ) as e:
        resumed(folder, uris["b"])
    assert "\n" not in str(e.value)
    (folder / POINTER).write_text(pointer)
    assert resumed(folder, uris["b"])[0] == 4


def test_checkpoints_that_the_user_has_moved_are_found(
    uris: dict[str, str | None], tmp_path: Path
) -> None:
    """Their old place is gone."""
    folder = tmp_path / "mine" / "checkpoints"
    saved(folder, uris["a"])
    shutil.move(tmp_path / "a", tmp_path / "b")
    pointer = (folder / POINTER).read_text()
    (folder / POINTER).write_text(pointer.replace("file:", "nosuch:"))
    assert resumed(folder, uris["b"])[0] == 4
    assert files(tmp_path / "b") == STEPS


def test_the_folder_of_a_run_may_be_moved(uris: dict[str, str | None], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine" / "checkpoints"
    saved(folder, uris["a"])
    (tmp_path / "runs").rename(tmp_path / "archive")
    assert resumed(tmp_path / "archive" / "mine" / "checkpoints", uris["a"])[0] == 4


def test_a_move_that_was_interrupted_goes_on(
    uris: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is deleted before all of it is there."""
    folder = tmp_path / "mine" / "checkpoints"
    saved(folder, None)
    with monkeypatch.context() as broken:
        broken.setattr(
            "trainers.stores.RemoteStore.commit",
            lambda self, name: (_ for _ in ()).throw(OSError("AWS Error SLOW_DOWN")),
        )
        with pytest.raises(SpecError, match="SLOW_DOWN"):
            resumed(folder, uris["a"])
    assert files(folder) == STEPS
    assert resumed(folder, uris["a"])[0] == 4
    assert (files(folder), files(tmp_path / "a")) == ([], STEPS)


def test_a_damaged_one_is_no_obstacle(uris: dict[str, str | None], tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "checkpoints"
    saved(folder, None)
    (folder / STEPS[1] / "manifest.json").write_text("{")
    assert resumed(folder, uris["a"])[0] == 3


def test_a_store_that_does_not_answer_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older checkpoint, or step 0, would follow without a word."""
    folder = tmp_path / "mine" / "checkpoints"
    saved(folder, None)

    def stale(path: Path) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("trainers.checkpoints.checkpoints.read_manifest", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        resumed(folder, None)


def test_another_runs_checkpoint_replaces_all_others(
    uris: dict[str, str | None], tmp_path: Path
) -> None:
    """Also at a URI, and also if it has fewer steps: as population based training needs it."""
    donor, folder = tmp_path / "donor" / "checkpoints", tmp_path / "mine" / "checkpoints"
    network = saved(donor, None)
    shutil.rmtree(donor / STEPS[1])
    saved(folder, uris["a"])
    checkpoints = Checkpoints(folder, CheckpointSpec(uri=uris["a"]))
    checkpoints.replace_by(donor / STEPS[0])
    assert files(tmp_path / "a") == STEPS[:1]
    step, _, found = resumed(folder, uris["a"])
    assert step == 3
    assert found.weight.equal(network.weight)


def test_the_place_of_the_newest_checkpoint_is_told_without_a_download(
    uris: dict[str, str | None], tmp_path: Path
) -> None:
    folder, other = tmp_path / "mine" / "checkpoints", tmp_path / "other" / "checkpoints"
    assert newest_checkpoint(folder) is None
    saved(folder, None)
    saved(other, uris["a"])
    Checkpoints(other).forget_copies()
    assert newest_checkpoint(folder) == str(folder / STEPS[1])
    place = newest_checkpoint(other)
    assert place is not None
    assert place.startswith(f"{uris['a']}/other-")
    assert files(tmp_path / "cache") == []
    assert resumed(other, uris["a"])[0] == 4


@pytest.mark.parametrize("place", ["folder", "a"])
def test_a_copy_for_another_run_is_whole_and_out_of_the_way(
    place: str, uris: dict[str, str | None], tmp_path: Path
) -> None:
    """Both runs may be saving: what they have begun to write stays."""
    one, other = (tmp_path / name / "checkpoints" for name in ("one", "other"))
    network = saved(one, uris[place])
    saved(other, uris[place])
    source, target = current_store(one), current_store(other)
    target.start_write("step-00000009")
    begun = target.staging_dir("step-00000009") / "begun"
    begun.touch()
    for _ in range(2):
        copy_checkpoint(source, target, STEPS[0], "taken-1")
    assert begun.exists()
    source.remove(STEPS[0])
    checkpoints = Checkpoints(other)
    assert checkpoints.newest_step() == 4
    newest = newest_checkpoint(other)
    assert newest is not None
    assert newest.endswith(STEPS[1])
    checkpoints.replace_by(target.download("taken-1"), "somebody, step 3")
    step, _, found = resumed(other, uris[place])
    assert step == 3
    assert found.weight.equal(network.weight)
    target.remove("taken-1")
    assert not list(tmp_path.rglob("taken-1"))
    with pytest.raises(FileNotFoundError):
        copy_checkpoint(source, target, STEPS[0], "taken-2")
    assert not list(tmp_path.rglob("*taken-2"))
