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

from cluster.bill import Post
from trainers.mlflow_store import MlflowStore
from trainers.spool import Row, Spool, batches, now_ms


@dataclass(frozen=True)
class TrackedRun:
    """A run as it is made in MLflow."""

    key: str
    """Name within the train or sweep; the parent's children are `parent/child`."""
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None


def default_uri() -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


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
        self._lines: defaultdict[str, list[str]] = defaultdict(list)
        self._stopping: set[str] = set()
        self._posts: dict[str, Post] = {}
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._error: str | None = None
        self._store = MlflowStore(uri, experiment)
        for operation, _ in self._spool.read():
            self._remember(operation)
        self._rows.clear()
        self._sender = threading.Thread(target=self._send_all, daemon=True, name="mlflow-sender")
        self._sender.start()

    def start(self, run: TrackedRun) -> None:
        """Make the run in MLflow, or take it up again as running if it is there."""
        known = run.key in self._known
        if not known:
            self._store.new.add(run.key)
        operation = {"do": "resume", "run": run.key, "tags": dict(run.tags)}
        self._append(operation if known else {"do": "start", "id": uuid4().hex, **asdict(run)})

    def log(self, run: str, rows: list[Row], step: int) -> bool:
        """Take metrics of a run that has done `step` steps; tells whether it should stop."""
        with self._lock:
            self._steps[run] = step
        self.add(run, rows)
        return run in self._stopping

    def add(self, run: str, rows: list[Row]) -> None:
        """Take metrics of a run whose steps need not be optimizer steps."""
        with self._lock:
            new = [row for row in rows if row[2] > self._last_step.get((run, row[0]), -1)]
        if new:
            self._append({"do": "log", "run": run, "rows": new})

    def used(self, post: Post) -> None:
        """Take what a meter says of itself, in place of what it said before."""
        with self._lock:
            self._posts[post.session] = post

    def posts(self) -> list[Post]:
        """What the meters have said since the last call."""
        with self._lock:
            found, self._posts = list(self._posts.values()), {}
            return found

    def note(self, run: str, name: str, text: str) -> None:
        """Keep a fact about a run as its tag `heliostat.name`; the newest counts."""
        self.tell(run, f"{name}: {text}")
        tags = {f"heliostat.{name.replace(' ', '_')}": text}
        self._append({"do": "tag", "run": run, "tags": tags})

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

    def tell(self, run: str, line: str) -> None:
        """A line for whoever watches the run."""
        with self._lock:
            self._lines[run].append(line)

    def watch(self, run: str) -> tuple[int, list[Row], list[str]]:
        """Steps done by a run, and its metrics and its lines since the last call."""
        with self._lock:
            rows = list(self._rows.pop(run, ()))
            return self._steps.get(run, 0), rows, self._lines.pop(run, [])

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
        os.nice(19)  # of this thread, on Linux: what trains goes first
        pause_s = 0.2
        while not self._closed.is_set():
            self._wake.wait(timeout=1.0)
            self._wake.clear()
            try:
                for operations, offset in batches(self._spool.read(self._spool.sent)):
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
