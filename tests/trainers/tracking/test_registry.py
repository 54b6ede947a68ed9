"""A run's model in MLflow: it loads without Heliostat installed, and it can be registered."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import urllib.request
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

from cluster.base.config import write_yaml
from cluster.base.errors import SpecError
from trainers import load_model
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import export_model, refuse_pickles
from trainers.cli.track import register_command
from trainers.modeling.optimizer import build_optimizer
from trainers.run_folder import CHECKPOINTS, MODEL, SPEC, TRACKING
from trainers.spec import RunSpec, resolve
from trainers.tracking.registry import log_model, logged_models, register_model
from trainers.tracking.tracker import TrackedRun, Tracker

ELSEWHERE = """
import importlib.util, json, sys
from importlib.metadata import packages_distributions
from packaging.requirements import Requirement
from importlib.metadata import distribution

wanted, allowed = ["mlflow", *sys.argv[2].split()], set()
while wanted:
    requirement = Requirement(wanted.pop())
    name = requirement.name.lower().replace("_", "-")
    if name not in allowed:
        try:
            needs = distribution(name).requires or []
        except Exception:
            continue
        allowed.add(name)
        extra = {"extra": ""}
        wanted += [n for n in needs if (m := Requirement(n).marker) is None or m.evaluate(extra)]
owners = packages_distributions()

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        who = {d.lower().replace("_", "-") for d in owners.get(name.partition(".")[0], ())}
        if who and not who & {"heliostat", *allowed}:  # ours are those that the model brought
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ("cluster", "trainers", "tuning", "spirals"):
    assert importlib.util.find_spec(name) is None, name
sys.meta_path.insert(0, NotInstalled())
try:
    import ray
    raise SystemExit("ray should not be there")
except ModuleNotFoundError:
    pass

import mlflow, numpy
model = mlflow.pyfunc.load_model(sys.argv[1])
data = numpy.asarray(json.loads(sys.argv[3]), dtype=numpy.float32)
print(json.dumps(model.predict(data).tolist()))
"""


def export_spirals(folder: Path) -> torch.nn.Module:
    """Export a model of `spirals:Spirals` as that of the run in `folder`; returns its network."""
    data = {"workload": "spirals:Spirals", "model": {"width": 8, "dropout": 0.0}}
    spec, workload = resolve(data, RunSpec)
    network = workload.build()
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    checkpoints.save(7, network, build_optimizer(spec.optimizer, network))
    checkpoints.wait()
    checkpoint = checkpoints.latest()
    assert checkpoint is not None
    export_model(folder / MODEL, spec, workload, checkpoint)
    return network.eval()


@pytest.fixture
def tracked(
    own_folder: Path, tmp_path: Path, mlflow_server: str, wait_until: Callable[..., None]
) -> dict[str, Any]:
    """A finished run of a user's own workload: its folder, and the run as MLflow has it."""
    folder = tmp_path / "run"
    network = export_spirals(folder)
    write_yaml({"tracking": {"uri": mlflow_server, "experiment": "models"}}, folder / SPEC)
    tracker = Tracker(str(folder / TRACKING), mlflow_server, "models")
    tracker.start(TrackedRun("run", {"model.width": 8}, {"mlflow.source.git.commit": "abc"}))
    tracker.log_model("run", str(folder / MODEL))
    tracker.finish("run", "FINISHED")
    wait_until(lambda: tracker.pending()[0] == 0, lambda: str(tracker.pending()))
    found = tracker.read("run")
    tracker.close()
    return {**found, "folder": folder, "network": network}


def test_it_loads_without_heliostat(
    tracked: dict[str, Any], tmp_path: Path, mlflow_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a Python that has only MLflow, the model's requirements, and their dependencies."""
    mlflow.set_tracking_uri(mlflow_server)
    client = mlflow.MlflowClient(mlflow_server)
    command = Namespace(run=str(tracked["folder"]), name="spirals", alias="champion")
    assert register_command(command) == register_command(command) == 0
    assert (
        capsys.readouterr().out.splitlines()[-2:]
        == ["models:/spirals/1, champion: models:/spirals@champion"] * 2
    )
    uri = "models:/spirals@champion"

    files = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "files")))
    refuse_pickles(files)
    (model,) = client.search_logged_models([tracked["experiment_id"]])
    assert model.tags["mlflow.source.git.commit"] == "abc"
    assert (model.params, model.source_run_id) == ({"model.width": "8"}, tracked["run_id"])

    points = [[0.5, -0.25], [1.0, 2.0]]
    with torch.inference_mode():
        outputs = tracked["network"](torch.tensor(points)).numpy()
        assert np.array_equal(load_model(uri)(torch.tensor(points)).numpy(), outputs)
    needs = (files / "requirements.txt").read_text().split()
    assert not [line for line in needs if line.startswith("heliostat") or "+" in line]
    shown = subprocess.run(
        [sys.executable, "-S", "-c", ELSEWHERE, str(files), " ".join(needs), json.dumps(points)],
        cwd=tmp_path,
        # Without its .pth files, by which our own packages would be found.
        env={**os.environ, "PYTHONPATH": sysconfig.get_paths()["purelib"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert shown.returncode == 0, shown.stderr
    assert np.allclose(json.loads(shown.stdout.splitlines()[-1]), outputs, atol=1e-6)
    example = mlflow.pyfunc.load_model(str(files)).input_example
    assert np.asarray(example).shape == (1, 2)


def without_logged_models(client: mlflow.MlflowClient) -> mlflow.MlflowClient:
    """The client as its requests to a server of MLflow 2 end."""

    def search(*args: Any, **more: Any) -> Any:
        raise MlflowException("404 != 200", error_code=ENDPOINT_NOT_FOUND)

    client.search_logged_models = search
    return client


def test_a_server_without_logged_models_keeps_the_model_with_the_run(
    own_folder: Path, tmp_path: Path, mlflow_server: str
) -> None:
    """Once, also after a writer that was killed before the model was complete."""
    mlflow.set_tracking_uri(mlflow_server)
    client = without_logged_models(mlflow.MlflowClient(mlflow_server))
    network = export_spirals(tmp_path / "run")
    experiment = client.create_experiment("two")
    run_id = client.create_run(experiment).info.run_id
    saves: list[str] = []
    log_artifacts = client.log_artifacts

    def fails_once(run_id: str, local_dir: str, artifact_path: str) -> None:
        saves.append(artifact_path)
        log_artifacts(run_id, local_dir, artifact_path)
        if len(saves) == 1:
            raise ConnectionError("killed")

    client.log_artifacts = fails_once
    with pytest.raises(ConnectionError):
        log_model(client, run_id, tmp_path / "run" / MODEL)
    assert logged_models(client, client.get_run(run_id)) == {}
    for _ in range(2):
        log_model(client, run_id, tmp_path / "run" / MODEL)
    assert saves == ["model", "model"]
    uri = f"runs:/{run_id}/model"
    run = client.get_run(run_id)
    assert logged_models(client, run) == {uri: True}
    (told,) = json.loads(run.data.tags["mlflow.log-model.history"])
    assert (told["run_id"], told["artifact_path"]) == (run_id, "model")
    points = torch.tensor([[0.5, -0.25], [1.0, 2.0]])
    with torch.inference_mode():
        assert torch.equal(load_model(uri)(points), network(points))
        assert register_model(client, run_id, "two", "champion") == 1
        assert register_model(client, run_id, "two", "champion") == 1
        assert torch.equal(load_model("models:/two@champion")(points), network(points))


def test_mlflow_serves_it(
    tracked: dict[str, Any], mlflow_server: str, free_port: int, wait_until: Callable[..., None]
) -> None:
    points = [[0.5, -0.25], [1.0, 2.0]]
    url = f"http://127.0.0.1:{free_port}"
    command = ["-m", "mlflow", "models", "serve", "--env-manager", "local", "--port"]
    server = subprocess.Popen(
        [sys.executable, *command, str(free_port), "--model-uri", tracked["model_uri"]],
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": mlflow_server,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # it calls uvicorn
        },
        start_new_session=True,
    )

    def answers() -> bool:
        assert server.poll() is None, "the server ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ping", timeout=5) as pong:
            return pong.status == 200
        return False

    try:
        wait_until(answers)
        asked = urllib.request.Request(
            f"{url}/invocations",
            json.dumps({"inputs": points}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            predictions = json.load(answer)["predictions"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    with torch.inference_mode():
        outputs = tracked["network"](torch.tensor(points)).numpy()
    assert np.allclose(predictions, outputs, atol=1e-6)


def test_a_run_without_a_model_cannot_be_registered(tmp_path: Path, mlflow_server: str) -> None:
    write_yaml({"tracking": {"uri": mlflow_server}}, tmp_path / SPEC)
    (tmp_path / TRACKING).mkdir()
    (tmp_path / TRACKING / "spool.jsonl").touch()
    with pytest.raises(SpecError, match="not in MLflow yet"):
        register_command(Namespace(run=str(tmp_path), name="x", alias=None))
