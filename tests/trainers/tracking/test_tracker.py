"""The one writer to MLflow: nothing is lost or sent twice, and no worker waits."""

import contextlib
import io
import math
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest

from cluster.base.config import write_yaml
from tests.trainers.tracking.kept_memory import kept_bytes
from trainers.cli.track import flush_command
from trainers.run_folder import SPEC, TRACKING
from trainers.tracking.operation_log import MetricPoint, mlflow_run_id
from trainers.tracking.sender import Sender
from trainers.tracking.tracker import TrackedRun, Tracker

Wait = Callable[..., None]


@pytest.fixture
def client(mlflow_server: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(mlflow_server)


def rows(steps: range, name: str = "train/loss") -> list[MetricPoint]:
    return [MetricPoint(name, step / 7, step, 1_700_000_000_000 + step) for step in steps]


def drained(tracker: Tracker, wait_until: Wait) -> None:
    wait_until(lambda: tracker.pending()[0] == 0, lambda: str(tracker.pending()))


def history(client: mlflow.MlflowClient, run_id: str, name: str = "train/loss") -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, name)]


@pytest.fixture
def tracker(tmp_path: Path, mlflow_server: str) -> Iterator[Tracker]:
    """A tracker with an operation log in `tmp_path`; closed after the test."""
    made = Tracker(str(tmp_path), mlflow_server, "track")
    yield made
    made.close()


def test_a_parent_and_its_child(
    tracker: Tracker, tmp_path: Path, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    (tmp_path / "spec.yaml").write_text("uri: http://me:secret@host\n")
    tracker.start(TrackedRun("sweep", {"train.seed": 3}, {"kind": "sweep"}))
    tracker.start(TrackedRun("sweep/0001", {"optimizer.lr": 3e-4}, parent="sweep"))
    tracker.log("sweep/0001", rows(range(5)), 5)
    tracker.log_artifact("sweep", str(tmp_path / "spec.yaml"))
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
    path = client.download_artifacts(parent["run_id"], "spec.yaml", str(tmp_path))
    assert Path(path).read_text() == "uri: http://me:***@host\n"


@pytest.mark.parametrize("end", ["step", "failure"])
def test_a_run_is_sent_with_its_first_step_or_at_its_end(
    end: str, tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    tracker = Tracker(str(tmp_path), mlflow_server, "track", hold_s=3600)
    try:
        tracker.start(TrackedRun("held", {"a": 1}))
        tracker.log_points("held", rows(range(1), "cost_usd"))
        if end == "step":
            tracker.log("held", rows(range(1)), 1)
        else:
            tracker.finish("held", "FAILED")
        drained(tracker, wait_until)
        found = client.get_run(tracker.read("held")["run_id"])
    finally:
        tracker.close()
    assert found.info.status == ("RUNNING" if end == "step" else "FAILED")
    assert found.data.metrics["cost_usd"] == 0


def test_a_repeated_step_is_sent_once(
    tracker: Tracker, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    tracker.start(TrackedRun("again", {}))
    tracker.log("again", rows(range(10)), 10)
    tracker.log("again", rows(range(6, 15)), 15)
    drained(tracker, wait_until)
    assert history(client, tracker.read("again")["run_id"]) == list(range(15))


def test_a_second_writer_continues_where_the_first_was_killed(
    tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    script = f"""
import os, signal, time
from pathlib import Path
from trainers.tracking.tracker import Tracker, TrackedRun
tracker = Tracker({str(tmp_path)!r}, {mlflow_server!r}, "track")
tracker.start(TrackedRun("killed", {{"a.b": 1}}))
for step in range(2000):
    tracker.log("killed", [("train/loss", step / 7, step, 1_700_000_000_000 + step)], step)
    if step == 1500:
        while not Path({str(tmp_path)!r}, "sent").exists():
            time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=600)
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


class Faults(ThreadingHTTPServer):
    """A proxy before a server that applies the faults in `plan` to requests that change something.

    Each letter is for one request: `.` is forwarded; `5`, `9` refused with 500 or 429; `l`
    forwarded, but its response replaced by 500; `h` forwarded and never answered; `s` answered
    slowly.
    """

    daemon_threads = True

    def __init__(self, server: str, plan: str) -> None:
        super().__init__(("127.0.0.1", 0), _Fault)
        self.target, self.plan, self.lock = server, list(plan), threading.Lock()
        self.refused_paths: dict[str, int] = {}
        """Part of a path -> the status with which requests to it are answered."""
        self.given_up = threading.Event()
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fate(self, method: str, path: str) -> str:
        with self.lock:
            reads = method == "GET" or path.endswith(("/search", "/get-by-name"))
            return self.plan.pop(0) if self.plan and not reads else "."

    def end(self) -> None:
        self.given_up.set()
        self.shutdown()
        self.server_close()


class _Fault(BaseHTTPRequestHandler):
    server: Faults

    def _pass_on(self) -> None:
        fate = self.server.fate(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, status in self.server.refused_paths.items():
            if part in self.path:
                self._answer(status, b"Refused by a proxy")
                return
        if fate in "59":
            self._answer({"5": 500, "9": 429}[fate], b"Try later")
            return
        skip = ("host", "connection", "content-length")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in skip}
        url = self.server.target + self.path
        request = urllib.request.Request(url, body or None, headers, method=self.command)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                code, data = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            code, data = error.code, error.read()
        if fate == "h":
            self.server.given_up.wait(120)
        elif fate == "l":
            self._answer(500, b"Lost")
        else:
            self.server.given_up.wait(0.5 if fate == "s" else 0)
            self._answer(code, data)

    def _answer(self, code: int, data: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("plan", ["59l", "h.ls5l"])
def test_a_server_that_fails(
    plan: str,
    tmp_path: Path,
    mlflow_server: str,
    client: mlflow.MlflowClient,
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first requests create the run; those whose response is lost took effect."""
    client.get_experiment_by_name("track") or client.create_experiment("track")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")
    faults = Faults(mlflow_server, plan)
    tracker = Tracker(str(tmp_path), faults.uri, "track")
    key = f"failing-{plan}"
    tracker.start(TrackedRun(key, {"a.b": 1}, {"c": "d"}))
    tracker.log(key, rows(range(1500)), 1500)
    tracker.finish(key, "FINISHED")
    drained(tracker, wait_until)
    assert faults.plan == []
    run_id = tracker.read(key)["run_id"]
    assert history(client, run_id) == list(range(1500))
    experiment = client.get_experiment_by_name("track").experiment_id
    (run,) = client.search_runs([experiment], f"tags.`heliostat.key` = '{key}'")
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert (run.data.params, run.data.tags["c"]) == ({"a.b": "1"}, "d")
    tracker.close()
    faults.end()


def test_a_server_that_is_away_gets_everything_later(
    tmp_path: Path,
    mlflow_server: str,
    client: mlflow.MlflowClient,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By `heliostat track flush`, long after the run."""
    monkeypatch.setattr("trainers.tracking.mlflow_limits.EXACT_POINTS", 100)
    folder = tmp_path / "patient"
    tracker = Tracker(str(folder / TRACKING), f"http://127.0.0.1:{free_port}", "track")
    tracker.start(TrackedRun("patient", {}))
    tracker.log("patient", rows(range(105)), 105)
    assert tracker.pending()[0] > 0
    tracker.close()
    write_yaml({"tracking": {"uri": mlflow_server, "experiment": "track"}}, folder / SPEC)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert flush_command(Namespace(run=str(folder))) == 0
        assert flush_command(Namespace(run=str(folder))) == 0
    assert re.fullmatch(
        r"patient: [\d,]+ bytes sent\npatient: nothing was left\n", output.getvalue()
    )
    run_id = mlflow_run_id(folder / TRACKING, "patient")
    assert run_id is not None
    steps = history(client, run_id)
    assert sorted(steps) == [*range(100), 100, 104], "the least, and the last"
    assert "heliostat.sampled" in client.get_run(run_id).data.tags


def test_values_and_names_that_mlflow_cannot_hold(
    tracker: Tracker, tmp_path: Path, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    tracker.start(TrackedRun("odd", {"long": "x" * 7000, "uri": "http://me:secret@host"}))
    inf, nan, at = float("inf"), float("nan"), 1_700_000_000_000
    tracker.log("odd", [("loss", v, i, at) for i, v in enumerate((inf, nan, -inf, 1.0))], 4)
    tracker.log("odd", [("acc@5", 0.5, 0, at), ("/../x", 0.25, 0, at)], 4)
    tracker.finish("odd", "FAILED", {"heliostat.reason": "y" * 9000})
    drained(tracker, wait_until)
    run_id = tracker.read("odd")["run_id"]
    values = [metric.value for metric in client.get_metric_history(run_id, "loss")]
    assert values[0] == -values[2] == sys.float_info.max
    assert math.isnan(values[1])
    found = client.get_run(run_id).data
    assert "1.797e308" in found.tags["heliostat.infinite.loss"]
    assert (found.metrics["acc_5"], found.metrics["x"]) == (0.5, 0.25)
    assert found.tags["heliostat.renamed.acc_5"] == "acc@5"
    assert found.params["uri"] == "http://me:***@host"
    for kind, name, text in (
        ("parameters", "long", "x" * 7000),
        ("tags", "heliostat.reason", "y" * 9000),
    ):
        shown = {**found.params, **found.tags}[name]
        assert shown.endswith(f"({len(text)} characters, whole in {kind}/{name}.txt)")
        path = client.download_artifacts(run_id, f"{kind}/{name}.txt", str(tmp_path))
        assert Path(path).read_text() == text


def test_two_names_that_mlflow_would_write_alike_stay_two_series(
    tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    """Also for a second writer, which did not send the first of them."""
    tracker = Tracker(str(tmp_path), mlflow_server, "track")
    tracker.start(TrackedRun("alike", {}))
    tracker.log("alike", [("acc@5", 0.5, 0, 1_700_000_000_000)], 0)
    drained(tracker, wait_until)
    tracker.close()
    tracker = Tracker(str(tmp_path), mlflow_server, "track")
    tracker.start(TrackedRun("alike", {}))
    tracker.log("alike", [("acc#5", 0.25, 0, 1_700_000_000_000)], 0)
    tracker.log("alike", [("acc@5", 0.75, 1, 1_700_000_000_001)], 1)
    drained(tracker, wait_until)
    found = client.get_run(tracker.read("alike")["run_id"]).data
    tracker.close()
    original = {name: found.tags.get(f"heliostat.renamed.{name}", name) for name in found.metrics}
    assert {original[name]: value for name, value in found.metrics.items()} == {
        "acc@5": 0.75,
        "acc#5": 0.25,
    }
    assert "acc_5" in found.metrics


def test_an_unreadable_environment_variable_loses_nothing(
    tracker: Tracker, client: mlflow.MlflowClient, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow raises a plain ValueError for it, with every request."""
    tracker.start(TrackedRun("environment", {}))
    drained(tracker, wait_until)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon")
    tracker.log("environment", rows(range(5)), 5)
    wait_until(lambda: "soon" in (tracker.pending()[1] or ""), lambda: str(tracker.pending()))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    drained(tracker, wait_until)
    assert history(client, tracker.read("environment")["run_id"]) == list(range(5))


def test_a_clock_that_is_set_back(
    tracker: Tracker, client: mlflow.MlflowClient, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.start(TrackedRun("clock", {}))
    for step in range(20):
        tracker.log("clock", [("loss", step / 7, step, 1_900_000_000_000 - 60_000 * step)], step)
    monkeypatch.setattr("trainers.tracking.tracker.now_ms", lambda: 1_000_000_000_000)
    tracker.finish("clock", "FINISHED")
    drained(tracker, wait_until)
    run_id = tracker.read("clock")["run_id"]
    assert sorted(history(client, run_id, "loss")) == list(range(20))
    run = client.get_run(run_id)
    assert run.data.metrics["loss"] == 19 / 7
    assert run.info.end_time >= run.info.start_time


def test_a_refused_operation_does_not_hold_up_the_rest(
    tracker: Tracker, tmp_path: Path, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    tracker.start(TrackedRun("refused", {}))
    at = 1_700_000_000_000
    tracker.log("refused", [("loss", 0.5, 0, at), ("loss too far", 1.0, 2**70, at)], 0)
    tracker.log_artifact("refused", str(tmp_path / "missing.txt"))
    tracker.finish("refused", "FINISHED")
    drained(tracker, wait_until)
    run = client.get_run(tracker.read("refused")["run_id"])
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.5})
    assert run.data.tags["heliostat.refused.log"].startswith("loss too far: ")
    assert run.data.tags["heliostat.refused.artifact"].endswith("missing.txt is gone")


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Tracker]:
    """A tracker whose MLflow cannot be reached."""
    made = Tracker(str(tmp_path / "track"), "http://127.0.0.1:9", "track", hold_s=3600)
    yield made
    made.close()


def test_a_stop_request_is_the_answer_to_the_next_metrics(tmp_path: Path) -> None:
    tracker = Tracker(str(tmp_path), "http://127.0.0.1:9", "track")
    assert tracker.log("run", rows(range(2)), 2) is False
    tracker.request_stop("run")
    assert tracker.log("run", [], 3) is True
    assert tracker.poll("run") == (3, rows(range(2)), [])
    assert tracker.poll("run") == (3, [], [])
    tracker.close()


def test_steps_are_logged_again_after_a_take_over(
    tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    """Also by the next writer, which reads of it in the log."""
    expected: list[int] = []
    for start, new in ((0, range(6)), (1, range(3, 7))):
        tracker = Tracker(str(tmp_path), mlflow_server, "track")
        tracker.start(TrackedRun("run", {}))
        tracker.log("run", [p._replace(value=p.value + start) for p in rows(range(6 + start))], 6)
        tracker.rewind("run", 3)
        assert [point.step for point in tracker.poll("run")[1]] == [0, 1, 2][: 3 - 3 * start]
        drained(tracker, wait_until)
        expected = sorted([*expected, *new])
        assert sorted(history(client, tracker.read("run")["run_id"])) == expected
        tracker.close()


def test_a_run_that_starts_again_was_asked_for_nothing(away: Tracker) -> None:
    """Nothing of the attempt before it counts: no request to stop, no points, no messages."""
    key = "sweep/0003"
    away.start(TrackedRun(key, {}, parent="sweep"))
    away.watch(key)
    away.log(key, rows(range(4)), 4)
    away.post_message(key, "worker 1 failed")
    away.request_stop(key)
    assert away.log(key, rows(range(4, 6)), 6) is True
    away.finish(key, "FAILED")
    away.start(TrackedRun(key, {}, parent="sweep"))
    assert away.log(key, rows(range(6, 7)), 7) is False
    assert away.log(key, rows(range(7, 8)), 8) is False
    away.watch(key)
    assert away.log(key, rows(range(8, 9)), 9) is False
    assert away.poll(key) == (9, rows(range(8, 9)), [])


def test_a_request_to_stop_outlives_the_runs_end(away: Tracker) -> None:
    """The sweep ends a trial in MLflow before the trial's workers have heard that they stop."""
    away.start(TrackedRun("sweep/0003", {}, parent="sweep"))
    away.request_stop("sweep/0003")
    away.finish("sweep/0003", "FINISHED")
    assert away.log("sweep/0003", [], 5) is True


def test_trials_that_ended_take_less_than_20_kb_of_memory(
    away: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,700 points each, and their costs after their end."""
    monkeypatch.setattr(Sender, "send", lambda self, closed: None)
    at = 1_700_000_000_000

    def train(number: int) -> None:
        key = f"sweep/{number:04d}"
        away.start(TrackedRun(key, {"optimizer.lr": 0.1 / (1 + number)}, {"k": "v"}, "sweep"))
        for step in range(1, 101):
            points = [(f"group/metric_{n}", step / 7, step, at) for n in range(17)]
            away.log(key, points, step)
        away.log_note(key, "device", "a note of the trial")
        away.finish(key, "FINISHED", {"heliostat.stopped": "asha"})
        away.log_points(key, [("cost_usd", 0.1, 1, at), ("energy_j", 5.0, 1, at)])

    away.start(TrackedRun("sweep", {}))
    assert kept_bytes(train, 20) < 20_000


def test_a_place_for_artifacts_that_refuses_delays_nothing_else(
    tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    """Neither metrics nor the status, nor other runs; the line at the end says what is missing."""
    client.get_experiment_by_name("track") or client.create_experiment("track")
    faults = Faults(mlflow_server, "")
    faults.refused_paths = {"/mlflow-artifacts/": 503}
    folder = tmp_path / "stuck"
    folder.mkdir()
    (folder / "spec.yaml").write_text("workload: vision\n")
    tracker = Tracker(str(folder / TRACKING), faults.uri, "track")
    tracker.start(TrackedRun("stuck", {"long": "x" * 7000}))
    tracker.log_artifact("stuck", str(folder / "spec.yaml"))
    tracker.log("stuck", rows(range(1500)), 1500)
    tracker.finish("stuck", "FINISHED")
    wait_until(lambda: not tracker.unsent().metrics_bytes, lambda: str(tracker.unsent()))
    run_id = tracker.read("stuck")["run_id"]
    assert history(client, run_id) == list(range(1500))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["long"].endswith("(7000 characters, whole in parameters/long.txt)")
    wait_until(lambda: tracker.unsent().files_failures > 1, lambda: str(tracker.unsent()))
    assert re.match(r"2 files not yet in MLflow \(.*503", tracker.unsent().line() or "")
    tracker.close()

    faults.refused_paths = {"/spec.yaml": 413}  # the place is back, behind a limit on sizes
    write_yaml({"tracking": {"uri": faults.uri, "experiment": "track"}}, folder / SPEC)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert flush_command(Namespace(run=str(folder))) == 0
        assert flush_command(Namespace(run=str(folder))) == 0
    sent, refused, nothing = output.getvalue().splitlines()
    assert re.fullmatch(r"stuck: [\d,]+ bytes sent", sent)
    assert re.match("MLflow refused, and is without spec.yaml: 413", refused)
    assert nothing == "stuck: nothing was left"
    path = client.download_artifacts(run_id, "parameters/long.txt", str(tmp_path))
    assert Path(path).read_text() == "x" * 7000
    assert "413" in client.get_run(run_id).data.tags["heliostat.refused.artifact"]
    faults.end()


def test_trials_are_named_after_their_sweep(
    tracker: Tracker, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    tracker.start(TrackedRun("lr-sweep", {}))
    tracker.start(TrackedRun("lr-sweep/0012", {}, parent="lr-sweep"))
    drained(tracker, wait_until)
    names = [
        client.get_run(tracker.read(key)["run_id"]).info.run_name
        for key in ("lr-sweep", "lr-sweep/0012")
    ]
    assert names == ["lr-sweep", "lr-sweep-0012"]


def test_a_trial_that_ended_goes_on(
    tmp_path: Path, mlflow_server: str, client: mlflow.MlflowClient, wait_until: Wait
) -> None:
    """After its end, and after a restart of the writer, steps that are done again count once."""
    key = "going/0001"
    tracker = Tracker(str(tmp_path), mlflow_server, "track")
    tracker.start(TrackedRun("going", {}))
    tracker.start(TrackedRun(key, {}, parent="going"))
    tracker.log(key, rows(range(10)), 10)
    tracker.finish(key, "FAILED", {"heliostat.reason": "KeyError", "note": "a"})
    tracker.log_points(key, rows(range(1), "cost_usd"))
    tracker.start(TrackedRun(key, {}, parent="going"))
    tracker.log(key, rows(range(7, 15)), 15)
    drained(tracker, wait_until)
    tracker.close()
    tracker = Tracker(str(tmp_path), mlflow_server, "track")
    tracker.start(TrackedRun(key, {}, parent="going"))
    tracker.log(key, rows(range(12, 20)), 20)
    tracker.finish(key, "FINISHED")
    tracker.log_points(key, rows(range(1), "cost_usd"))
    tracker.log_points(key, rows(range(1, 2), "cost_usd"))
    drained(tracker, wait_until)
    run_id = tracker.read(key)["run_id"]
    tracker.close()
    assert history(client, run_id) == list(range(20))
    assert history(client, run_id, "cost_usd") == [0, 1]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["note"]) == ("FINISHED", "a")
    assert "heliostat.reason" not in run.data.tags, "that of its failure"
