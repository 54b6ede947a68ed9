"""A real server of MLflow 2, which many teams have: nothing is lost, a line says what differs."""

import os
import signal
import subprocess
import sys
import venv
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from filelock import FileLock

from cluster.base.config import write_yaml
from cluster.base.files import cache_folder
from tests.trainers.tracking.test_registry import export_spirals
from trainers import load_model
from trainers.cli.track import register_command
from trainers.run_folder import MODEL, SPEC, TRACKING
from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.preflight import check_access, notices
from trainers.tracking.tracker import TrackedRun, Tracker

VERSION = "2.22.4"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def old_mlflow() -> Path:
    """The Python of a virtual environment with MLflow 2, made once for this machine."""
    folder = cache_folder() / f"mlflow-{VERSION}"
    python, complete = folder / "bin" / "python", folder / "complete"
    with FileLock(f"{folder}.lock"):
        if not complete.exists():
            venv.create(folder, with_pip=True, clear=True)
            command = [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                f"mlflow=={VERSION}",
                "sqlalchemy<2.1",
            ]
            installed = subprocess.run(command, capture_output=True, text=True, check=False)
            if installed.returncode:
                reason = (installed.stderr.strip().splitlines() or ["no reason given"])[-1]
                pytest.skip(f"needs mlflow=={VERSION}, which pip cannot install: {reason}")
            complete.touch()
    return python


@pytest.fixture(scope="module")
def old_server(
    old_mlflow: Path, tmp_path_factory: pytest.TempPathFactory, wait_until: Callable[..., None]
) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("old"), 5222
    command = [old_mlflow, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    log = folder / "log"
    # Without our own packages and its successor's, of which PYTHONPATH may tell.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{old_mlflow.parent}:{environment['PATH']}"  # it calls gunicorn
    with log.open("w") as file:
        server = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    uri = f"http://127.0.0.1:{port}"
    wait_until(lambda: check_access(uri, "old") is None, log.read_text)
    yield uri
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_everything_is_kept(
    old_server: str, own_folder: Path, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """Metrics, status, long texts and files; the model among the artifacts of its run."""
    (line,) = notices(old_server, "old")
    assert f"is {VERSION}: a model is kept among the artifacts" in line
    folder = tmp_path / "mine"
    network = export_spirals(folder)
    tracking = {"uri": old_server, "experiment": "old"}
    write_yaml({"workload": "spirals:Spirals", "tracking": tracking}, folder / SPEC)
    tracker = Tracker(str(folder / TRACKING), old_server, "old")
    tracker.start(TrackedRun("mine", {"optimizer.lr": 0.1, "long": "x" * 7000}, {"k": "v"}))
    tracker.log_artifact("mine", str(folder / SPEC))
    rows = [MetricPoint("loss", 1 / (1 + step), step, 1_700_000_000_000) for step in range(1500)]
    tracker.log("mine", [*rows, MetricPoint("loss", float("inf"), 1500, 1_700_000_000_000)], 1501)
    tracker.log_model("mine", str(folder / MODEL))
    tracker.start(TrackedRun("mine/0000", {"optimizer.lr": 0.2}, parent="mine"))
    tracker.finish("mine/0000", "FAILED", {"heliostat.reason": "y" * 9000})
    tracker.finish("mine", "FINISHED")
    wait_until(lambda: tracker.pending()[0] == 0, lambda: str(tracker.pending()))
    found, trial = tracker.read("mine"), tracker.read("mine/0000")
    assert tracker.refused() is None
    tracker.close()

    mlflow.set_tracking_uri(old_server)
    client = mlflow.MlflowClient(old_server)
    run = client.get_run(found["run_id"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine")
    assert (trial["status"], trial["model_uri"]) == ("FAILED", None)
    history = client.get_metric_history(found["run_id"], "loss")
    assert [point.value for point in history] == [*(row.value for row in rows), sys.float_info.max]
    files = {file.path for file in client.list_artifacts(found["run_id"])}
    assert files == {"model", "parameters", "spec.yaml"}
    assert found["model_uri"] == f"runs:/{found['run_id']}/model"

    points = [[0.5, -0.25], [1.0, 2.0]]
    with torch.inference_mode():
        outputs = network(torch.tensor(points)).numpy()
        assert np.array_equal(load_model(found["model_uri"])(torch.tensor(points)), outputs)
    command = Namespace(run=str(folder), name="spirals", alias="champion")
    assert register_command(command) == register_command(command) == 0
    pyfunc = mlflow.pyfunc.load_model("models:/spirals@champion")
    assert np.allclose(pyfunc.predict(np.float32(points)), outputs, atol=1e-6)
    assert len(client.search_model_versions("name = 'spirals'")) == 1


def test_a_model_is_found_by_an_old_client(old_server: str, old_mlflow: Path) -> None:
    """On the pages of MLflow 2, too, which read the run's history of models."""
    code = f"""
import json, mlflow
client = mlflow.MlflowClient({old_server!r})
experiment = client.get_experiment_by_name("old").experiment_id
(run,) = client.search_runs([experiment], "tags.`heliostat.key` = 'mine'")
(model,) = json.loads(run.data.tags["mlflow.log-model.history"])
print(model["artifact_path"], sorted(model["flavors"]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(old_mlflow), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "model ['python_function']\n"


def test_a_run_from_the_command_line(old_server: str, heliostat: Any) -> None:
    output = heliostat(
        *("train", "digits", "--set", f"tracking.uri={old_server}", "--set", "train.steps=20")
    )
    assert f"MLflow at {old_server} is {VERSION}" in output
    assert "runs:/" in output
    assert "not yet" not in output
