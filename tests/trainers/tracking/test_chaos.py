"""MLflow's server and the writer are killed at random times: MLflow has every metric once."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.thorough

STEPS = 2500
WRITER = f"""
import sys, time
from trainers.tracking.operation_log import now_ms
from trainers.tracking.tracker import TrackedRun, Tracker

folder, uri, run = sys.argv[1:]
tracker = Tracker(folder, uri, "chaos", wait_s=60)
tracker.start(TrackedRun(run, {{"optimizer.lr": 0.1}}, {{"kind": "chaos"}}))
for step in range({STEPS}):  # a new writer gets all steps again
    rows = [(name, step / 7, step, now_ms()) for name in ("train/loss", "val/loss")]
    tracker.log(run, rows, step)
tracker.finish(run, "FINISHED")
while tracker.pending()[0]:
    time.sleep(0.05)
"""
EVENTS = st.lists(
    st.tuples(st.sampled_from(["server", "writer"]), st.floats(0, 0.95), st.floats(0, 0.3)),
    min_size=2,
    max_size=4,
)
"""(Victim, share of the metrics sent before the kill, additional delay in seconds)."""


class Server:
    """MLflow on SQLite, which can be killed and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from trainers.tracking.mlflow_store import create_database

    folder = tmp_path_factory.mktemp("chaos")
    # A server that is killed while it creates its database leaves a broken one.
    create_database(f"sqlite:///{folder}/mlflow.db")
    server = Server(folder)
    yield server
    server.kill()


numbers = itertools.count()


def progress(folder: Path) -> float:
    """The share of all metrics that were sent, by the writer's record."""
    sent, spool = folder / "sent", folder / "spool.jsonl"
    whole = 2 * STEPS * 45  # bytes, about
    return int(sent.read_text()) / max(whole, spool.stat().st_size) if sent.exists() else 0.0


def test_each_killed_once(
    server: Server, tmp_path_factory: pytest.TempPathFactory, wait_until: Callable[..., None]
) -> None:
    survives([("writer", 0.2, 0.1), ("server", 0.5, 0.1)], server, tmp_path_factory, wait_until)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(EVENTS)
def test_killed_at_any_time(
    server: Server,
    tmp_path_factory: pytest.TempPathFactory,
    wait_until: Callable[..., None],
    events: list[tuple[str, float, float]],
) -> None:
    survives(events, server, tmp_path_factory, wait_until)


def survives(
    events: list[tuple[str, float, float]],
    server: Server,
    tmp_path_factory: pytest.TempPathFactory,
    wait_until: Callable[..., None],
) -> None:
    """Kill the victims of `events` in turn while a run is written: MLflow has it once."""
    folder, run = tmp_path_factory.mktemp("spool"), f"chaos-{next(numbers)}"

    def write() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", WRITER, str(folder), server.uri, run]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    writer = write()
    try:
        for victim, share, delay_s in sorted(events, key=lambda event: event[1]):
            wait_until(lambda share=share: progress(folder) >= share)
            time.sleep(delay_s)
            if victim == "server":
                server.kill()
                server.start()
            else:
                writer.kill()
                assert writer.wait() in (-signal.SIGKILL, 0)
                writer = write()
        assert writer.wait(600) == 0
    finally:
        writer.kill()
    client = mlflow.MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("chaos").experiment_id
    (found,) = client.search_runs([experiment], f"tags.`heliostat.key` = '{run}'")
    assert found.data.params == {"optimizer.lr": "0.1"}
    assert (found.info.status, found.data.tags["kind"]) == ("FINISHED", "chaos")
    for name in ("train/loss", "val/loss"):
        stored = client.get_metric_history(found.info.run_id, name)
        wanted = Counter((step, step / 7) for step in range(STEPS))
        assert Counter((metric.step, metric.value) for metric in stored) == wanted
