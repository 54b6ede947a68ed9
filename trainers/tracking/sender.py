"""From the operation log to MLflow, group by group, in a thread that tries again after errors.

Whatever the error, nothing is lost while MLflow takes nothing at all. But where it refuses one
operation, again and again, and takes another one of the same run in between, the refusal is for
good: what is refused is left out, as little as possible of it, and the run is tagged with it.
"""

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Protocol

from trainers.tracking.mlflow_limits import DOWNSAMPLING_NOTE, Downsampler
from trainers.tracking.mlflow_store import MlflowStore, is_permanent_error
from trainers.tracking.operation_log import MetricPoint, OperationLog, group_operations
from trainers.tracking.refusals import Refusals, parts_of

logger = logging.getLogger(__name__)

FILES = ("artifact", "model")
"""Operations that a `FileSender` sends."""
SYNC_S = 1.0
"""Longest time between two writes of the log to the disk."""
REST = 4
"""Times that a send took for which the next one is put off, up to SYNC_S: many small operations
are cheaper together."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
"""Pauses after errors; each is twice as long as the one before."""
PATIENCE = 6
"""Failures of an operation, one after the other, after which MLflow is asked whether it takes
another one: 6 s after the first, if each is answered at once."""
PROOFS = 3
"""How often an operation is sent again before it is left out, each time after MLflow has taken
another one."""
MAX_REFUSED_POINTS = 20
"""Refused points of a series after which its points are no more tried one by one."""


class Sender:
    """Sends a log in its order, without files. After an error it goes on with what failed."""

    def __init__(
        self,
        log: OperationLog,
        store: MlflowStore,
        refusals: Refusals,
        patience: int = PATIENCE,
        on_sent: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_sent` is called when more of the log has been sent."""
        self._log, self._store, self._refusals = log, store, refusals
        self._patience, self._on_sent = patience, on_sent
        self._downsampler = Downsampler()
        self._downsampling_noted: set[str] = set()
        self._running: set[str] = set()
        """Runs that have not ended, as far as the log was sent."""
        self._group: deque[dict[str, Any]] = deque()
        self._ended: set[str] = set()
        """Runs of the group that have ended."""
        self._failures = 0
        """How often the first operation of the group has failed."""
        self._suspects = 0
        """How many operations at the begin of the group are parts of one that was refused."""
        self._refused_points: Counter[tuple[str, str]] = Counter()
        self._end = log.sent_offset
        store.on_run_created = self._on_run_created

    def _on_run_created(self, key: str, run_id: str) -> None:
        """Record MLflow's id of a run. Should MLflow have made two runs, this is the one used."""
        self._log.append({"do": "made", "key": key, "id": run_id})

    def observe(self, operation: dict[str, Any], sent: bool) -> None:
        """Learn from an operation in the log, and from whether it was sent to MLflow before.

        Must be called in the order of the log. Metrics may be left out.
        """
        if operation["do"] == "start":
            self._store.run_tags[operation["key"]] = operation["id"]
        elif operation["do"] == "made":
            self._store.run_ids[operation["key"]] = operation["id"]
        if sent:
            self._note_end(operation)

    def _note_end(self, operation: dict[str, Any]) -> None:
        if operation["do"] in ("start", "resume"):
            self._running.add(operation["key" if operation["do"] == "start" else "run"])
        elif operation["do"] == "finish":
            self._running.discard(operation["run"])

    def send(self, closed: threading.Event) -> None:
        """Send everything, or up to the group in which `closed` is set; raises as MLflow does."""
        while not closed.is_set():
            if not self._group:
                begin = self._end
                operations, self._end = next(group_operations(self._log.read(begin)), ([], begin))
                self._group.extend(self._downsampled(operations, begin))
                self._ended |= {o["run"] for o in operations if "run" in o} - self._running
                if not operations:
                    return
            self._send_group()
            self._log.commit(self._end)
            self._on_sent()

    def send_open_windows(self) -> None:
        """Send the newest points of downsampled series, too."""
        for run in sorted(self._running):
            self._learn(run, {}, self._end)
            self._group.extend(self._open_windows(run))
        self._send_group()

    def _open_windows(self, run: str) -> list[dict[str, Any]]:
        points = self._downsampler.open_windows(run)
        return [{"do": "log", "run": run, "rows": points}] if points else []

    def _downsampled(self, operations: list[dict[str, Any]], begin: int) -> list[dict[str, Any]]:
        """A group of operations from byte `begin` on, with the metrics that MLflow is given."""
        result = []
        for operation in operations:
            if operation["do"] in FILES:
                continue
            run = operation.get("run", "")
            self._note_end(operation)
            if operation["do"] == "start":
                self._downsampler.restore(operation["key"], {})
            elif operation["do"] in ("resume", "log", "finish"):
                self._learn(run, operation, begin)
            if operation["do"] == "finish":
                result += self._open_windows(run)
            if operation["do"] != "log":
                result.append(operation)
                continue
            points = [MetricPoint(*row) for row in operation["rows"]]
            sent_points = self._downsampler.add(run, points)
            if self._downsampler.is_downsampled(run) and run not in self._downsampling_noted:
                self._downsampling_noted.add(run)
                tags = {"heliostat.sampled": DOWNSAMPLING_NOTE}
                result.append({"do": "tag", "run": run, "tags": tags})
            if sent_points:
                result.append({**operation, "rows": sent_points})
        return result

    def _learn(self, run: str, operation: dict[str, Any], begin: int) -> None:
        """Learn the points of a run before `operation`, which is in the group from `begin` on.

        They are not kept in memory once a run has ended, or when the writer is started again.
        """
        if self._downsampler.knows(run):
            return
        series = operation.get("series")
        if series is not None:
            counts = {name: progress[1] for name, progress in series.items()}
            if self._downsampler.restore(run, counts):
                self._store.claim_names(run, counts)
                return
        self._downsampler.restore(run, {})
        for earlier in self._log.read_run(run, begin):
            if earlier["do"] == "log":
                points = [MetricPoint(*row) for row in earlier["rows"]]
                self._store.claim_names(run, (point.name for point in points))
                self._downsampler.add(run, points)

    def _send_group(self) -> None:
        if not self._suspects:
            for _ in range(self._store.send_in_bulk(self._group)):
                self._group.popleft()
        while self._group:
            operation = self._group[0]
            parts: list[dict[str, Any]] = []
            try:
                self._store.send(operation)
            except Exception as error:
                parts = self._after_error(operation, error)
            self._group.popleft()
            self._failures = 0
            self._suspects = max(0, self._suspects - 1) + len(parts)
            self._group.extendleft(reversed(parts))
        for run in self._ended:
            self._forget(run)
        self._ended.clear()

    def _after_error(self, operation: dict[str, Any], error: Exception) -> list[dict[str, Any]]:
        """The parts of an operation that MLflow refuses; none if it is left out.

        Raises the error where the operation may be taken later.
        """
        hopeless = self._is_hopeless(operation)
        parts = [] if hopeless else parts_of(operation)
        if not is_permanent_error(error):
            self._failures += 1
            if self._failures < self._patience and not self._suspects and not hopeless:
                raise error
            for _ in range(1 if parts else PROOFS):
                if not self._store.accepts(operation.get("run", operation.get("key", ""))):
                    raise error
                if not parts and self._is_sent(operation):
                    return []
        if not parts:
            self._leave_out(operation, error)
        return parts

    def _is_sent(self, operation: dict[str, Any]) -> bool:
        try:
            self._store.send(operation)
        except Exception:
            return False
        return True

    def _is_hopeless(self, operation: dict[str, Any]) -> bool:
        """Whether it is the points of series of which many points were refused."""
        names = {point.name for point in operation.get("rows", ())}
        refused = (self._refused_points[operation["run"], name] for name in names)
        return bool(names) and all(count > MAX_REFUSED_POINTS for count in refused)

    def _leave_out(self, operation: dict[str, Any], error: Exception) -> None:
        run = operation.get("run", operation.get("key", ""))
        for name in {point.name for point in operation.get("rows", ())}:
            self._refused_points[run, name] += 1
        tag = self._refusals.add(operation, error)
        try:
            self._store.send(tag)
        except Exception as again:
            if not is_permanent_error(again):
                raise

    def _forget(self, run: str) -> None:
        """Drop what is kept for a run that runs; the log has it."""
        self._downsampler.forget(run)
        self._downsampling_noted.discard(run)
        self._store.forget(run)
        for name in [name for name in self._refused_points if name[0] == run]:
            del self._refused_points[name]


class Sends(Protocol):
    """What a thread sends: a `Sender`, or a `FileSender`."""

    def send(self, closed: threading.Event) -> None: ...


class BackgroundSender:
    """A daemon thread that sends; every second it also writes the log to the disk."""

    def __init__(self, log: OperationLog | None, sender: Sends, hold_s: float = 0) -> None:
        """Nothing is sent before `release` is called, or `hold_s` are over. Without `log` nothing
        is written to the disk.
        """
        self._log, self._sender = log, sender
        self._held_until_s = time.monotonic() + hold_s
        self._closed, self._wake = threading.Event(), threading.Event()
        self._awaited = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="mlflow-sender")
        self.error: str | None = None
        """The error of the newest attempt; None after one that succeeded."""
        self.failures = 0
        """Attempts that failed since one succeeded."""

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is more to send."""
        self._wake.set()

    def release(self) -> None:
        """Send from now on; the log may have grown."""
        self._held_until_s = 0.0
        self.wake()

    def hurry(self) -> None:
        """Send at once: somebody waits for it."""
        self._awaited.set()
        self.wake()

    def close(self) -> None:
        """Stop after the operation under way; blocks until then."""
        self._closed.set()
        self.hurry()
        self._thread.join()

    def _run(self) -> None:
        os.nice(10)  # of this thread, on Linux: training goes first, but not alone
        pause_s = FIRST_PAUSE_S
        while not self._closed.is_set():
            self._wake.wait(timeout=SYNC_S)
            self._wake.clear()
            began_s = time.monotonic()
            try:
                if self._log is not None:
                    self._log.write_and_sync()
                if began_s >= self._held_until_s:
                    self._sender.send(self._closed)
                self.error, self.failures, pause_s = None, 0, FIRST_PAUSE_S
                self._awaited.wait(min(SYNC_S, REST * (time.monotonic() - began_s)))
                self._awaited.clear()
            except Exception as error:  # whatever MLflow raises: nothing is lost, it is tried again
                self.error = f"{type(error).__name__}: {error}".splitlines()[0]
                self.failures += 1
                logger.warning("MLflow: %s; trying again", self.error)
                self._closed.wait(pause_s)
                pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
                self._wake.set()
