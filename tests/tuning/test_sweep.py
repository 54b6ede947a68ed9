"""Sweeps on the real Ray Tune: killed drivers, failed trials, several workers, exploitation."""

import copy
import json
import math
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
import torch

from cluster.base.config import read_yaml, write_yaml
from cluster.base.errors import SpecError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import load_model
from trainers.checkpoints.state import load_model_weights
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve
from tuning import sweep as sweeps
from tuning.trials.journal import Journal
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


def value_by_best_yaml(sweep: Sweep, board: Leaderboard, folder: Path) -> float:
    """The metric of a training by `best.yaml`, at the step of the best trial's evaluation."""
    spec, workload = resolve(read_yaml(sweep.folder / "best.yaml"), RunSpec)
    values: dict[int, float] = {}

    class Recorder(NullReporter):
        def log_metrics(self, metrics: Any, step: int) -> None:
            if sweep.spec.metric in metrics:
                values[step] = metrics[sweep.spec.metric]

    before = torch.get_num_threads()
    torch.set_num_threads(spec.scale.threads or before)
    try:
        train(spec, workload, sweep.dataset, folder / "again", Recorder())
    finally:
        torch.set_num_threads(before)
    return values[board.best.step]


def test_every_trial_is_a_child_run_and_stopped_ones_say_so(
    run_sweep: Any, mlflow_server: str, tmp_path: Path
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
    exported = load_model(sweep.folder).eval()
    again = copy.deepcopy(exported)
    for parameter in again.parameters():
        parameter.data.zero_()
    load_model_weights(newest, again)
    assert all(map(torch.equal, exported.parameters(), again.parameters()))
    best, _ = resolve(read_yaml(sweep.folder / "best.yaml"), RunSpec)
    assert best.optimizer.lr == board.best.parameters["optimizer.lr"]
    assert best.sweep is None
    assert best.checkpoint.keep_best == 0, "a trial saves more than its spec says"
    assert value_by_best_yaml(sweep, board, tmp_path) == board.best.value


@pytest.mark.thorough
def test_a_grid_tries_every_combination_once(run_sweep: Any, mlflow_server: str) -> None:
    """Of a space with a condition, and with two data sets."""
    sweep, board, tracked = run_sweep(
        "sweep.search=grid",
        "sweep.scheduler.name=none",
        "train.epochs=1",
        "sweep.parameters={model.blocks: {choice: [[1], [1, 1]], when: {optimizer.name: sgd}}, "
        "optimizer.name: {choice: [sgd, adamw]}, data.val_fraction: {choice: [0.1, 0.5]}}",
    )
    paths = ("optimizer.name", "model.blocks", "data.val_fraction")
    tried = sorted(str([r.parameters.get(path) for path in paths]) for r in board.results)
    names = [["adamw", None], ["sgd", [1, 1]], ["sgd", [1]]]
    assert tried == [str([*name, fraction]) for name in names for fraction in (0.1, 0.5)]
    for result in board.results:
        spec, _ = resolve(sweep.trial_spec_data(result.parameters), RunSpec)
        samples = (1 - spec.data["val_fraction"] - spec.data["test_fraction"]) * 1797
        assert result.step == math.ceil(samples / 128)
        assert result.epoch == pytest.approx(128 * result.step / samples, rel=0.01)
    for child in children(mlflow_server, tracked["run_id"]):
        result = next(r for r in board.results if child.info.run_name.endswith(f"-{r.number:04d}"))
        assert float(child.data.params["data.val_fraction"]) == result.parameters[paths[2]]


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


@pytest.mark.slow
def test_pbt_continues_from_the_better_trials_weights(
    run_sweep: Any, mlflow_server: str, tmp_path: Path
) -> None:
    """Long enough for the first trial not to end before the others have begun."""
    sweep, board, tracked = run_sweep(
        "sweep.scheduler={name: pbt, every_epochs: 1}",
        "sweep.search=random",
        "sweep.trials=4",
        "sweep.concurrency=4",
        "train.epochs=30",
        "sweep.parameters={optimizer.lr: {loguniform: [1.0e-6, 1.0e-1]}}",
    )
    assert [s.complete for s in board.results] == [True] * 4
    journal = Journal(sweep.folder / "journal.jsonl")
    assert journal.changes, "no trial took over another one's weights"
    by_name = {run.info.run_name: run for run in children(mlflow_server, tracked["run_id"])}
    for result in board.results:
        run = by_name[f"{sweep.key}-{result.number:04d}"]
        assert result.parameters == journal.parameters_after(result.number)
        assert run.data.metrics["val/loss"] == result.value
        assert run.data.metrics["optimizer.lr"] == result.parameters["optimizer.lr"]
        note = run.data.tags["mlflow.note.content"]
        assert f"| optimizer.lr | {result.parameters['optimizer.lr']:.4g} |" in note
    assert not list((sweep.folder / "tune").rglob("checkpoint_*"))
    assert not list(sweep.folder.glob("trials/*/checkpoints/*taken*"))
    assert value_by_best_yaml(sweep, board, tmp_path) == board.best.value


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
        "sweep.search=gird": "sweep.search: must be 'auto', 'random', 'grid', 'bruteforce', 'qmc'",
        "sweep.metric=val/acuracy": (
            "sweep.metric: the workload has no val/acuracy; did you mean 'val/accuracy'?"
        ),
        "sweep.objective=[val/loss min, val/latency min]": (
            "sweep.objective: the workload has no val/latency"
        ),
        "sweep.constraints=[val/latency < 3]": "sweep.constraints: the workload has no val/latency",
        "sweep.enqueue=[{model.width: 5}]": "sweep: enqueue.0: model.width: 5 is not in the choice",
        "sweep.warm_start=[nothing]": "sweep.warm_start: nothing: no such run or sweep in",
        "sweep.metric=accuracy": "sweep: metric must be one of validation",
        "sweep=null": "sweep: ",
    }
    for override, message in cases.items():
        with pytest.raises(SpecError) as error:
            sweeps.new_sweep(str(spec), [override], None)
        assert str(error.value).startswith(message), override
        assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["off", "2"])
def test_a_mistake_of_all_trials_ends_the_sweep_which_goes_on_after_the_cure(
    fuse: str, heliostat: Any, mlflow_server: str, spirals_source: str
) -> None:
    """Then it gets two more trials, and a second seed for the best one."""
    source = heliostat.folder / "spirals.py"
    source.write_text(spirals_source.replace("F.cross_entropy", "F.cross_entropie"))
    (heliostat.folder / "s.yaml").write_text(f"""
workload: spirals:Spirals
train: {{epochs: 2, global_batch: 16}}
scale: {{max_restarts: 1}}
sweep:
  parameters: {{optimizer.lr: {{loguniform: [1.0e-4, 1.0e-1]}}}}
  search: random
  scheduler: {{name: none}}
  trials: 8
  concurrency: 2
  fuse: {fuse}
""")
    output = heliostat("sweep", "s.yaml", "--name", "s", code=1)
    folder = heliostat.folder / "runs" / "s"
    assert (
        "of the first trials failed alike: AttributeError: module 'torch.nn.functional'" in output
    )
    assert "once that is mended, continue with\n  heliostat sweep --resume runs/s" in output
    begun = Journal(folder / "journal.jsonl").parameters
    assert 3 <= len(begun) < 8
    run_id = re.search(r"MLflow run: (\w+)", output)[1]
    client = mlflow.MlflowClient(mlflow_server)
    assert client.get_run(run_id).info.status == "FAILED"
    assert "failed alike" in client.get_run(run_id).data.tags["heliostat.reason"]

    source.write_text(spirals_source)
    output = heliostat("sweep", "--resume", "runs/s", "--set", "sweep.trials=10")
    assert "failed" not in output
    assert client.get_run(run_id).info.status == "FINISHED"
    found = children(mlflow_server, run_id)
    assert {run.info.status for run in found} == {"FINISHED"}
    assert {run.data.tags.get("heliostat.reason", "") for run in found} == {""}
    journal = Journal(folder / "journal.jsonl")
    assert list(journal.parameters) == list(range(10))
    assert {number: journal.parameters[number] for number in begun} == begun
    assert all(end["complete"] for end in journal.ends.values())
    assert len(journal.ends) == 10

    again = ("--set", "sweep.repeat=2", "--set", "sweep.finalists=1")
    output = heliostat("sweep", "--resume", "runs/s", *again)
    assert "1 more trainings of the 1 best configurations" in output
    [(number, repeat)] = Journal(folder / "journal.jsonl").repeats.items()
    assert (number, repeat.parameters["train.seed"]) == (10, 1)
    values = [
        json.loads((folder / "trials" / f"{n:04d}" / "last.json").read_text())["val/loss"]
        for n in (repeat.of, number)
    ]
    assert values[0] != values[1]
    metrics = client.get_run(run_id).data.metrics
    assert metrics["best/val/loss"] == values[0]
    assert metrics["best/val/loss/mean"] == pytest.approx(sum(values) / 2)
    [run] = [r for r in children(mlflow_server, run_id) if r.data.params["train.seed"] == "1"]
    assert run.data.tags["heliostat.repeats"] == f"{repeat.of:04d}"


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["off", "2"])
def test_a_trial_and_then_the_sweep_are_stopped_by_hand(
    fuse: str, heliostat: Any, mlflow_server: str, spirals_source: str, wait_until: Wait
) -> None:
    (heliostat.folder / "spirals.py").write_text(spirals_source)
    (heliostat.folder / "s.yaml").write_text(f"""
workload: spirals:Spirals
train: {{epochs: 5000, global_batch: 16}}
sweep:
  parameters: {{optimizer.lr: {{loguniform: [1.0e-4, 1.0e-1]}}}}
  scheduler: {{name: none}}
  trials: 3
  concurrency: 2
  fuse: {fuse}
""")
    process = heliostat.start("sweep", "s.yaml", "--name", "s")
    trials = heliostat.folder / "runs" / "s" / "trials"
    wait_until(lambda: len(list(trials.glob("*/last.json"))) == 2)
    output = heliostat("stop", "s/0001")
    assert re.search(r"^s/0001: ended after \d+\.\d epochs$", output, re.MULTILINE), output
    wait_until(lambda: (trials / "0002" / "last.json").exists())
    assert {path.parent.name for path in trials.glob("*/ended.json")} == {"0001"}
    assert "s: stopped\n  resume it: heliostat sweep --resume runs/s" in heliostat("stop", "s")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 130, output
    run_id = re.search(r"MLflow run: (\w+)", output)[1]
    client = mlflow.MlflowClient(mlflow_server)
    assert client.get_run(run_id).info.status == "KILLED"
    stopped = [r for r in children(mlflow_server, run_id) if "heliostat.stopped" in r.data.tags]
    assert [run.data.tags["heliostat.stopped"] for run in stopped] == ["hand"]
    assert stopped[0].data.tags["mlflow.note.content"].startswith("**Stopped by hand** after ")


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["asha", "pbt"])
def test_heliostat_train_gives_the_value_of_best_yaml_to_the_last_bit(
    scheduler: str, heliostat: Any, mlflow_server: str, spirals_source: str
) -> None:
    (heliostat.folder / "spirals.py").write_text(spirals_source)
    (heliostat.folder / "s.yaml").write_text(f"""
workload: spirals:Spirals
model: {{width: 256}}
train: {{epochs: 24, global_batch: 40}}
sweep:
  parameters:
    optimizer.lr: {{loguniform: [1.0e-5, 1.0e-1]}}
    optimizer.name: {{choice: [adamw, sgd]}}
  scheduler: {{name: {scheduler}, every_epochs: 2}}
  fuse: off
  trials: 6
  concurrency: 3
""")
    heliostat("sweep", "s.yaml", "--name", "found")
    text = (heliostat.folder / "runs/found/best.yaml").read_text()
    stated = re.search(r"val/loss (\S+) at step (\d+)\.", text)
    output = heliostat("train", "runs/found/best.yaml", "--name", "again")
    run_id = re.search(r"MLflow run\s+(\w{32})", output)[1]
    history = mlflow.MlflowClient(mlflow_server).get_metric_history(run_id, "val/loss")
    values = {point.step: point.value for point in history}
    assert values[int(stated[2])] == float(stated[1])
