"""Tracking: one writer to MLflow per train or sweep, off the step path.

What is to be tracked goes first into a spool, a file of JSON lines on the machine of the one
writer, and from there in batches to MLflow; how far the spool has been sent is kept beside it.
A killed writer goes on where it stopped, and a server that is slow or gone delays nobody.

A metric is sent once: steps that are done again after a recovery are recognised by name and
step, and the time stamp is taken before the spool, so that a batch sent twice is stored once
(MLflow's SQL store has name, time stamp, step and value as its key).
"""

import json
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from cluster.files import cache_folder, write_atomic

if TYPE_CHECKING:
    from trainers.checkpoint import Checkpoints

Row = tuple[str, float, int, int]
"""A metric: name, value, step, time stamp in ms since the epoch."""

RUN_TAG = "heliostat.run"
BATCH = 1000
"""MLflow takes at most this many metrics at once."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as it is made in MLflow."""

    key: str
    """Name within the train or sweep; the parent's children are `parent/child`."""
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]


def now_ms() -> int:
    """Milliseconds since the epoch, MLflow's unit."""
    return time.time_ns() // 1_000_000


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


class Spool:
    """An append-only file of JSON lines, and how much of it has been sent."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._sent_path = folder / "spool.jsonl", folder / "sent"
        self._cut_torn_line()
        self._file = self._path.open("ab")
        self.sent = int(self._sent_path.read_text()) if self._sent_path.exists() else 0

    def _cut_torn_line(self) -> None:
        """A crash can leave half a line at the end; nobody was told that it was safe."""
        if not self._path.exists():
            return
        with self._path.open("rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                file.truncate(whole)

    def append(self, operation: Mapping[str, Any]) -> None:
        """Returns when the operation would survive the death of this process."""
        self._file.write(json.dumps(operation, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def read(self, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """The operations from byte `start` on, each with the byte after it."""
        with self._path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                yield json.loads(line), start

    def commit(self, offset: int) -> None:
        """Record that all before byte `offset` has been sent."""
        write_atomic(self._sent_path, str(offset))
        self.sent = offset

    @property
    def pending_bytes(self) -> int:
        return self._path.stat().st_size - self.sent


class Tracker:
    """The one writer of a train or sweep. Its methods return at once; a thread does the sending.

    Used as a Ray actor beside the driver. Not affected by MLflow being slow or away: it tries
    again until `close`, and again when the run is resumed.
    """

    def __init__(self, folder: str, uri: str, experiment: str) -> None:
        self._lock = threading.Lock()
        self._spool = Spool(Path(folder))
        self._known: set[str] = set()
        self._last_step: dict[tuple[str, str], int] = {}
        self._rows: defaultdict[str, deque[Row]] = defaultdict(lambda: deque(maxlen=10_000))
        self._steps: dict[str, int] = {}
        self._stopping: set[str] = set()
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._error: str | None = None
        self._store = _Store(uri, experiment)
        for operation, _ in self._spool.read():
            self._remember(operation)
        self._rows.clear()
        self._sender = threading.Thread(target=self._send_all, daemon=True, name="mlflow-sender")
        self._sender.start()

    def start(self, run: TrackedRun) -> None:
        """Make the run in MLflow, or take it up again as running if it is there."""
        known = run.key in self._known
        operation = {"do": "resume", "run": run.key, "tags": dict(run.tags)}
        self._append(operation if known else {"do": "start", "id": uuid4().hex, **asdict(run)})

    def log(self, run: str, rows: list[Row], step: int) -> bool:
        """Take metrics of a run that has done `step` steps; tells whether it should stop."""
        with self._lock:
            self._steps[run] = step
            new = [row for row in rows if row[2] > self._last_step.get((run, row[0]), -1)]
        if new:
            self._append({"do": "log", "run": run, "rows": new})
        return run in self._stopping

    def finish(self, run: str, status: str, tags: Mapping[str, str] | None = None) -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        now = now_ms()
        self._append(
            {"do": "finish", "run": run, "status": status, "tags": dict(tags or {}), "at": now}
        )

    def artifact(self, run: str, path: str) -> None:
        """Keep a file with the run. It must stay where it is until it has been sent."""
        self._append({"do": "artifact", "run": run, "path": path})

    def model(self, run: str, folder: str) -> None:
        """Keep an exported model with the run, as an MLflow model."""
        self._append({"do": "model", "run": run, "folder": folder})

    def request_stop(self, run: str) -> None:
        """Answer the run's next `log` with the wish that it stop."""
        self._stopping.add(run)

    def watch(self, run: str) -> tuple[int, list[Row]]:
        """Steps done by a run, and its metrics since the last call."""
        with self._lock:
            return self._steps.get(run, 0), list(self._rows.pop(run, ()))

    def pending(self) -> tuple[int, str | None]:
        """Bytes not yet sent to MLflow, and the error that keeps them here."""
        return self._spool.pending_bytes, self._error

    def read(self, run: str) -> dict[str, Any]:
        """What MLflow itself has of a run: `run_id`, `metrics`, `status`, `model_uri`, `url`."""
        return self._store.read(run)

    def close(self) -> None:
        """Stop sending, after the operation under way."""
        self._closed.set()
        self._wake.set()
        self._sender.join()

    def _append(self, operation: dict[str, Any]) -> None:
        with self._lock:
            self._remember(operation)
            self._spool.append(operation)
        self._wake.set()

    def _remember(self, operation: dict[str, Any]) -> None:
        if operation["do"] == "start":
            self._known.add(operation["key"])
            self._store.identities[operation["key"]] = operation["id"]
        elif operation["do"] == "log":
            run = operation["run"]
            for row in operation["rows"]:
                self._last_step[run, row[0]] = max(row[2], self._last_step.get((run, row[0]), -1))
            self._rows[run].extend(tuple(row) for row in operation["rows"])

    def _send_all(self) -> None:
        pause_s = 0.2
        while not self._closed.is_set():
            self._wake.wait(timeout=1.0)
            self._wake.clear()
            try:
                for operations, offset in _batches(self._spool.read(self._spool.sent)):
                    for operation in operations:
                        self._send(operation)
                    self._spool.commit(offset)
                self._error, pause_s = None, 0.2
            except Exception as error:  # whatever MLflow raises: nothing is lost, it is tried again
                self._error = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"tracking: {self._error}; trying again", flush=True)
                self._closed.wait(pause_s)
                pause_s = min(30.0, pause_s * 2)
                self._wake.set()

    def _send(self, operation: dict[str, Any]) -> None:
        try:
            self._store.send(operation)
        except Exception as error:
            refused = getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"
            if not (refused or isinstance(error, FileNotFoundError)):
                raise
            # Trying again cannot help, and must not hold up what comes after.
            print(f"tracking: {operation['do']} dropped: {error}", flush=True)


def _batches(
    operations: Iterator[tuple[dict[str, Any], int]],
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Operations in order, the metrics of neighbours put together, with the byte after them.

    What is sent again after a crash is at most one such group.
    """
    merged: dict[str, list[Row]] = {}
    count, end = 0, 0
    for operation, offset in operations:
        if operation["do"] == "log" and count < BATCH:
            merged.setdefault(operation["run"], []).extend(operation["rows"])
            count += len(operation["rows"])
            end = offset
            continue
        if merged:
            yield [{"do": "log", "run": run, "rows": rows} for run, rows in merged.items()], end
            merged, count = {}, 0
        yield [operation], offset
    if merged:
        yield [{"do": "log", "run": run, "rows": rows} for run, rows in merged.items()], end


class _Store:
    """The operations of the spool, said to MLflow. Each may be said twice."""

    def __init__(self, uri: str, experiment: str) -> None:
        # MLflow's own defaults block a call for four minutes when the server is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._uri, self._experiment = uri, experiment
        self.identities: dict[str, str] = {}
        """Our own name for each run, by key: what finds a run again that MLflow made for us."""
        self._run_ids: dict[str, str] = {}
        self._connection: Any = None
        self._experiment_id = ""

    def _client(self) -> Any:
        if self._connection is None:
            import mlflow
            from filelock import FileLock

            mlflow.set_tracking_uri(self._uri)
            client = mlflow.MlflowClient()
            # Processes that make a fresh SQLite store together break each other's migrations.
            with FileLock(cache_folder() / "mlflow.lock"):
                found = client.get_experiment_by_name(self._experiment)
                self._experiment_id = (
                    found.experiment_id if found else self._make_experiment(client)
                )
            self._connection = client
        return self._connection

    def _make_experiment(self, client: Any) -> str:
        location = None
        if self._uri.startswith("sqlite:///"):
            database = Path(self._uri.removeprefix("sqlite:///")).resolve()
            location = (database.parent / "mlartifacts").as_uri()
        # Without it MLflow's pages open on its tools for language-model traces.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(self._experiment, location, kind))

    def _run_id(self, key: str) -> str:
        """MLflow's id of a run; looked up by our tag, since making a run is not idempotent."""
        if key not in self._run_ids:
            client = self._client()
            found = client.search_runs(
                [self._experiment_id], f"tags.`{RUN_TAG}` = '{self.identities[key]}'", max_results=1
            )
            if not found:
                raise LookupError(f"MLflow has no run {key}")
            self._run_ids[key] = found[0].info.run_id
        return self._run_ids[key]

    def send(self, operation: dict[str, Any]) -> None:
        getattr(self, f"_send_{operation['do']}")(operation)

    def _send_start(self, operation: dict[str, Any]) -> None:
        from mlflow.entities import Param

        client, key = self._client(), operation["key"]
        try:
            run_id = self._run_id(key)
        except LookupError:
            tags = {**operation["tags"], RUN_TAG: operation["id"], "heliostat.key": key}
            if operation["parent"] is not None:
                tags["mlflow.parentRunId"] = self._run_id(operation["parent"])
            name = key.rpartition("/")[2]
            run = client.create_run(self._experiment_id, tags=tags, run_name=name)
            run_id = self._run_ids[key] = run.info.run_id
        params = [Param(name, _text(value)) for name, value in operation["params"].items()]
        client.log_batch(run_id, params=params)

    def _send_resume(self, operation: dict[str, Any]) -> None:
        client, run_id = self._client(), self._run_id(operation["run"])
        client.update_run(run_id, status="RUNNING")
        for name, value in operation["tags"].items():
            client.set_tag(run_id, name, value)

    def _send_log(self, operation: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, at, step) for name, value, step, at in operation["rows"]]
        self._client().log_batch(self._run_id(operation["run"]), metrics=metrics)

    def _send_finish(self, operation: dict[str, Any]) -> None:
        client, run_id = self._client(), self._run_id(operation["run"])
        for name, value in operation["tags"].items():
            client.set_tag(run_id, name, value)
        client.set_terminated(run_id, operation["status"], operation["at"])

    def _send_artifact(self, operation: dict[str, Any]) -> None:
        self._client().log_artifact(self._run_id(operation["run"]), operation["path"])

    def _send_model(self, operation: dict[str, Any]) -> None:
        from trainers.export import log_to_mlflow

        self._client()
        run_id = self._run_id(operation["run"])
        if not self._model_of(run_id):
            log_to_mlflow(Path(operation["folder"]), run_id)

    def _model_of(self, run_id: str) -> str | None:
        client = self._client()
        found = client.search_logged_models(
            [self._experiment_id], filter_string=f"source_run_id = '{run_id}'", max_results=1
        )
        return f"models:/{found[0].model_id}" if found else None

    def read(self, key: str) -> dict[str, Any]:
        client, run_id = self._client(), self._run_id(key)
        run = client.get_run(run_id)
        return {
            "run_id": run_id,
            "experiment_id": run.info.experiment_id,
            "status": run.info.status,
            "metrics": dict(run.data.metrics),
            "model_uri": self._model_of(run_id),
        }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class Reporter(Protocol):
    """What the training loop says about itself. Nothing but `flush` ever waits."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take metrics measured after `step` steps."""

    def tick(self, step: int) -> None:
        """Called after every step."""

    def flush(self) -> None:
        """Return when all that was logged is safe from the death of this process."""

    def evaluated(
        self, metrics: Mapping[str, float], step: int, checkpoints: "Checkpoints"
    ) -> None:
        """Called after the metrics of an evaluation were logged, and the state saved if due."""

    def should_stop(self) -> bool:
        """Whether somebody wants the run to stop; it may take a second to be heard."""


class TrackerReporter:
    """A reporter that sends to a tracker actor twice a second at most."""

    def __init__(self, tracker: Any, run: str, interval_s: float = 0.5) -> None:
        self._tracker, self._run, self._interval_s = tracker, run, interval_s
        self._lock = threading.Lock()  # checkpoints are written, and flush, in a thread
        self._rows: list[Row] = []
        self._step = 0
        self._next_send = 0.0
        self._in_flight: list[Any] = []
        self._stop = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = now_ms()
        rows = [(name, float(value), step, now) for name, value in metrics.items()]
        with self._lock:
            self._rows += rows

    def tick(self, step: int) -> None:
        self._step = step
        now = time.monotonic()
        if now >= self._next_send:
            self._next_send = now + self._interval_s
            self._collect(self._send(), timeout_s=0)

    def _send(self) -> list[Any]:
        with self._lock:
            rows, self._rows = self._rows, []
            self._in_flight.append(self._tracker.log.remote(self._run, rows, self._step))
            return list(self._in_flight)

    def _collect(self, sent: list[Any], timeout_s: float | None) -> None:
        import ray

        done, _ = ray.wait(sent, num_returns=len(sent), timeout=timeout_s)
        stop = any(ray.get(done))
        with self._lock:
            self._stop |= stop
            self._in_flight = [ref for ref in self._in_flight if ref not in done]

    def flush(self) -> None:
        self._collect(self._send(), timeout_s=None)

    def evaluated(
        self, metrics: Mapping[str, float], step: int, checkpoints: "Checkpoints"
    ) -> None:
        pass

    def should_stop(self) -> bool:
        return self._stop


class SilentReporter:
    """The reporter of all workers but the first."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def tick(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def evaluated(
        self, metrics: Mapping[str, float], step: int, checkpoints: "Checkpoints"
    ) -> None:
        pass

    def should_stop(self) -> bool:
        return False


def start_tracker(folder: Path, uri: str, experiment: str, name: str) -> Any:
    """The tracker of a train or sweep as a Ray actor on this machine, its spool in `folder`.

    Whoever has no handle finds the actor by `name`, the key of the train or sweep.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Tracker).options(
        name=name, num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    return actor.remote(str(folder), uri, experiment)


def drain(tracker: Any, timeout_s: float) -> str | None:
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
