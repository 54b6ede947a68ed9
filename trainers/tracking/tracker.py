"""The tracker: the one writer to MLflow of a training run or sweep, off the step path.

Every operation goes first into the operation log, a file of JSON lines on the writer's machine,
and from there in batches to MLflow; how far the log has been sent is kept beside it. A killed
writer goes on where it stopped, and a server that is slow or away delays nobody. Artifacts and
models have a queue of their own, for which metrics and status do not wait.

A metric is sent once. Steps that are done again after a recovery are recognised by name and step.
The timestamp is taken before the log, so that a batch sent twice is stored once: MLflow's SQL
store has name, timestamp, step and value as its key.
"""

import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from cluster.connection.ray_connection import base_folder
from cluster.connection.run_gauges import RunGauges
from cluster.cost.billing import UsageReport
from trainers.tracking.file_sender import FileSender, portable
from trainers.tracking.logged_runs import LoggedRuns
from trainers.tracking.mailbox import DriverMailbox
from trainers.tracking.mlflow_store import MlflowStore
from trainers.tracking.operation_log import MetricPoint, OperationLog, now_ms
from trainers.tracking.refusals import Refusals
from trainers.tracking.sender import BackgroundSender, Sender

WRITER_TIMEOUT_S = 30.0
"""Seconds that a new writer waits for the one before it to end."""
HOLD_S = 30.0
"""Seconds for which a new writer leaves MLflow alone, unless a run reports a step or ends before.
MLflow's import takes 2 s of CPU time, which the workers need for their own."""
MAX_FILE_FAILURES = 6
"""Attempts to send files that fail, one after the other, before a run ends without them: 6 s."""


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


class Unsent(NamedTuple):
    """What MLflow does not have yet."""

    metrics_bytes: int
    """Bytes of the log, without files."""
    error: str | None
    """The error that keeps them here."""
    files: int
    """Artifacts and models."""
    files_error: str | None
    files_failures: int
    """Attempts to send files that failed since one succeeded."""
    files_untried: bool
    """Whether there are files among them that nobody has tried to send."""

    def line(self) -> str | None:
        """One line on what is missing and why; None if nothing is."""
        if self.metrics_bytes:
            why = self.error or "it is slow"
            return f"{self.metrics_bytes} bytes not yet sent to MLflow ({why})"
        if self.files:
            why = self.files_error or "it is slow"
            return f"{self.files} file{'s' * (self.files > 1)} not yet in MLflow ({why})"
        return None


class Tracker:
    """The one writer of a train or sweep. Its methods return at once; threads do the sending.

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
        self._runs = LoggedRuns(self._log, self._clock.observe)
        self._mailbox = DriverMailbox()
        self._gauges = RunGauges()
        self._store = MlflowStore(uri, experiment)
        self._refusals = Refusals()
        self._files = FileSender(self._log, self._store, self._refusals)
        self._files_background = BackgroundSender(None, self._files, hold_s)
        self._sender = Sender(
            self._log, self._store, self._refusals, on_sent=self._files_background.wake
        )
        for operation, begin, end in self._log.outline():
            if operation["do"] == "start":
                self._started.add(operation["key"])
            self._clock.observe(operation.get("at", 0))
            self._runs.observe(operation, begin)
            self._sender.observe(operation, sent=end <= self._log.sent_offset)
            self._files.observe(operation, begin, end)
        self._background = BackgroundSender(self._log, self._sender, hold_s)
        self._background.start()
        self._files_background.start()

    def start(self, run: TrackedRun) -> None:
        """Create the run in MLflow, or set it running again if it is there."""
        known = run.key in self._started
        if not known:
            self._store.new_runs.add(run.key)
            self._started.add(run.key)
        operation = {"do": "resume", "run": run.key, "tags": dict(run.tags)}
        new = {"do": "start", "id": uuid4().hex, **asdict(run), "at": self._clock.now()}
        with self._lock:
            self._mailbox.start(run.key)
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
        self._release()
        if sync:
            self._log.write_and_sync()
        return self._mailbox.is_stop_requested(run)

    def log_points(self, run: str, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Take metrics of a run whose steps need not be optimizer steps."""
        with self._lock:
            new = self._runs.append_points(run, points)
            if new:
                self._mailbox.put_points(run, new)
                if self._runs.is_running(run):
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

    def rewind(self, run: str, step: int) -> None:
        """The run goes on after `step` steps with another run's state: what it logged of that step
        and of later ones is no part of its past any more. MLflow keeps those points, but newer
        ones of the same steps come after them.
        """
        with self._lock:
            self._mailbox.rewind(run, step)
        self._append({"do": "rewind", "run": run, "step": step})

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
        self._release()
        with self._lock:
            self._gauges.finish(run)
            self._mailbox.finish(run)

    def log_artifact(self, run: str, path: str) -> None:
        """Keep a file with the run. It must stay where it is until it has been sent."""
        inside = portable(path, self._log.folder.parent)
        self._append({"do": "artifact", "run": run, "path": inside})

    def log_model(self, run: str, folder: str) -> None:
        """Keep an exported model with the run, as an MLflow model."""
        inside = portable(folder, self._log.folder.parent)
        self._append({"do": "model", "run": run, "folder": inside})

    def request_stop(self, run: str) -> None:
        """Have the run's next `log` return that it should stop."""
        self._mailbox.request_stop(run)

    def post_message(self, run: str, message: str) -> None:
        """Leave a line of text for the run's driver."""
        with self._lock:
            self._mailbox.put_message(run, message)

    def watch(self, run: str) -> None:
        """Keep the metrics of a trial for `poll`, which asks for them again and again."""
        with self._lock:
            self._mailbox.watch(run)

    def poll(self, run: str) -> tuple[int, list[MetricPoint], list[str]]:
        """Steps done by a run, and its metrics and messages since the last call."""
        with self._lock:
            return self._mailbox.take(run)

    def pending(self) -> tuple[int, str | None]:
        """Bytes of the log not yet sent to MLflow, files too, and the error that keeps them."""
        unsent = self.unsent()
        left = unsent.metrics_bytes + self._files.pending_bytes
        return left, unsent.error or unsent.files_error

    def unsent(self) -> Unsent:
        """What MLflow does not have yet; sends it at once."""
        self._background.hurry()
        self._files_background.hurry()
        return Unsent(
            self._log.pending_bytes,
            self._log.write_error or self._background.error,
            self._files.pending,
            self._files_background.error,
            self._files_background.failures,
            self._files.untried,
        )

    def refused(self) -> str | None:
        """One line on what MLflow refused for good, so that it was left out; None for nothing."""
        return self._refusals.line()

    def read(self, run: str) -> dict[str, Any]:
        """The run as MLflow has it, as `MlflowStore.read_run` gives it."""
        return self._store.read_run(run)

    def close(self) -> None:
        """Stop sending, after the operation under way, and let another writer go on."""
        self._background.close()
        self._files_background.close()
        self._log.close()

    def _release(self) -> None:
        self._background.release()
        self._files_background.release()

    def _append(self, operation: dict[str, Any]) -> None:
        with self._lock:
            self._sender.observe(operation, sent=False)
            starts = operation["do"] == "start"
            append = self._runs.append_start if starts else self._runs.append
            begin, end = append(operation)
            self._files.observe(operation, begin, end)
        self._background.wake()


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
    """Wait until MLflow has everything; after `timeout_s`, a line on what is missing and why.

    Files that MLflow has not taken in several attempts are not waited for, once it has the rest.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        unsent: Unsent = ray.get(tracker.unsent.remote())
        line = unsent.line()
        tried = not unsent.metrics_bytes and not unsent.files_untried
        hopeless = tried and unsent.files_failures >= MAX_FILE_FAILURES
        if line is None or hopeless or time.monotonic() > deadline:
            return line
        time.sleep(0.05)


def flush(folder: Path, uri: str, experiment: str) -> tuple[int, str | None]:
    """Send the unsent part of the log in `folder`, in this process.

    Returns the bytes sent, and a line on what MLflow refused. Raises SpecError when the folder has
    another writer, else whatever MLflow raises.
    """
    log = OperationLog(folder)
    try:
        store, refusals = MlflowStore(uri, experiment), Refusals()
        sender = Sender(log, store, refusals, patience=1)
        files = FileSender(log, store, refusals)
        for operation, begin, end in log.outline():
            sender.observe(operation, sent=end <= log.sent_offset)
            files.observe(operation, begin, end)
        pending = log.pending_bytes + files.pending_bytes
        closed = threading.Event()
        sender.send(closed)
        sender.send_open_windows()
        files.send(closed)
        return pending, refusals.line()
    finally:
        log.close()
