"""`heliostat train` as a user types it."""

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from safetensors.torch import load_file

from cluster.base.config import read_yaml
from trainers.data.dataset import prepare_dataset
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve

SPEC = """
workload: spirals:Spirals
data: {points: 2000}
train: {steps: 3000, evaluate_every_epochs: 5}
checkpoint: {every_steps: 500}
"""


@pytest.fixture
def client(mlflow_server: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(mlflow_server)


@pytest.fixture
def train_here(heliostat: Any, spirals_source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains `spirals:Spirals` in this process, without Ray, in a folder of the given name."""
    (heliostat.folder / "spirals.py").write_text(spirals_source)
    monkeypatch.chdir(heliostat.folder)
    monkeypatch.setattr(sys, "path", [str(heliostat.folder), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "spirals", raising=False)

    def train_in(name: str, data: dict[str, Any]) -> Path:
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # as a single worker on this machine has
        spec, workload = resolve(data, RunSpec)
        folder = heliostat.folder / "runs" / name
        train(spec, workload, prepare_dataset(workload, folder.parent), folder, NullReporter())
        torch.set_num_threads(threads)
        return folder

    return train_in


def test_an_interrupted_and_resumed_run_ends_with_the_same_weights(
    heliostat: Any, client: mlflow.MlflowClient, train_here: Any, spirals_source: str
) -> None:
    noisy = re.sub(
        r"(def build\(self\):\n)", r"\1        print('printed by the workload')\n", spirals_source
    )
    (heliostat.folder / "spirals.py").write_text(noisy)
    (heliostat.folder / "s.yaml").write_text(SPEC)
    process = heliostat.start("train", "s.yaml", "--name", "cut")
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "val/accuracy" in line:
            os.kill(process.pid, signal.SIGTERM)
            break
    seen.append(process.stdout.read())
    assert process.wait(600) == 130, "".join(seen)
    output = "".join(seen)
    assert "heliostat train --resume runs/cut" in output
    stopped = int(re.search(r"stopped after step (\d+) of 3000", output)[1])
    assert 0 < stopped < 3000
    run_id = re.search(r"MLflow run +(\w+)", output)[1]
    assert client.get_run(run_id).info.status == "KILLED"
    log = heliostat.folder / re.search(r"log: (\S+)", output)[1]
    assert "printed by the workload" not in output
    assert "printed by the workload" in log.read_text()

    shown = heliostat.in_a_terminal("train", "--resume", "runs/cut")
    assert run_id in shown
    assert "3000/3000 steps" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "pid=" not in shown, "Ray's chatter reached the terminal"
    assert "printed by the workload" not in shown
    assert client.get_run(run_id).info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3000

    whole = train_here("whole", read_yaml(heliostat.folder / "s.yaml"))
    weights = load_file(whole / "checkpoints" / "step-00003000" / "state-00000.safetensors")
    for name, weight in load_file(heliostat.folder / "runs/cut/model/model.safetensors").items():
        assert weights[f"model.{name}"].equal(weight), name


@pytest.mark.slow
def test_a_new_run_starts_from_the_checkpoint_of_another(
    heliostat: Any, client: mlflow.MlflowClient, train_here: Any
) -> None:
    short = {"workload": "spirals:Spirals", "train": {"steps": 20}}
    train_here("short", short)
    output = heliostat(
        *("train", "spirals:Spirals", "--set", "train.steps=40", "--from", "short"),
        *("--name", "long", "--set", "tracking.every_steps=1"),
    )
    run_id = re.search(r"MLflow run +(\w+)", output)[1]
    steps = [metric.step for metric in client.get_metric_history(run_id, "train/loss")]
    assert steps == list(range(21, 41))
    again = heliostat("train", "spirals:Spirals", "--name", "long", code=2)
    assert "--name long: " in again
    assert "already exists" in again
