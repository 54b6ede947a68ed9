"""Sweeps on the real Ray Tune: killed drivers, failed trials, several workers, exploitation."""

import os
import pickle
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from cluster.base.config import read_yaml, write_yaml
from cluster.base.errors import SpecError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.spec import RunSpec, resolve
from tuning import sweep as sweeps
from tuning.trials.leaderboard import Leaderboard
from tuning.trials.trial import Sweep

Wait = Callable[..., None]

TINY: dict[str, Any] = {
    "workload": "faulty:Faulty",
    "model": {"width": 4, "blocks": [1], "augment": 0.0},
    "train": {"epochs": 4, "global_batch": 128},
    "sweep": {
        "parameters": {
            "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
            "model.width": {"choice": [4, 8]},
        },
        "metric": "val/loss",
        "mode": "min",
        "trials": 6,
        "concurrency": 2,
    },
    "tracking": {"every_steps": 1},
}


@pytest.fixture
def run_sweep(
    tmp_path: Path, ray_cluster: str, mlflow_server: str
) -> Callable[..., tuple[Sweep, Leaderboard, dict[str, Any]]]:
    """Runs the tiny sweep, with some fields changed, to its end."""

    def runner(*overrides: str) -> tuple[Sweep, Leaderboard, dict[str, Any]]:
        spec = tmp_path / "tiny.yaml"
        write_yaml({**TINY, "storage": str(tmp_path)}, spec)
        tracking = f"tracking.uri={mlflow_server}"
        sweep = sweeps.new_sweep(str(spec), [tracking, *overrides], None)
        board, tracked = sweeps.run_to_end(sweep, lambda *_: None)
        return sweep, board, tracked

    return runner


def children(uri: str, run_id: str) -> list[Any]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_run(run_id).info.experiment_id
    return list(client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'"))


def test_every_trial_is_a_child_run_and_stopped_ones_say_so(
    run_sweep: Any, mlflow_server: str
) -> None:
    sweep, board, tracked = run_sweep("sweep.trials=8", "sweep.scheduler.reduction=2")
    found = children(mlflow_server, tracked["run_id"])
    assert sorted(run.data.tags["mlflow.runName"] for run in found) == [
        f"{sweep.key}-{number:04d}" for number in range(8)
    ]
    assert {run.info.status for run in found} == {"FINISHED"}
    stopped = {r.data.tags["mlflow.runName"] for r in found if "heliostat.stopped" in r.data.tags}
    by_board = {f"{sweep.key}-{s.number:04d}" for s in board.results if not s.complete}
    assert stopped == by_board
    assert stopped, "asha stopped none of eight trials"
    for run in found:
        result = next(s for s in board.results if f"{s.number:04d}" == run.info.run_name[-4:])
        assert float(run.data.params["optimizer.lr"]) == result.parameters["optimizer.lr"]
        assert run.data.metrics["val/loss"] == result.value
        assert f"| val/loss | {result.value:.4g} |" in run.data.tags["mlflow.note.content"]
    assert tracked["status"] == "FINISHED"
    assert tracked["metrics"]["best/val/loss"] == board.best.value
    parent = mlflow.MlflowClient(mlflow_server).get_run(tracked["run_id"])
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("8 of 8 trials have ended, 0 of them failed.")
    assert f"| {board.best.number:04d} | {board.best.value:.4g} |" in note
    assert sum(board.importances.values()) == pytest.approx(1)
    newest = Checkpoints(sweep.trial_folder(board.best.number) / "checkpoints").latest()
    assert newest is not None
    assert newest.name == f"step-{board.best.step:08d}"
    best, _ = resolve(read_yaml(sweep.folder / "best.yaml"), RunSpec)
    assert best.optimizer.lr == board.best.parameters["optimizer.lr"]
    assert best.sweep is None
    assert best.checkpoint.keep_best == 0, "a trial saves more than its spec says"


@pytest.mark.thorough
def test_a_grid_tries_every_combination_once(run_sweep: Any) -> None:
    _, board, _ = run_sweep(
        "sweep.search=grid",
        "sweep.scheduler.name=none",
        "train.epochs=1",
        "sweep.parameters={optimizer.lr: {choice: [0.001, 0.01]}, model.blocks: "
        "{choice: [[1], [1, 1]]}}",
    )
    tried = sorted(
        (s.parameters["optimizer.lr"], s.parameters["model.blocks"]) for s in board.results
    )
    assert tried == [(0.001, [1]), (0.001, [1, 1]), (0.01, [1]), (0.01, [1, 1])]


@pytest.mark.thorough
def test_a_failed_trial_has_its_reason_in_a_line_and_the_others_continue(
    run_sweep: Any, mlflow_server: str
) -> None:
    _, board, tracked = run_sweep(
        "data.fault=nan",
        "data.position=640",
        "sweep.search=grid",
        "train.epochs=null",
        "train.steps=8",
        "sweep.parameters={train.global_batch: {choice: [64, 128]}}",
    )
    assert list(board.failed) == [1]
    assert board.failed[1].startswith("the loss is nan at step 6 (the last finite one was ")
    assert [s.number for s in board.results] == [0]
    by_name = {r.info.run_name[-4:]: r for r in children(mlflow_server, tracked["run_id"])}
    assert by_name["0001"].info.status == "FAILED"
    assert by_name["0001"].data.tags["heliostat.reason"] == board.failed[1]
    assert by_name["0000"].info.status == "FINISHED"


@pytest.mark.slow
def test_trials_of_two_workers(run_sweep: Any, mlflow_server: str) -> None:
    _, board, tracked = run_sweep("scale.workers=2", "sweep.trials=1", "sweep.scheduler.name=none")
    assert [s.complete for s in board.results] == [True]
    for run in children(mlflow_server, tracked["run_id"]):
        assert run.data.params["scale.workers"] == "2"
        assert "train/loss" in run.data.metrics


@pytest.mark.thorough
def test_pbt_continues_from_the_better_trials_weights(run_sweep: Any) -> None:
    """Long enough for the first trial not to end before the others have begun."""
    sweep, board, _ = run_sweep(
        "sweep.scheduler={name: pbt, every_epochs: 1}",
        "sweep.search=random",
        "sweep.trials=4",
        "sweep.concurrency=4",
        "train.epochs=30",
        "sweep.parameters={optimizer.lr: {loguniform: [1.0e-6, 1.0e-1]}}",
    )
    assert [s.complete for s in board.results] == [True] * 4
    assert (sweep.folder / "tune").exists()
    policies = list((sweep.folder / "tune").glob("pbt_policy_*.txt"))
    assert policies, "no trial took over another one's weights"


@pytest.mark.thorough
def test_a_sweep_whose_driver_was_killed_is_resumed_with_exactly_its_trials(
    heliostat: Any, mlflow_server: str, spirals_source: str, wait_until: Wait
) -> None:
    (heliostat.folder / "spirals.py").write_text(spirals_source)
    (heliostat.folder / "s.yaml").write_text("""
workload: spirals:Spirals
train: {epochs: 20, global_batch: 16}
sweep:
  parameters: {optimizer.lr: {loguniform: [1e-4, 1e-1]}}
  metric: val/accuracy
  mode: max
  scheduler: {name: none}
  trials: 8
  concurrency: 2
""")
    process = heliostat.start("sweep", "s.yaml", "--name", "cut")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    folder = heliostat.folder / "runs" / "cut"
    ended = "trials/*/ended.json"
    wait_until(lambda: len(list(folder.glob(ended))) >= 3, lambda: "".join(lines))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("trials/*/checkpoints/*")}
    done = {path.parent.name for path in folder.glob(ended)}
    # The searcher of the version before the rooms, in a module that is no longer there.
    (folder / "tune" / "tuner.pkl").write_bytes(b"ctuning.search\nJournaledSearch\n.")

    output = heliostat("sweep", "--resume", "runs/cut")
    run_id = re.search(r"MLflow run: (\w+)", output)[1]
    found = children(mlflow_server, run_id)
    assert sorted(run.info.run_name for run in found) == [f"cut-{n:04d}" for n in range(8)]
    assert {run.info.status for run in found} == {"FINISHED"}
    client = mlflow.MlflowClient(mlflow_server)
    for run in found:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "val/accuracy")]
        assert len(steps) == len(set(steps)) == 20
    again = {
        path: path.stat().st_mtime_ns
        for path in before
        if path.parent.parent.name in done and path.exists()
    }
    assert again == {path: before[path] for path in again}, "a finished trial was trained again"
    assert len(again) >= 3


@pytest.mark.thorough
def test_ctrl_c_keeps_the_sweep_and_says_how_to_resume_it(
    heliostat: Any, mlflow_server: str, spirals_source: str, wait_until: Wait
) -> None:
    """By SIGTERM, which has the same effect on Ray Tune as Ctrl-C."""
    (heliostat.folder / "spirals.py").write_text(spirals_source)
    (heliostat.folder / "s.yaml").write_text("""
workload: spirals:Spirals
train: {epochs: 200, global_batch: 16}
sweep: {parameters: {optimizer.lr: {loguniform: [1e-4, 1e-1]}}, trials: 2, concurrency: 2}
""")
    process = heliostat.start("sweep", "s.yaml", "--name", "cut")
    folder = heliostat.folder / "runs" / "cut"
    wait_until(lambda: len(list(folder.glob("trials/*/last.json"))) == 2)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 130, output
    assert "heliostat sweep --resume runs/cut" in output
    run_id = re.search(r"MLflow run: (\w+)", output)[1]
    assert mlflow.MlflowClient(mlflow_server).get_run(run_id).info.status == "KILLED"


def test_tunes_state_of_earlier_sweeps_can_be_read() -> None:
    """It has this function, by the module and name of the version before the rooms."""
    folder_name = pickle.loads(b"ctuning.sweep\n_folder_name\n.")
    trial = SimpleNamespace(config={"trial": 7}, trial_id="abc")
    assert folder_name(trial) == "trial-0007-abc"


def test_bad_sweeps_name_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modules: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = tmp_path / "tiny.yaml"
    write_yaml(TINY, spec)
    cases = {
        "sweep.parameters={optimizer.lrr: {uniform: [0, 1]}}": (
            "sweep.parameters.optimizer.lrr: optimizer.lrr: unknown key; did you mean 'lr'?"
        ),
        "sweep.parameters={optimizer.lr: {uniform: [-1, 1]}}": (
            "sweep.parameters.optimizer.lr: optimizer.lr: must be greater than 0 (got -1.0)"
        ),
        "sweep.parameters={optimizer.lr: {uniform: [1, 0]}}": (
            "sweep.parameters.optimizer.lr: uniform must be [low, high] with low <= high"
        ),
        "sweep.search=gird": "sweep.search: must be 'random', 'grid', 'tpe' or 'cmaes' (got",
        "sweep.metric=accuracy": "sweep: metric must be one of validation",
        "sweep=null": "sweep: ",
    }
    for override, message in cases.items():
        with pytest.raises(SpecError) as error:
            sweeps.new_sweep(str(spec), [override], None)
        assert str(error.value).startswith(message), override
        assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "tiny").exists()
