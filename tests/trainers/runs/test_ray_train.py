"""One worker without Ray Train: started again when it is lost, and no other process for it."""

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.state import list_actors

from cluster.base.errors import TrainingError
from cluster.connection.ray_internals import PREEMPTION_WATCHER_ENV_VAR, placement_groups
from trainers.runs import ray_train
from trainers.runs.ray_train import LoneWorkerError, WorkerConfig, fit


def config(folder: Path, **scale: Any) -> WorkerConfig:
    return WorkerConfig({"workload": "vision", "scale": scale}, folder, folder, folder.name)


def own_groups(state: str) -> list[Any]:
    job = ray.get_runtime_context().get_job_id()
    return [each for each in placement_groups() if (each.job_id, each.state) == (job, state)]


def loop(config: dict[str, Any]) -> tuple[bool, list[str], int]:
    """Is killed at its first starts; otherwise returns what there is of the job meanwhile."""
    starts = Path(config["starts"])
    with starts.open("a") as file:
        file.write("start\n")
    if len(starts.read_text().splitlines()) <= config["losses"]:
        os.kill(os.getpid(), signal.SIGKILL)
    job = ray.get_runtime_context().get_job_id()
    actors = list_actors(filters=[("job_id", "=", job), ("state", "=", "ALIVE")])
    alone = pickle.loads(config["worker_config"]).alone
    return alone, [actor.class_name for actor in actors], len(own_groups("CREATED"))


def mistaken(config: dict[str, Any]) -> None:
    with Path(config["starts"]).open("a") as file:
        file.write("start\n")
    raise TrainingError("a mistake")


@pytest.fixture
def starts(tmp_path: Path, ray_cluster: str) -> Path:
    return tmp_path / "starts"


def count(starts: Path) -> int:
    return len(starts.read_text().splitlines())


def test_a_lost_worker_is_started_again_and_is_the_only_process(
    starts: Path, tmp_path: Path
) -> None:
    more = {"starts": str(starts), "losses": 1}
    alone, actors, groups = fit(loop, config(tmp_path, max_restarts=1), more)
    assert alone
    assert (actors.count("TrainWorker"), groups) == (1, 1)
    assert "TrainController" not in actors
    assert count(starts) == 2
    assert own_groups("CREATED") == []


def test_a_worker_that_is_lost_too_often_ends_the_run(starts: Path, tmp_path: Path) -> None:
    more = {"starts": str(starts), "losses": 9}
    with pytest.raises(LoneWorkerError) as caught:
        fit(loop, config(tmp_path, max_restarts=1), more)
    assert isinstance(caught.value.worker_failures[0], ray.exceptions.RayActorError)
    assert count(starts) == 2
    assert own_groups("CREATED") == []


def test_a_mistake_is_not_tried_again(starts: Path, tmp_path: Path) -> None:
    with pytest.raises(LoneWorkerError, match="a mistake") as caught:
        fit(mistaken, config(tmp_path, max_restarts=3), {"starts": str(starts)})
    assert isinstance(caught.value.worker_failures[0], TrainingError)
    assert count(starts) == 1


@pytest.mark.parametrize(
    ("scale", "watcher"),
    [({"workers": 2}, "0"), ({"workers": [1, 1]}, "0"), ({"accelerator": "H100"}, "0"), ({}, "1")],
)
def test_others_are_started_by_ray_train(
    scale: dict[str, Any], watcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several workers, those that may become several, and machines that may be preempted."""
    monkeypatch.setenv(PREEMPTION_WATCHER_ENV_VAR, watcher)
    monkeypatch.setattr(ray_train, "_fit_alone", lambda *_: pytest.fail("without Ray Train"))

    class Trainer:
        def fit(self) -> Any:
            return type("Result", (), {"return_value": "by Ray Train"})

    monkeypatch.setattr(ray_train, "_ray_trainer", lambda *_: Trainer())
    assert fit(mistaken, config(tmp_path, **scale), {}) == "by Ray Train"


@pytest.mark.parametrize(("asked", "threads"), [("1", 1), ("3", 3), (None, None), ("", None)])
def test_workers_have_the_threads_that_the_user_asks_for(
    asked: str | None, threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert config(tmp_path).threads == threads
    # In a submitted job, it is Ray that has set the variable.
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert config(tmp_path).threads is None
