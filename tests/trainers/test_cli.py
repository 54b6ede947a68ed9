"""`heliostat train` as a user types it."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import mlflow
import pytest
from safetensors.torch import load_file

SPEC = """
workload: spirals:Spirals
data: {points: 2000}
train: {steps: 3000, evaluate_every: 5}
checkpoint: {every_steps: 500}
"""


@pytest.fixture
def client(mlflow_server: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(mlflow_server)


def test_interrupted_and_resumed_is_as_if_nothing_had_been(
    heliostat: Any, client: mlflow.MlflowClient, spirals_source: str
) -> None:
    (heliostat.folder / "spirals.py").write_text(spirals_source)
    (heliostat.folder / "s.yaml").write_text(SPEC)
    process = heliostat.start("train", "s.yaml", "--name", "cut")
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "val/accuracy" in line:
            os.kill(process.pid, signal.SIGINT)
            break
    seen.append(process.stdout.read())
    assert process.wait(60) == 130, "".join(seen)
    output = "".join(seen)
    assert "heliostat train --resume runs/cut" in output
    stopped = int(re.search(r"stopped after step (\d+) of 3000", output)[1])
    assert 0 < stopped < 3000
    run_id = re.search(r"MLflow run +(\w+)", output)[1]
    assert client.get_run(run_id).info.status == "KILLED"

    assert run_id in heliostat("train", "--resume", "runs/cut")
    assert client.get_run(run_id).info.status == "FINISHED"
    steps = [m.step for m in client.get_metric_history(run_id, "train/loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 3000

    heliostat("train", "s.yaml", "--name", "whole")
    whole, cut = (
        load_file(heliostat.folder / "runs" / name / "model" / "model.safetensors")
        for name in ("whole", "cut")
    )
    assert all(whole[name].equal(cut[name]) for name in whole)


def test_a_new_run_starts_from_anothers_checkpoint(heliostat: Any, spirals_source: str) -> None:
    (heliostat.folder / "spirals.py").write_text(spirals_source)
    short = ("train", "spirals:Spirals", "--set", "train.steps=20", "--name", "short")
    heliostat(*short)
    output = heliostat(
        *("train", "spirals:Spirals", "--set", "train.steps=40"),
        *("--from", "short", "--name", "long", "--set", "tracking.every_steps=1"),
    )
    assert "step-00000040" in output
    folder = heliostat.folder / "runs" / "long" / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"step-00000040", "step-00000020"}
    assert "runs/short is there already" in heliostat(*short, code=2)


def test_the_log_holds_what_the_terminal_does_not_show(heliostat: Any, spirals_source: str) -> None:
    noisy = spirals_source.replace("def build(self)", "def build(self)", 1)
    noisy = re.sub(
        r"(def build\(self\)[^\n]*:\n)", r"\1        print('printed by the workload')\n", noisy
    )
    (heliostat.folder / "spirals.py").write_text(noisy)
    output = heliostat("train", "spirals:Spirals", "--set", "train.steps=5", "--name", "n")
    log = Path(re.search(r"log: (\S+)", output)[1])
    assert "printed by the workload" not in output
    assert "printed by the workload" in (heliostat.folder / log).read_text()
