"""The one writer to MLflow: nothing lost, nothing twice, nobody kept waiting."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.spool import Row, Spool, batches
from trainers.track import TrackedRun, Tracker

Wait = Callable[..., None]


@pytest.fixture
def client(mlflow_server: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(mlflow_server)


def rows(steps: range, name: str = "train/loss") -> list[Row]:
    return [(name, step / 7, step, 1_700_000_000_000 + step) for step in steps]


def drained(tracker: Tracker, wait_until: Wait) -> None:
    wait_until(lambda: tracker.pending()[0] == 0, 60, lambda: str(tracker.pending()))


def history(client: mlflow.MlflowClient, run_id: str, name: str = "train/loss") -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def test_a_parent_and_its_child(
    tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    tracker = Tracker(str(tmp_path), mlflow_server, "track")
    (tmp_path / "note.txt").write_text("hello")
    tracker.start(TrackedRun("sweep", {"train.seed": 3, "long": "x" * 7000}, {"kind": "sweep"}))
    tracker.start(TrackedRun("sweep/0001", {"optimizer.lr": 3e-4}, parent="sweep"))
    tracker.log("sweep/0001", rows(range(5)), 5)
    tracker.artifact("sweep", str(tmp_path / "note.txt"))
    tracker.finish("sweep/0001", "FAILED", {"heliostat.reason": "KeyError"})
    tracker.finish("sweep", "FINISHED")
    drained(tracker, wait_until)
    parent, child = (tracker.read(key) for key in ("sweep", "sweep/0001"))
    found = client.get_run(child["run_id"])
    assert found.data.tags["mlflow.parentRunId"] == parent["run_id"]
    assert found.data.params == {"optimizer.lr": "0.0003"}
    assert (found.info.status, parent["status"]) == ("FAILED", "FINISHED")
    assert found.data.tags["heliostat.reason"] == "KeyError"
    assert history(client, child["run_id"]) == list(range(5))
    assert [f.path for f in client.list_artifacts(parent["run_id"])] == ["note.txt"]
    tracker.close()


def test_a_step_done_again_is_tracked_once(
    tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    tracker = Tracker(str(tmp_path), mlflow_server, "track")
    tracker.start(TrackedRun("again", {}))
    tracker.log("again", rows(range(10)), 10)
    tracker.log("again", rows(range(6, 15)), 15)
    drained(tracker, wait_until)
    assert history(client, tracker.read("again")["run_id"]) == list(range(15))
    tracker.close()


def test_a_second_writer_goes_on_where_the_first_was_killed(
    tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    script = f"""
import os, signal
from trainers.track import Tracker, TrackedRun
tracker = Tracker({str(tmp_path)!r}, {mlflow_server!r}, "track")
tracker.start(TrackedRun("killed", {{"a.b": 1}}))
for step in range(2000):
    tracker.log("killed", [("train/loss", step / 7, step, 1_700_000_000_000 + step)], step)
    if step == 1500:
        while tracker.pending()[0] == tracker._spool.pending_bytes + tracker._spool.sent:
            pass
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert killed.returncode == -9
    tracker = Tracker(str(tmp_path), mlflow_server, "track")
    tracker.start(TrackedRun("killed", {"a.b": 1}, {"resumed": "yes"}))
    tracker.log("killed", rows(range(1900, 2100)), 2100)
    drained(tracker, wait_until)
    run_id = tracker.read("killed")["run_id"]
    assert history(client, run_id) == list(range(2100))
    assert client.get_run(run_id).data.tags["resumed"] == "yes"
    experiment = client.get_experiment_by_name("track").experiment_id
    assert len(client.search_runs([experiment], "tags.`heliostat.key` = 'killed'")) == 1
    tracker.close()


class Gate:
    """A port of our own that refuses, and once opened forwards to the server."""

    def __init__(self, server: str) -> None:
        self._target = ("127.0.0.1", int(server.rpartition(":")[2]))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    def open(self) -> None:
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            target.sendall(data)
        target.close()


@pytest.fixture
def gate(mlflow_server: str) -> Iterator[Gate]:
    gate = Gate(mlflow_server)
    yield gate
    gate.close()


def test_a_server_that_is_away_delays_nobody_and_gets_everything_later(
    gate: Gate, tmp_path: Path, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    tracker = Tracker(str(tmp_path), f"http://127.0.0.1:{gate.port}", "track")
    tracker.start(TrackedRun("patient", {}))
    tracker.log("patient", rows(range(100)), 100)
    wait_until(lambda: tracker.pending()[1] is not None, 60)
    assert tracker.pending()[0] > 0
    gate.open()
    drained(tracker, wait_until)
    assert history(client, tracker.read("patient")["run_id"]) == list(range(100))
    tracker.close()


def test_what_mlflow_refuses_does_not_hold_up_the_rest(
    tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    tracker = Tracker(str(tmp_path), mlflow_server, "track")
    tracker.start(TrackedRun("refused", {}))
    tracker.log("refused", [("no: such * name ?", 1.0, 0, 1_700_000_000_000)], 0)
    tracker.artifact("refused", str(tmp_path / "missing.txt"))
    tracker.finish("refused", "FINISHED")
    drained(tracker, wait_until)
    assert client.get_run(tracker.read("refused")["run_id"]).info.status == "FINISHED"
    tracker.close()


def test_a_run_asked_to_stop_hears_it_with_its_next_metrics(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), "http://127.0.0.1:9", "track")
    assert tracker.log("run", rows(range(2)), 2) is False
    tracker.request_stop("run")
    assert tracker.log("run", [], 3) is True
    assert tracker.watch("run") == (3, rows(range(2)), [])
    assert tracker.watch("run") == (3, [], [])
    tracker.close()


def test_half_a_line_at_the_end_of_the_spool_is_cut_off(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append({"do": "a"})
    spool.append({"do": "b"})
    path = tmp_path / "spool.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    spool = Spool(tmp_path)
    spool.append({"do": "c"})
    assert [operation["do"] for operation, _ in spool.read()] == ["a", "c"]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 900))))
def test_batches_keep_each_runs_order_and_every_metric(operations: list[Any]) -> None:
    given_operations: list[dict[str, Any]] = []
    for index, (run, count) in enumerate(operations):
        log = {"do": "log", "run": run, "rows": [[index, i] for i in range(count)]}
        given_operations.append(log if count else {"do": "tag", "run": run, "index": index})
    ends = list(range(1, len(operations) + 1))
    groups = list(batches(iter(zip(given_operations, ends, strict=True))))

    def flat(list_of_operations: list[dict[str, Any]], run: str) -> list[str]:
        """What one run would see in turn."""
        seen = []
        for operation in list_of_operations:
            if operation["run"] == run:
                seen += [json.dumps(row) for row in operation.get("rows", [operation])]
        return seen

    sent = [operation for group, _ in groups for operation in group]
    for run in "ab":
        assert flat(sent, run) == flat(given_operations, run)
    offsets = [offset for _, offset in groups]
    assert offsets == sorted(offsets)
    assert offsets[-1:] == ends[-1:]
