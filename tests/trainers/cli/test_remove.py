"""`heliostat remove` as a user types it, with MLflow in a file."""

import time
from pathlib import Path

import mlflow
import pytest
import torch

from heliostat.main import main
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.run_folder import locked
from trainers.runs.run import new_run
from trainers.spec import CheckpointSpec
from trainers.tracking.mlflow_run import tracked_run
from trainers.tracking.operation_log import mlflow_run_ids
from trainers.tracking.tracker import Tracker


def started(folder: Path, bucket: Path, name: str) -> Path:
    """A run with two trials, checkpoints at a URI, and three runs in MLflow."""
    overrides = [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"checkpoint.uri=file://{bucket}"]
    run = new_run("spirals:Spirals", overrides, name, None)
    network = torch.nn.Linear(2, 2)
    for owner in (run.folder, run.folder / "trials/0000", run.folder / "trials/0001"):
        saves = Checkpoints(owner / "checkpoints", CheckpointSpec(uri=f"file://{bucket}"))
        saves.save(1, network, torch.optim.SGD(network.parameters()))
        saves.wait()
    tracker = Tracker(str(run.folder / "track"), str(run.spec.tracking.uri), "heliostat")
    tracker.start(tracked_run(name, run.spec_data))
    for trial in ("0000", "0001"):
        tracker.start(tracked_run(f"{name}/{trial}", run.spec_data, parent=name))
    tracker.finish(name, "FAILED")
    while tracker.pending()[0]:
        time.sleep(0.05)
    tracker.close()
    return run.folder


def test_a_removed_run_is_gone_everywhere_and_its_name_is_free(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = tmp_path / "bucket"
    folder, other = started(own_folder, bucket, "mine"), started(own_folder, bucket, "other")
    run_ids = mlflow_run_ids(folder / "track")
    assert set(run_ids) == {"mine", "mine/0000", "mine/0001"}
    with locked(folder):
        assert main(["remove", "mine"]) == 2
    assert main(["remove", "mine"]) == 0
    assert capsys.readouterr().out == f"runs/mine is removed, in MLflow too ({run_ids['mine']})\n"
    assert sorted(path.name for path in (own_folder / "runs").iterdir()) == ["datasets", "other"]
    assert len(list(bucket.glob("*/step-*"))) == 3
    client = mlflow.MlflowClient(f"sqlite:///{own_folder}/mlflow.db")
    stages = {client.get_run(each).info.lifecycle_stage for each in run_ids.values()}
    kept = mlflow_run_ids(other / "track").values()
    assert stages == {"deleted"}
    assert {client.get_run(each).info.lifecycle_stage for each in kept} == {"active"}
    assert new_run("spirals:Spirals", [], "mine", None).saved_steps == 0


def test_a_run_is_removed_while_mlflow_is_away(
    own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], free_port: int
) -> None:
    folder = started(own_folder, tmp_path / "bucket", "mine")
    spec = (folder / "spec.yaml").read_text()
    here = f"sqlite:///{own_folder}/mlflow.db"
    (folder / "spec.yaml").write_text(spec.replace(here, f"http://127.0.0.1:{free_port}"))
    assert main(["remove", "mine"]) == 0
    assert "runs/mine is removed; MLflow keeps its run " in capsys.readouterr().out
    assert not folder.exists()


def test_what_is_no_run_is_not_removed(own_folder: Path) -> None:
    (own_folder / "runs" / "datasets").mkdir(parents=True)
    for name in ("datasets", "nothing", "."):
        assert main(["remove", name]) == 2
    assert (own_folder / "runs" / "datasets").is_dir()
    assert (own_folder / "spirals.py").exists()
