"""New and resumed runs: names, kinds, and overrides, without Ray."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import read_yaml, write_yaml
from cluster.base.errors import SpecError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.cli.plan import read_probe_request
from trainers.data.remote import local_dataset
from trainers.data.splits import count_samples
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.run_folder import create_run_folder, folder_kind, locked
from trainers.runs.run import Run, new_run, resumed_run
from tuning.sweep import new_sweep, resumed_sweep

STEPS = ["train.steps=8"]


def start(name: str | None = "mine", *overrides: str, source: str | None = None) -> Run:
    return new_run("spirals:Spirals", [*STEPS, *overrides], name, source)


def trained(run: Run, steps: int = 8) -> Run:
    """The run after some steps, saved."""

    class Stops(NullReporter):
        done = 0

        def on_step_end(self, step: int) -> None:
            self.done = step

        def should_stop(self) -> bool:
            return self.done + 1 >= steps

    train(run.spec, run.workload, run.dataset, run.folder, Stops())
    return run


def resume(*overrides: str) -> Run:
    return resumed_run("mine", Path("runs"), list(overrides))


def test_a_failed_start_leaves_the_name_to_the_same_command(own_folder: Path) -> None:
    """Its log, its costs and its MLflow run go on; what it left behind is gone."""
    first = start()
    for kept in ("track/operations.jsonl", "ledger.jsonl", "ray.log"):
        (first.folder / kept).parent.mkdir(exist_ok=True)
        (first.folder / kept).write_text("kept")
    (first.folder / "stalls").mkdir()
    (first.folder / "checkpoints").mkdir()
    (first.folder / "checkpoints" / ".step-00000004").mkdir()
    again = start()
    assert again.folder == first.folder
    assert sorted(path.name for path in again.folder.iterdir() if path.name != ".lock") == [
        *("environment.json", "ledger.jsonl", "ray.log", "spec.yaml", "track")
    ]
    assert (again.folder / "track/operations.jsonl").read_text() == "kept"


def test_a_start_that_was_killed_at_once_leaves_the_name(own_folder: Path) -> None:
    (own_folder / "runs" / "mine").mkdir(parents=True)
    assert start().folder == own_folder / "runs" / "mine"


@pytest.mark.parametrize("uri", [False, True])
def test_a_run_that_has_saved_something_is_not_started_again(
    uri: bool, own_folder: Path, tmp_path: Path
) -> None:
    overrides = [f"checkpoint.uri=file://{tmp_path}/bucket"] if uri else []
    trained(start("mine", *overrides), 3)
    with pytest.raises(SpecError) as caught:
        start("mine", *overrides)
    assert str(caught.value) == (
        f"--name mine: {own_folder}/runs/mine already exists; heliostat train --resume mine "
        "continues it, heliostat remove mine removes it"
    )


def test_another_spec_does_not_take_the_name(own_folder: Path) -> None:
    start()
    with pytest.raises(SpecError, match=r"already exists; heliostat train --resume mine continues"):
        start("mine", "optimizer.lr=0.5")


def test_a_name_that_is_in_use_or_no_run_is_refused(own_folder: Path) -> None:
    run = start()
    with (
        locked(run.folder),
        pytest.raises(SpecError, match="another process is working on this run"),
    ):
        start()
    with pytest.raises(SpecError, match=r"datasets already exists, and is no run$"):
        start("datasets")


def test_a_failed_start_from_another_run_is_no_obstacle(own_folder: Path) -> None:
    """Its only checkpoint is the other run's, and may be newer at the next start."""
    other = trained(start("other"), 2)
    assert start(source="other").saved_steps == 2
    trained(other, 5)
    again = start(source="other")
    assert Checkpoints(again.folder / "checkpoints").latest().name == "step-00000005"  # type: ignore[union-attr]
    trained(again, 6)
    with pytest.raises(SpecError, match="already exists"):
        start(source="other")


SWEEP: dict[str, Any] = {
    "workload": "spirals:Spirals",
    "sweep": {
        "parameters": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}},
        "metric": "val/loss",
        "mode": "min",
        "trials": 2,
    },
}


@pytest.fixture
def sweep_file(own_folder: Path) -> str:
    write_yaml(SWEEP, own_folder / "s.yaml")
    return "s.yaml"


def test_a_failed_start_of_a_sweep_leaves_its_name(sweep_file: str) -> None:
    first = new_sweep(sweep_file, [], "search")
    (first.folder / "tune").mkdir()
    again = new_sweep(sweep_file, [], "search")
    assert again.folder == first.folder
    assert not (again.folder / "tune").exists()
    (again.folder / "trials").mkdir()
    with pytest.raises(SpecError, match=r"heliostat sweep --resume search continues it"):
        new_sweep(sweep_file, [], "search")


def test_a_verb_resumes_folders_of_its_kind_only(sweep_file: str, own_folder: Path) -> None:
    """A run of a file with a section `sweep` is no sweep."""
    single, sweep = new_run(sweep_file, [], "single", None), new_sweep(sweep_file, [], "search")
    assert (folder_kind(single.folder), folder_kind(sweep.folder)) == ("train", "sweep")
    with pytest.raises(SpecError) as caught:
        resumed_sweep("single", Path("runs"))
    assert str(caught.value) == ("--resume single: is a single run; use heliostat train --resume")
    assert caught.value.exit_code == 2
    with pytest.raises(SpecError, match=r"--resume search: is a sweep; use heliostat sweep --res"):
        resumed_run("search", Path("runs"), [])
    create_run_folder(own_folder / "runs", "study", {}, "scaling")
    for resumed in (
        lambda: resumed_run("study", Path("runs"), []),
        lambda: resumed_sweep("study", Path("runs")),
    ):
        with pytest.raises(SpecError, match=r"^--resume study: is a scaling study$"):
            resumed()
    assert resumed_run("single", Path("runs"), []).folder == single.folder
    assert resumed_sweep("search", Path("runs")).folder == sweep.folder


@pytest.mark.parametrize("file", ["trials", "tune", "journal.jsonl"])
def test_sweeps_of_earlier_versions_are_known_by_their_files(
    file: str, sweep_file: str, own_folder: Path
) -> None:
    sweep = new_sweep(sweep_file, [], "search")
    environment = json.loads((sweep.folder / "environment.json").read_text())
    del environment["kind"]
    (sweep.folder / "environment.json").write_text(json.dumps(environment))
    (sweep.folder / file).mkdir()
    with pytest.raises(SpecError, match="is a sweep"):
        resumed_run("search", Path("runs"), [])


def test_overrides_of_a_resumption_are_kept(own_folder: Path) -> None:
    start()
    resume("checkpoint.every_steps=5", "scale.max_restarts=9")
    resume("scale.max_restarts=7")
    spec = resume().spec
    assert (spec.checkpoint.every_steps, spec.scale.max_restarts) == (5, 7)
    assert read_yaml(own_folder / "runs/mine/spec.yaml")["scale"]["max_restarts"] == 7


def test_overrides_of_a_sweep_are_kept(sweep_file: str) -> None:
    new_sweep(sweep_file, [], "search")
    resumed_sweep("search", Path("runs"), ["budget.usd=5"])
    assert resumed_sweep("search", Path("runs")).spec_data["budget"]["usd"] == 5


def test_overrides_that_are_refused_are_not_kept(own_folder: Path) -> None:
    run = start()
    before = (run.folder / "spec.yaml").read_text()
    for refused in ("train.seed=3", "scale.workers=no", "checkpoint.uri=nosuch://x/y"):
        with pytest.raises(SpecError):
            resume(refused)
    with locked(run.folder), pytest.raises(SpecError, match="another process"):
        resume("scale.max_restarts=1")
    assert (run.folder / "spec.yaml").read_text() == before


def test_a_resumption_with_another_place_begins_where_the_run_was(
    own_folder: Path, tmp_path: Path
) -> None:
    trained(start(), 3)
    uri = f"file://{tmp_path}/bucket"
    moved = resume(f"checkpoint.uri={uri}")
    assert moved.saved_steps == resume().saved_steps == 3
    assert resume().spec.checkpoint.uri == uri
    trained(resume())
    assert sorted(path.name for path in (tmp_path / "bucket").glob("*/*")) == [
        *("step-00000003", "step-00000008")
    ]
    assert list((own_folder / "runs/mine/checkpoints").iterdir()) == [
        own_folder / "runs/mine/checkpoints/elsewhere.json"
    ]
    assert resume("checkpoint.uri=null").saved_steps == 8


def test_a_probe_uses_the_data_set_at_its_uri(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine that has downloaded nothing yet."""
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / "driver")
    overrides = [f"datasets=file://{tmp_path}/bucket"]
    asked = read_probe_request(Namespace(spec="spirals:Spirals", set=overrides, seconds=1.0))
    assert count_samples(asked.target.dataset, "train") == 280
    assert not (own_folder / "runs" / "datasets").exists()
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / "worker")
    assert count_samples(local_dataset(asked.target.dataset, asked.spec), "train") == 280
