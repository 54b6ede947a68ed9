"""Tracking: one writer to MLflow per train or sweep, off the step path.

What is to be tracked goes first into a spool, a file of JSON lines on the machine of the one
writer, and from there in batches to MLflow; how far the spool has been sent is kept beside it.
A killed writer goes on where it stopped, and a server that is slow or gone delays nobody.

A metric is sent once: steps that are done again after a recovery are recognised by name and
step, and the time stamp is taken before the spool, so that a batch sent twice is stored once
(MLflow's SQL store has name, time stamp, step and value as its key).
"""

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.connection.ray_connection import base_folder
from cluster.connection.run_gauges import RunGauges
from cluster.cost.billing import UsageReport
from trainers.tracking.mlflow_store import MlflowStore
from trainers.tracking.operation_log import MetricPoint, OperationLog, now_ms
from trainers.tracking.sender import Sender

SYNC_S = 1.0
"""Seconds between what is brought to the disk."""
WRITER_TIMEOUT_S = 30.0
"""Seconds that a writer waits for the one before it to be gone."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as it is made in MLflow."""

    key: str
    """Name within the train or sweep; the parent's children are `parent/child`."""
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the working folder (`cluster.connection.ray_connection.base_folder`)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{base_folder() / 'mlflow.db'}"


class Tracker:
    """The one writer of a train or sweep. Its methods return at once; a thread does the sending.

    Used as a Ray actor beside the driver. Not affected by MLflow being slow or away: it tries
    again until `close`, and again when the run is resumed or `heliostat track flush` is called.
    """

    def __init__(self, folder: str, uri: str, experiment: str, wait_s: float = 0) -> None:
        """Raises SpecError when `folder` has another writer for `wait_s`, or cannot be written."""
        self._lock = threading.Lock()
        self._spool = OperationLog(Path(folder), wait_s)
        self._started: set[str] = set()
        self._last_step: dict[tuple[str, str], int] = {}
        self._last_ms = 0
        self._unpolled_points: defaultdict[str, deque[MetricPoint]] = defaultdict(
            lambda: deque(maxlen=10_000)
        )
        self._steps_done: dict[str, int] = {}
        self._messages: defaultdict[str, list[str]] = defaultdict(list)
        self._stop_requested: set[str] = set()
        self._gauges = RunGauges()
        self._usage_reports: dict[str, UsageReport] = {}
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._error: str | None = None
        self._store = MlflowStore(uri, experiment)
        self._sender = Sender(self._spool, self._store)
        for operation, end in self._spool.read():
            self._remember(operation)
            self._sender.observe(operation, sent=end <= self._spool.sent_offset)
        self._thread = threading.Thread(
            target=self._send_until_closed, daemon=True, name="mlflow-sender"
        )
        self._thread.start()

    def start(self, run: TrackedRun) -> None:
        """Make the run in MLflow, or take it up again as running if it is there."""
        known = run.key in self._started
        if not known:
            self._store.new_runs.add(run.key)
        operation = {"do": "resume", "run": run.key, "tags": dict(run.tags)}
        new = {"do": "start", "id": uuid4().hex, **asdict(run), "at": self._now()}
        self._append(operation if known else new)

    def log(self, run: str, rows: list[MetricPoint], step: int, sync: bool = False) -> bool:
        """Take metrics of a run that has done `step` steps; tells whether it should stop.

        With `sync` all that was taken is on the disk when this returns.
        """
        with self._lock:
            self._steps_done[run] = step
        self.add(run, rows)
        if sync:
            self._sync()
        return run in self._stop_requested

    def add(self, run: str, rows: list[MetricPoint]) -> None:
        """Take metrics of a run whose steps need not be optimizer steps."""
        with self._lock:
            new = [row for row in rows if self._is_new(run, row)]
            if new:
                self._spool.append({"do": "log", "run": run, "rows": new})
                self._unpolled_points[run].extend(new)
                self._gauges.record(run, new)
        self._wake.set()

    def used(self, post: UsageReport) -> None:
        """Take what a meter says of itself, in place of what it said before."""
        with self._lock:
            self._usage_reports[post.session] = post

    def posts(self) -> list[UsageReport]:
        """What the meters have said since the last call."""
        with self._lock:
            found, self._usage_reports = list(self._usage_reports.values()), {}
            return found

    def _is_new(self, run: str, row: MetricPoint) -> bool:
        """Whether the run has not been that far with this metric; from now on it has."""
        name, _, step, at = row
        self._last_ms = max(self._last_ms, at)
        if step <= self._last_step.get((run, name), -1):
            return False
        self._last_step[run, name] = step
        return True

    def note(self, run: str, name: str, text: str) -> None:
        """Keep a fact about a run as its tag `heliostat.name`; the newest counts."""
        self.tell(run, f"{name}: {text}")
        tags = {f"heliostat.{name.replace(' ', '_')}": text}
        self._append({"do": "tag", "run": run, "tags": tags})

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, also after its end."""
        self._append({"do": "tag", "run": run, "tags": dict(tags)})

    def finish(self, run: str, status: str, tags: Mapping[str, str] | None = None) -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        operation = {"do": "finish", "run": run, "status": status, "tags": dict(tags or {})}
        self._append({**operation, "at": self._now()})
        with self._lock:
            self._gauges.finish(run)

    def artifact(self, run: str, path: str) -> None:
        """Keep a file with the run. It must stay where it is until it has been sent."""
        self._append({"do": "artifact", "run": run, "path": path})

    def model(self, run: str, folder: str) -> None:
        """Keep an exported model with the run, as an MLflow model."""
        self._append({"do": "model", "run": run, "folder": folder})

    def request_stop(self, run: str) -> None:
        """Answer the run's next `log` with the wish that it stop."""
        self._stop_requested.add(run)

    def tell(self, run: str, line: str) -> None:
        """A line for whoever watches the run."""
        with self._lock:
            self._messages[run].append(line)

    def watch(self, run: str) -> tuple[int, list[MetricPoint], list[str]]:
        """Steps done by a run, and its metrics and its lines since the last call."""
        with self._lock:
            rows = list(self._unpolled_points.pop(run, ()))
            return self._steps_done.get(run, 0), rows, self._messages.pop(run, [])

    def pending(self) -> tuple[int, str | None]:
        """Bytes not yet sent to MLflow, and the error that keeps them here."""
        return self._spool.pending_bytes, self._spool.write_error or self._error

    def read(self, run: str) -> dict[str, Any]:
        """What MLflow itself has of a run: `run_id`, `metrics`, `status`, `model_uri`, `url`."""
        return self._store.read_run(run)

    def close(self) -> None:
        """Stop sending, after the operation under way, and let another writer go on."""
        self._closed.set()
        self._wake.set()
        self._thread.join()
        self._spool.close()

    def _now(self) -> int:
        """Milliseconds since the epoch, never earlier than any time stamp before it."""
        self._last_ms = max(self._last_ms, now_ms())
        return self._last_ms

    def _append(self, operation: dict[str, Any]) -> None:
        with self._lock:
            self._remember(operation)
            self._sender.observe(operation, sent=False)
            self._spool.append(operation)
        self._wake.set()

    def _remember(self, operation: dict[str, Any]) -> None:
        if operation["do"] == "start":
            self._started.add(operation["key"])
            self._last_ms = max(self._last_ms, operation["at"])
        elif operation["do"] == "log":
            for row in operation["rows"]:
                self._is_new(operation["run"], row)

    def _send_until_closed(self) -> None:
        os.nice(10)  # of this thread, on Linux: what trains goes first, but not alone
        pause_s = 0.2
        while not self._closed.is_set():
            self._wake.wait(timeout=SYNC_S)
            self._wake.clear()
            try:
                self._sync()
                self._sender.send(self._closed)
                self._error, pause_s = None, 0.2
            except Exception as error:  # whatever MLflow raises: nothing is lost, it is tried again
                self._error = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"tracking: {self._error}; trying again", flush=True)
                self._closed.wait(pause_s)
                pause_s = min(30.0, pause_s * 2)
                self._wake.set()

    def _sync(self) -> None:
        self._spool.write()
        self._spool.sync()


def start_tracker(folder: Path, uri: str, experiment: str, name: str) -> Any:
    """The tracker of a train or sweep as a Ray actor on this machine, its spool in `folder`.

    Whoever has no handle finds the actor by `name`, the key of the train or sweep. Raises
    SpecError when the folder has another writer, or cannot be written.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    OperationLog(
        folder, WRITER_TIMEOUT_S
    ).close()  # a mistake is told here, before anything is started
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Tracker).options(
        name=name, num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    return actor.remote(str(folder), uri, experiment, WRITER_TIMEOUT_S)


def wait_until_sent(tracker: Any, timeout_s: float) -> str | None:
    """Wait until MLflow has everything; else one line that says what it lacks and why."""
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        left, error = ray.get(tracker.pending.remote())
        if not left:
            return None
        if time.monotonic() > deadline:
            return f"{left} bytes not yet sent to MLflow ({error or 'it is slow'})"
        time.sleep(0.05)


def flush(folder: Path, uri: str, experiment: str) -> int:
    """Send what the spool in `folder` still has, in this process; returns the bytes sent.

    Raises SpecError when the folder has another writer, else whatever MLflow raises.
    """
    spool = OperationLog(folder)
    try:
        pending = spool.pending_bytes
        sender = Sender(spool, MlflowStore(uri, experiment))
        for operation, end in spool.read():
            sender.observe(operation, sent=end <= spool.sent_offset)
        sender.send(threading.Event())
        sender.send_open_windows()
        return pending
    finally:
        spool.close()
