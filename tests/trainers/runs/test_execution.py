"""Runs on the real Ray Train: several workers, killed workers, mistakes in the user's code."""

import gc
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.base.errors import SpecError, TrainingError
from trainers import load_model
from trainers import run_folder as folders
from trainers.data.dataset import prepare_dataset
from trainers.outcome import Outcome
from trainers.runs.execution import run_to_end
from trainers.runs.run import Run, resolved_data, resumed_run
from trainers.spec import RunSpec, resolve

STEPS = 30

TINY = {
    "model": {"width": 4, "blocks": [1, 1], "dropout": 0.3},
    "train": {
        "steps": STEPS,
        "global_batch": 64,
        "precision": "fp64",
        "evaluate_every_epochs": 0.5,
    },
    "checkpoint": {"every_steps": 7},
    "tracking": {"every_steps": 1},
}

RECORDED = """
import errno
import os
import time
from pathlib import Path

from faulty import Faulty


class Recorded(Faulty):
    class Data(Faulty.Data):
        events: str = ""
        slow: int = -1
        outages: int = 0

    def augment(self, batch, random):
        failed = Path(self.data.events + ".failed")
        if self.data.outages and 18 * 64 in random.positions.tolist():
            with failed.open("a") as file:
                file.write("x")
            if len(failed.read_text()) <= self.data.outages:
                raise OSError(errno.ESTALE, "Stale file handle", "/data/images")
        with open(self.data.events, "a") as file:
            file.write(f"{os.getpid()}\\n")
        slept = Path(self.data.events + ".slept")
        if self.data.slow in random.positions.tolist() and not slept.exists():
            slept.touch()
            time.sleep(600)
        return super().augment(batch, random)
"""


@dataclass
class EndedRun:
    outcome: Outcome
    tracked: dict[str, Any]
    folder: Path
    losses: dict[int, float] = field(default_factory=dict)

    def weights(self) -> dict[str, Any]:
        return load_file(self.folder / "model" / "model.safetensors")


Runner = Callable[..., EndedRun]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def train(storage: Path, ray_cluster: str, mlflow_server: str) -> Runner:
    """Runs the tiny spec with some fields changed, to its end."""

    def runner(
        lines_shown: list[str] | None = None,
        workload: str = "faulty:Faulty",
        **sections: dict[str, Any],
    ) -> EndedRun:
        data: dict[str, Any] = {**TINY, "workload": workload, "storage": str(storage)}
        data["tracking"] = {**data["tracking"], "uri": mlflow_server}
        for name, values in sections.items():
            data[name] = {**data.get(name, {}), **values}
        spec, resolved = resolve(data, RunSpec)
        full = resolved_data(spec)
        folder = folders.create_run_folder(storage, folders.unique_name("tiny"), full)
        dataset = prepare_dataset(resolved, storage)
        one = Run(full, spec, resolved, dataset, folder)
        losses: dict[int, float] = {}

        def on_progress(step: int, points: list[Any], lines: list[str]) -> None:
            losses.update({point[2]: point[1] for point in points if point[0] == "train/loss"})
            if lines_shown is not None:
                lines_shown.extend(lines)

        outcome, tracked = run_to_end(one, on_progress, threading.Event())
        return EndedRun(outcome, tracked, folder, losses)

    return runner


@pytest.fixture(scope="module")
def one_worker(train: Runner) -> EndedRun:
    return train()


@pytest.fixture(scope="module")
def two_workers(train: Runner) -> EndedRun:
    return train(scale={"workers": 2})


def test_two_workers_give_the_losses_of_one(one_worker: EndedRun, two_workers: EndedRun) -> None:
    assert sorted(one_worker.losses) == sorted(two_workers.losses) == list(range(1, STEPS + 1))
    for step, loss in one_worker.losses.items():
        assert two_workers.losses[step] == pytest.approx(loss, rel=1e-9, abs=0)
    for name, value in one_worker.outcome.metrics.items():
        assert two_workers.outcome.metrics[name] == pytest.approx(value, rel=1e-9)


@pytest.fixture(scope="module")
def recorded(modules: Path) -> str:
    """A workload that does as `faulty` does, and writes its process into `data.events`."""
    (modules / "recorded.py").write_text(RECORDED)
    return "recorded:Recorded"


@pytest.mark.parametrize(("workers", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_worker_killed_in_mid_epoch_changes_no_result(
    train: Runner,
    request: pytest.FixtureRequest,
    recorded: str,
    tmp_path: Path,
    mlflow_server: str,
    workers: int,
    victim: int,
) -> None:
    """The weights are bit for bit the same, MLflow has each loss once, and one process is new."""
    import mlflow

    undisturbed = request.getfixturevalue("one_worker" if workers == 1 else "two_workers")
    marker, events = tmp_path / "killed", tmp_path / "events"
    fault = {"fault": "kill", "position": 18 * 64 + 40 * victim, "marker": str(marker)}
    data = {**fault, "events": str(events)}
    scale = {"workers": workers, "max_restarts": 1}
    killed = train(scale=scale, data=data, workload=recorded)
    assert marker.exists(), "no worker was killed"
    assert killed.outcome.complete
    for name, weight in undisturbed.weights().items():
        assert killed.weights()[name].equal(weight), name
    client = mlflow.MlflowClient(mlflow_server)
    history = client.get_metric_history(killed.tracked["run_id"], "train/loss")
    assert [metric.step for metric in history] == list(range(1, STEPS + 1))
    assert {m.step: m.value for m in history} == undisturbed.losses
    assert len(set(events.read_text().split())) == workers + 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_outage_is_restarted_and_changes_no_result(
    train: Runner,
    request: pytest.FixtureRequest,
    recorded: str,
    tmp_path: Path,
    workers: int,
) -> None:
    """A file server that does not answer twice, where two restarts are allowed."""
    undisturbed = request.getfixturevalue("one_worker" if workers == 1 else "two_workers")
    lines: list[str] = []
    data = {"events": str(tmp_path / "events"), "outages": 2}
    ended = train(lines, recorded, scale={"workers": workers, "max_restarts": 2}, data=data)
    assert (tmp_path / "events.failed").read_text() == "xxx"
    for name, weight in undisturbed.weights().items():
        assert ended.weights()[name].equal(weight), name
    told = [line for line in lines if "Stale file handle: '/data/images'" in line]
    assert len(told) == 2
    assert re.fullmatch(r"worker 0 failed: OSError: .* \(\S*recorded\.py:\d+\)", told[0])


def test_an_outage_that_stays_ends_the_run_with_the_reason(
    train: Runner, recorded: str, tmp_path: Path
) -> None:
    data = {"events": str(tmp_path / "events"), "outages": 9}
    with pytest.raises(TrainingError) as caught:
        train(workload=recorded, scale={"max_restarts": 1}, data=data)
    assert re.fullmatch(
        r"OSError: \[Errno 116\] Stale file handle: '/data/images' \(\S*recorded.py:\d+\); it "
        r"failed too often \(scale\.max_restarts\)",
        str(caught.value),
    )
    assert (tmp_path / "events.failed").read_text() == "xx"


@pytest.mark.slow
def test_a_worker_that_does_not_stop_after_a_loss_is_replaced_too(
    train: Runner, two_workers: EndedRun, recorded: str, tmp_path: Path
) -> None:
    marker, events = tmp_path / "killed", tmp_path / "events"
    fault = {"fault": "kill", "position": 18 * 64 + 40, "marker": str(marker)}
    data = {**fault, "events": str(events), "slow": 18 * 64}
    killed = train(scale={"workers": 2, "max_restarts": 1}, data=data, workload=recorded)
    for name, weight in two_workers.weights().items():
        assert killed.weights()[name].equal(weight), name
    assert len(set(events.read_text().split())) == 4


def test_a_worker_lost_too_often_ends_the_run(train: Runner, tmp_path: Path) -> None:
    fault = {"fault": "kill", "position": 3 * 64, "marker": str(tmp_path / "killed")}
    with pytest.raises(TrainingError, match="worker 0 was lost too often"):
        train(data=fault, scale={"max_restarts": 0})


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_with_its_stack_and_changes_no_result(
    train: Runner, two_workers: EndedRun, tmp_path: Path
) -> None:
    """Worker 1 hangs in the same step of two starts; no restart is left, and the run is resumed."""
    lines: list[str] = []

    def failure() -> str:
        fault = {"fault": "hang", "position": 18 * 64 + 40, "marker": str(tmp_path / "hung")}
        scale = {"workers": 2, "max_restarts": 1}
        with pytest.raises(TrainingError) as caught:
            train(lines, scale=scale, data=fault, train={"stall_timeout_s": 5})
        return str(caught.value)

    pattern = r"worker 1 made no step for 5 s at step 19; its stack: (\S+/stalls/worker-1-\d.txt)"
    last = re.fullmatch(pattern + r"; it was lost too often \(scale.max_restarts\)", failure())
    first = next(match for line in lines if (match := re.fullmatch(pattern, line)))
    stacks = [Path(match[1]).read_text() for match in (first, last)]
    assert "in sleeps\n" in stacks[0]
    assert "in holds_the_interpreter\n" in stacks[1]

    gc.collect()  # the failed run's tracker ends with its last handle
    folder = Path(last[1]).parents[1]
    again = resumed_run(str(folder), Path("runs"), [])
    done = EndedRun(*run_to_end(again, lambda *_: None, threading.Event()), folder)
    for name, weight in two_workers.weights().items():
        assert done.weights()[name].equal(weight), name


def test_mlflow_has_the_whole_run(two_workers: EndedRun, mlflow_server: str) -> None:
    import mlflow

    client = mlflow.MlflowClient(mlflow_server)
    found = client.get_run(two_workers.tracked["run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["optimizer.lr"] == "0.001"
    assert found.data.params["train.steps"] == str(STEPS)
    assert found.data.params["model.blocks"] == "[1, 1]"
    assert found.data.metrics["test/accuracy"] == two_workers.outcome.metrics["test/accuracy"]
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"spec.yaml", "environment.json"} <= names
    assert two_workers.tracked["model_uri"].startswith("models:/m-")


def test_mlflow_has_the_trained_model(
    two_workers: EndedRun, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(mlflow_server)
    uri = two_workers.tracked["model_uri"]
    network = load_model(uri)
    for name, weight in two_workers.weights().items():
        assert network.state_dict()[name].equal(weight)
    images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 1, 8, 8)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    served = mlflow.pyfunc.load_model(uri)
    assert served.metadata.signature.inputs.to_dict()[0]["tensor-spec"]["dtype"] == "uint8"
    assert np.array_equal(served.predict(images), expected)


@pytest.mark.slow
def test_an_elastic_run_takes_as_many_workers_as_fit(train: Runner, one_worker: EndedRun) -> None:
    """On four CPUs, [2, 6] workers are four; each step has the 64 samples of one worker's step."""
    elastic = train(scale={"workers": [2, 6]})
    for step, loss in one_worker.losses.items():
        assert elastic.losses[step] == pytest.approx(loss, rel=1e-9, abs=0)


def test_a_mistake_that_only_a_worker_can_find_is_a_spec_error(train: Runner) -> None:
    with pytest.raises(SpecError, match=r"^train\.precision: fp8 needs the package torchao"):
        train(train={"precision": "fp8"})


def test_a_mistake_in_the_users_code_ends_the_run_at_once_with_its_line(
    train: Runner, storage: Path, mlflow_server: str
) -> None:
    import mlflow

    began = time.time()
    with pytest.raises(TrainingError, match=r"KeyError: 'no such feature' \(.*faulty.py:\d+\)"):
        train(data={"fault": "raise", "position": 3 * 64}, tracking={"experiment": "mistakes"})
    (log,) = (each for each in storage.glob("*/ray.log") if each.stat().st_mtime > began)
    assert re.search(
        r'Traceback .*File "\S*faulty.py", line \d+, in augment\n +raise KeyError\(.*'
        r"KeyError: 'no such feature'",
        log.read_text(),
        re.DOTALL,
    )
    client = mlflow.MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("mistakes").experiment_id
    failed = client.search_runs([experiment], "attributes.status = 'FAILED'", max_results=1)[0]
    assert "no such feature" in failed.data.tags["heliostat.reason"]


def test_resuming_a_finished_run_only_reads_it(two_workers: EndedRun, ray_cluster: str) -> None:
    again = resumed_run(str(two_workers.folder), Path("runs"), [])
    outcome, tracked = run_to_end(again, lambda *_: None, threading.Event())
    assert outcome.complete
    assert outcome.step == STEPS
    assert tracked["run_id"] == two_workers.tracked["run_id"]
    assert tracked["model_uri"] == two_workers.tracked["model_uri"]


def test_fields_that_change_the_result_cannot_be_set_on_resume(one_worker: EndedRun) -> None:
    with pytest.raises(SpecError, match=r"--set train\.seed=1: cannot change in a resumed run"):
        resumed_run(str(one_worker.folder), Path("runs"), ["train.seed=1"])
