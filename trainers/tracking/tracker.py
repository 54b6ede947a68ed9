"""The tracker: the one writer to MLflow of a training run or sweep, off the step path.

Every operation goes first into the operation log, a file of JSON lines on the writer's machine,
and from there in batches to MLflow; how far the log has been sent is kept beside it. A killed
writer goes on where it stopped, and a server that is slow or away delays nobody.

A metric is sent once. Steps that are done again after a recovery are recognised by name and step.
The timestamp is taken before the log, so that a batch sent twice is stored once: MLflow's SQL
store has name, timestamp, step and value as its key.
"""

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.connection.ray_connection import base_folder
from cluster.connection.run_gauges import RunGauges
from cluster.cost.billing import UsageReport
from trainers.tracking.mlflow_store import MlflowStore
from trainers.tracking.operation_log import MetricPoint, OperationLog, now_ms
from trainers.tracking.sender import BackgroundSender, Sender

WRITER_TIMEOUT_S = 30.0
"""Seconds that a new writer waits for the one before it to end."""
HOLD_S = 30.0
"""Seconds for which a new writer leaves MLflow alone, unless a run reports a step or ends before.
MLflow's import takes 2 s of CPU time, which the workers need for their own."""
MAX_UNPOLLED_POINTS = 10_000
"""Points of a run that are kept for its driver; the oldest are dropped first."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as it is created in MLflow."""

    key: str
    """Name within the train or sweep; the parent's children are `parent/child`."""
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the working folder (`base_folder`)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{base_folder() / 'mlflow.db'}"


class TimestampClock:
    """The time in milliseconds since the epoch, never earlier than a timestamp seen before."""

    def __init__(self) -> None:
        self._latest_ms = 0

    def observe(self, timestamp_ms: int) -> None:
        self._latest_ms = max(self._latest_ms, timestamp_ms)

    def now(self) -> int:
        self.observe(now_ms())
        return self._latest_ms


class RepeatedStepFilter:
    """Drops points of steps that are done again after a recovery."""

    def __init__(self) -> None:
        self._last_step: dict[tuple[str, str], int] = {}

    def new_points(self, run: str, points: Iterable[MetricPoint]) -> list[MetricPoint]:
        """The points whose step is later than any before it in the same series."""
        return [point for point in points if self._is_new(run, point)]

    def _is_new(self, run: str, point: MetricPoint) -> bool:
        if point.step <= self._last_step.get((run, point.name), -1):
            return False
        self._last_step[run, point.name] = point.step
        return True


class DriverMailbox:
    """Messages between the workers of each run and its driver, which polls."""

    def __init__(self) -> None:
        self._points: defaultdict[str, deque[MetricPoint]] = defaultdict(
            lambda: deque(maxlen=MAX_UNPOLLED_POINTS)
        )
        self._steps_done: dict[str, int] = {}
        self._messages: defaultdict[str, list[str]] = defaultdict(list)
        self._stop_requested: set[str] = set()
        self._usage_reports: dict[str, UsageReport] = {}

    def put_step(self, run: str, step: int) -> None:
        self._steps_done[run] = step

    def put_points(self, run: str, points: Iterable[MetricPoint]) -> None:
        self._points[run].extend(points)

    def put_message(self, run: str, message: str) -> None:
        self._messages[run].append(message)

    def take(self, run: str) -> tuple[int, list[MetricPoint], list[str]]:
        """Steps done by a run, and its points and messages since the last call."""
        points = list(self._points.pop(run, ()))
        return self._steps_done.get(run, 0), points, self._messages.pop(run, [])

    def request_stop(self, run: str) -> None:
        self._stop_requested.add(run)

    def is_stop_requested(self, run: str) -> bool:
        return run in self._stop_requested

    def put_usage_report(self, report: UsageReport) -> None:
        """Replaces the report that the same meter sent before."""
        self._usage_reports[report.session] = report

    def take_usage_reports(self) -> list[UsageReport]:
        """The reports that meters sent since the last call."""
        reports, self._usage_reports = list(self._usage_reports.values()), {}
        return reports


class Tracker:
    """The one writer of a train or sweep. Its methods return at once; a thread does the sending.

    Used as a Ray actor beside the driver. While MLflow is slow or away it goes on trying until
    `close`, then again when the run is resumed or `heliostat track flush` is called.
    """

    def __init__(
        self, folder: str, uri: str, experiment: str, wait_s: float = 0, hold_s: float = 0
    ) -> None:
        """Raises SpecError when `folder` has another writer for `wait_s`, or cannot be written.

        Nothing is sent for `hold_s`, unless a run reports a step or ends before.
        """
        self._lock = threading.Lock()
        self._log = OperationLog(Path(folder), wait_s)
        self._started: set[str] = set()
        self._clock = TimestampClock()
        self._repeated = RepeatedStepFilter()
        self._mailbox = DriverMailbox()
        self._gauges = RunGauges()
        self._store = MlflowStore(uri, experiment)
        self._sender = Sender(self._log, self._store)
        for operation, end in self._log.read():
            self._observe(operation)
            self._sender.observe(operation, sent=end <= self._log.sent_offset)
        self._background = BackgroundSender(self._log, self._sender, hold_s)
        self._background.start()

    def start(self, run: TrackedRun) -> None:
        """Create the run in MLflow, or set it running again if it is there."""
        known = run.key in self._started
        if not known:
            self._store.new_runs.add(run.key)
        operation = {"do": "resume", "run": run.key, "tags": dict(run.tags)}
        new = {"do": "start", "id": uuid4().hex, **asdict(run), "at": self._clock.now()}
        self._append(operation if known else new)

    def log(
        self, run: str, points: Iterable[tuple[str, float, int, int]], step: int, sync: bool = False
    ) -> bool:
        """Take metrics of a run that has done `step` steps; returns whether it should stop.

        With `sync` everything logged so far is on the disk when this returns.
        """
        with self._lock:
            self._mailbox.put_step(run, step)
        self.log_points(run, points)
        self._background.release()
        if sync:
            self._log.write_and_sync()
        return self._mailbox.is_stop_requested(run)

    def log_points(self, run: str, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Take metrics of a run whose steps need not be optimizer steps."""
        with self._lock:
            new = self._new_points(run, points)
            if new:
                self._log.append({"do": "log", "run": run, "rows": new})
                self._mailbox.put_points(run, new)
                self._gauges.record(run, new)
        self._background.wake()

    def report_usage(self, report: UsageReport) -> None:
        """Take a meter's report, in place of the one that it sent before."""
        with self._lock:
            self._mailbox.put_usage_report(report)

    def take_usage_reports(self) -> list[UsageReport]:
        """The reports that meters sent since the last call."""
        with self._lock:
            return self._mailbox.take_usage_reports()

    def log_note(self, run: str, name: str, text: str) -> None:
        """Keep a fact about a run as its tag `heliostat.name`; the newest counts."""
        self.post_message(run, f"{name}: {text}")
        tags = {f"heliostat.{name.replace(' ', '_')}": text}
        self._append({"do": "tag", "run": run, "tags": tags})

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, also after its end."""
        self._append({"do": "tag", "run": run, "tags": dict(tags)})

    def finish(self, run: str, status: str, tags: Mapping[str, str] | None = None) -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        operation = {"do": "finish", "run": run, "status": status, "tags": dict(tags or {})}
        self._append({**operation, "at": self._clock.now()})
        self._background.release()
        with self._lock:
            self._gauges.finish(run)

    def log_artifact(self, run: str, path: str) -> None:
        """Keep a file with the run. It must stay where it is until it has been sent."""
        self._append({"do": "artifact", "run": run, "path": path})

    def log_model(self, run: str, folder: str) -> None:
        """Keep an exported model with the run, as an MLflow model."""
        self._append({"do": "model", "run": run, "folder": folder})

    def request_stop(self, run: str) -> None:
        """Have the run's next `log` return that it should stop."""
        self._mailbox.request_stop(run)

    def post_message(self, run: str, message: str) -> None:
        """Leave a line of text for the run's driver."""
        with self._lock:
            self._mailbox.put_message(run, message)

    def poll(self, run: str) -> tuple[int, list[MetricPoint], list[str]]:
        """Steps done by a run, and its metrics and messages since the last call."""
        with self._lock:
            return self._mailbox.take(run)

    def pending(self) -> tuple[int, str | None]:
        """Bytes not yet sent to MLflow, and the error that keeps them here; sends them at once."""
        self._background.hurry()
        return self._log.pending_bytes, self._log.write_error or self._background.error

    def read(self, run: str) -> dict[str, Any]:
        """The run as MLflow has it, as `MlflowStore.read_run` gives it."""
        return self._store.read_run(run)

    def close(self) -> None:
        """Stop sending, after the operation under way, and let another writer go on."""
        self._background.close()
        self._log.close()

    def _append(self, operation: dict[str, Any]) -> None:
        with self._lock:
            self._observe(operation)
            self._sender.observe(operation, sent=False)
            self._log.append(operation)
        self._background.wake()

    def _observe(self, operation: dict[str, Any]) -> None:
        if operation["do"] == "start":
            self._started.add(operation["key"])
            self._clock.observe(operation["at"])
        elif operation["do"] == "log":
            self._new_points(operation["run"], operation["rows"])

    def _new_points(
        self, run: str, points: Iterable[tuple[str, float, int, int]]
    ) -> list[MetricPoint]:
        taken = [MetricPoint(*point) for point in points]
        for point in taken:
            self._clock.observe(point.timestamp_ms)
        return self._repeated.new_points(run, taken)


def start_tracker(folder: Path, uri: str, experiment: str, name: str) -> Any:
    """Start the tracker of a train or sweep as a Ray actor here, with its log in `folder`.

    Processes without a handle find the actor by `name`, the key of the train or sweep. Raises
    SpecError when the folder has another writer, or cannot be written.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A mistake is raised here, before any actor is started.
    OperationLog(folder, WRITER_TIMEOUT_S).close()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Tracker).options(
        name=name, num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    return actor.remote(str(folder), uri, experiment, WRITER_TIMEOUT_S, HOLD_S)


def wait_until_sent(tracker: Any, timeout_s: float) -> str | None:
    """Wait until MLflow has everything; after `timeout_s`, a line on what is missing and why."""
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
    """Send the unsent part of the log in `folder`, in this process; returns the bytes sent.

    Raises SpecError when the folder has another writer, else whatever MLflow raises.
    """
    log = OperationLog(folder)
    try:
        pending = log.pending_bytes
        sender = Sender(log, MlflowStore(uri, experiment))
        for operation, end in log.read():
            sender.observe(operation, sent=end <= log.sent_offset)
        sender.send(threading.Event())
        sender.send_open_windows()
        return pending
    finally:
        log.close()
