"""Fused sweeps with the real Ray Tune: a user sees the same of a fused trial as of any other."""

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest

from cluster.base.config import write_yaml
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.manifest import read_manifest
from trainers.run_folder import CHECKPOINTS
from trainers.runs import run
from tuning import sweep as sweeps
from tuning.fused.verify import measure_deviation
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import Leaderboard
from tuning.trials.trial import Sweep

pytestmark = pytest.mark.thorough

Wait = Callable[..., None]
Result = tuple[Sweep, Leaderboard, dict[str, Any], list[str]]

SPIRALS: dict[str, Any] = {
    "workload": "spirals_to_fuse:Spirals",
    "train": {"epochs": 12, "global_batch": 20},
    "tracking": {"every_steps": 7},
    "sweep": {
        "parameters": {
            "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
            "model.dropout": {"uniform": [0.0, 0.5]},
        },
        "search": "random",
        "trials": 7,
        "fuse": 4,
        "scheduler": {"grace_epochs": 2, "reduction": 2},
    },
}


@pytest.fixture
def spirals(modules: Path, spirals_source: str, tmp_path: Path) -> Path:
    """The spec file of a small sweep, whose workload all Ray workers can import."""
    (modules / "spirals_to_fuse.py").write_text(spirals_source)
    spec = tmp_path / "spirals.yaml"
    write_yaml({**SPIRALS, "storage": str(tmp_path)}, spec)
    return spec


@pytest.fixture
def run_sweep(spirals: Path, ray_cluster: str, mlflow_server: str) -> Callable[..., Result]:
    """Runs the sweep to its end, with some fields changed."""

    def runner(*overrides: str) -> Result:
        lines: list[str] = []
        overrides = (f"tracking.uri={mlflow_server}", *overrides)
        sweep = sweeps.new_sweep(str(spirals), list(overrides), None)
        board, tracked = sweeps.run_to_end(sweep, lambda *_: None, lines.append)
        return sweep, board, tracked, lines

    return runner


def children(uri: str, run_id: str) -> list[Any]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_run(run_id).info.experiment_id
    return list(client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'"))


def assert_tracked_once(uri: str, tracked: dict[str, Any], board: Leaderboard) -> None:
    """All trials are in MLflow, none twice, each with every step once."""
    client, found = mlflow.MlflowClient(uri), children(uri, tracked["run_id"])
    by_number = {int(run.info.run_name[-4:]): run for run in found}
    assert len(by_number) == len(found)
    assert set(by_number) == {*board.ended}
    for standing in board.results:
        run = by_number[standing.number]
        assert run.info.status == "FINISHED"
        assert run.data.metrics["val/loss"] == standing.value
        for metric in ("train/loss", "val/loss"):
            history = client.get_metric_history(run.info.run_id, metric)
            steps = [each.step for each in history if each.step <= standing.step]
            assert sorted(steps) == sorted(set(steps))
            assert max(steps) == standing.step


def test_a_fused_trial_is_tracked_like_any_other(run_sweep: Any, mlflow_server: str) -> None:
    """With two programs; trials are stopped, and others take their slots."""
    sweep, board, tracked, lines = run_sweep(
        "sweep.parameters={optimizer.lr: {loguniform: [1e-4, 1e-1]}, model.dropout: "
        "{uniform: [0.0, 0.5]}, model.width: {choice: [8, 16]}}"
    )
    assert [line.split(" as one program")[0] for line in lines] == ["fused: 4 trials"]
    assert len(board.results) == 7
    assert not board.failed
    assert {s.parameters["model.width"] for s in board.results} == {8, 16}
    assert any(not standing.complete for standing in board.results), "asha stopped none"
    assert_tracked_once(mlflow_server, tracked, board)
    for found in children(mlflow_server, tracked["run_id"]):
        assert "device time is divided" in found.data.tags["heliostat.fused"]
        assert found.data.metrics["perf/device_s"] > 0
    for standing in board.results:
        newest = Checkpoints(sweep.trial_folder(standing.number) / CHECKPOINTS).latest()
        assert newest is not None
        assert newest.name == f"step-{standing.step:08d}"


def test_fused_trials_have_the_same_metrics_and_asha_stops_the_same_ones(run_sweep: Any) -> None:
    """One at a time, so that asha sees the same results in the same order. The best evaluation of
    each trial counts, and has its checkpoint.
    """
    fp64 = ("train.precision=fp64", "sweep.concurrency=1", "sweep.select=best")
    in_slots, fused, _, _ = run_sweep(*fp64)
    in_processes, alone, _, _ = run_sweep(*fp64, "sweep.fuse=off")
    for sweep, board in ((in_slots, fused), (in_processes, alone)):
        for standing in board.results:
            checkpoint = Checkpoints(sweep.trial_folder(standing.number) / "checkpoints").at(
                standing.step
            )
            assert checkpoint is not None
            assert read_manifest(checkpoint)["metrics"]["val/loss"] == standing.value

    def ends(board: Leaderboard) -> dict[int, tuple[int, bool]]:
        return {s.number: (s.step, s.complete) for s in board.results}

    assert ends(fused) == ends(alone)
    assert {s.number: s.parameters for s in fused.results} == {
        s.number: s.parameters for s in alone.results
    }
    values = {s.number: s.value for s in alone.results}
    for standing in fused.results:
        assert standing.value == pytest.approx(values[standing.number], rel=1e-9)


@pytest.mark.slow
def test_a_fused_trial_continues_as_an_ordinary_run(
    run_sweep: Any, heliostat: Any, spirals_source: str
) -> None:
    sweep, board, _, _ = run_sweep("sweep.trials=2", "sweep.scheduler.name=none")
    (heliostat.folder / "spirals_to_fuse.py").write_text(spirals_source)
    trial = sweep.trial_folder(board.best.number)
    output = heliostat(
        *(
            "train",
            str(sweep.folder / sweeps.BEST_SPEC_FILE),
            "--from",
            str(trial),
            "--name",
            "further",
        ),
        *("--set", "train.epochs=14", "--set", "scale.workers=2"),
    )
    assert re.search(r"196 of 196|196/196", output) or "196" in output
    further = run.find_checkpoint("further", Path(sweep.spec_data["storage"]))
    assert further.name == "step-00000196"


@pytest.mark.slow
def test_a_trial_that_diverges_fails_and_its_neighbours_go_on(
    run_sweep: Any, mlflow_server: str
) -> None:
    _, board, tracked, _ = run_sweep(
        "sweep.search=grid",
        "sweep.scheduler.name=none",
        "sweep.parameters={optimizer.lr: {choice: [0.01, 1.0e+30, 0.001]}}",
    )
    assert list(board.failed) == [1]
    line = r"(the loss is (nan|inf)|the gradient is not finite) at step \d+"
    assert re.match(line, board.failed[1])
    assert {s.number for s in board.results} == {0, 2}
    assert all(standing.complete for standing in board.results)
    found = children(mlflow_server, tracked["run_id"])
    statuses = {run.info.run_name[-4:]: run.info.status for run in found}
    assert statuses == {"0000": "FINISHED", "0001": "FAILED", "0002": "FINISHED"}


@pytest.mark.slow
def test_trials_of_pbt_take_over_from_slot_to_slot(run_sweep: Any) -> None:
    sweep, board, _, _ = run_sweep(
        "sweep.scheduler={name: pbt, every_epochs: 2}",
        "sweep.trials=4",
        "train.epochs=60",  # slots run ahead of what Tune decides
        "sweep.parameters={optimizer.lr: {loguniform: [1.0e-6, 1.0e-1]}}",
    )
    assert [s.complete for s in board.results] == [True] * 4
    journal = Journal(sweep.folder / "journal.jsonl")
    assert journal.changes, "no trial took over weights"
    assert not list((sweep.folder / "tune").rglob("checkpoint_*"))
    for result in board.results:
        assert result.parameters == journal.parameters_after(result.number)
        deviation = measure_deviation(sweep, result)
        assert deviation.value < 1e-4, str(deviation)


def test_trials_that_cannot_be_fused_get_processes_and_a_line_says_why(
    run_sweep: Any, modules: Path, spirals_source: str
) -> None:
    asks = spirals_source.replace(
        'return model(batch["point"])',
        'return model(batch["point"] * (1 if batch["label"].sum().item() else 2))',
    )
    (modules / "spirals_that_ask.py").write_text(asks)
    _, board, _, lines = run_sweep("workload=spirals_that_ask:Spirals", "sweep.trials=2")
    assert len(board.results) == 2
    assert len(lines) == 1
    assert lines[0].startswith("not fused: ")
    assert ".item()" in lines[0]


@pytest.mark.slow
def test_the_trials_of_a_killed_engine_resume(
    spirals: Path, ray_cluster: str, mlflow_server: str, wait_until: Wait, ray_dashboard: str
) -> None:
    from ray.util.state import list_actors

    overrides = [f"tracking.uri={mlflow_server}", "train.epochs=150", "sweep.scheduler.name=none"]
    overrides += ["checkpoint.every_steps=1", "sweep.trials=4", "sweep.fuse=4"]
    sweep = sweeps.new_sweep(str(spirals), overrides, None)
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(sweeps.run_to_end(sweep, lambda *_: None))
    )
    thread.start()
    saved = f"trials/*/{CHECKPOINTS}/step-*"
    wait_until(lambda: len(list(sweep.folder.glob(saved))) >= 6)
    filters = [("class_name", "=", "EngineActor"), ("state", "=", "ALIVE")]
    for actor in list_actors(address=ray_dashboard, filters=filters, detail=True):
        os.kill(actor.pid, signal.SIGKILL)
    thread.join(180)
    board, tracked = found[0]
    assert [s.complete for s in board.results] == [True] * 4
    assert_tracked_once(mlflow_server, tracked, board)


@pytest.mark.slow
def test_a_fused_sweep_whose_driver_was_killed_resumes_to_the_planned_trials(
    heliostat: Any, mlflow_server: str, spirals_source: str, wait_until: Wait
) -> None:
    (heliostat.folder / "spirals_to_fuse.py").write_text(spirals_source)
    sweep = {**SPIRALS["sweep"], "scheduler": {"name": "none"}, "concurrency": 4}
    write_yaml({**SPIRALS, "sweep": sweep}, heliostat.folder / "s.yaml")
    process = heliostat.start("sweep", "s.yaml", "--name", "cut", "--set", "train.epochs=300")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    folder = heliostat.folder / "runs" / "cut"
    wait_until(lambda: len(list(folder.glob("trials/*/ended.json"))) >= 2, lambda: "".join(lines))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    output = heliostat("sweep", "--resume", "runs/cut", "--verify-fusion")
    found = children(mlflow_server, re.search(r"MLflow run: (\w+)", output)[1])
    assert sorted(run.info.run_name for run in found) == [f"cut-{n:04d}" for n in range(7)]
    assert {run.info.status for run in found} == {"FINISHED"}
    client = mlflow.MlflowClient(mlflow_server)
    for each in found:
        steps = [m.step for m in client.get_metric_history(each.info.run_id, "val/loss")]
        assert len(steps) == len(set(steps)) == 300
    deviations = re.findall(r"alone: \d+ values, largest deviation (\S+)", output)
    assert len(deviations) == 3
