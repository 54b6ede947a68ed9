"""From the operation log to MLflow, group by group, in a thread that tries again after errors."""

import logging
import os
import threading
import time
from collections import deque
from typing import Any

from trainers.tracking.mlflow_limits import DOWNSAMPLING_NOTE, Downsampler
from trainers.tracking.mlflow_store import MlflowStore, is_permanent_error
from trainers.tracking.operation_log import MetricPoint, OperationLog, group_operations

logger = logging.getLogger(__name__)

SYNC_S = 1.0
"""Longest time between two writes of the log to the disk."""
REST = 4
"""Times that a send took for which the next one is put off, up to SYNC_S: many small operations
are cheaper together."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0
"""Pauses after errors; each is twice as long as the one before."""


class Sender:
    """Sends a log in its order. After an error it goes on with the operation that failed."""

    def __init__(self, log: OperationLog, store: MlflowStore) -> None:
        self._log, self._store = log, store
        self._downsampler = Downsampler()
        self._downsampling_noted: set[str] = set()
        self._group: deque[dict[str, Any]] = deque()
        self._end = log.sent_offset
        store.on_run_created = self._on_run_created

    def _on_run_created(self, key: str, run_id: str) -> None:
        """Record MLflow's id of a run. Should MLflow have made two runs, this is the one used."""
        self._log.append({"do": "made", "key": key, "id": run_id})

    def observe(self, operation: dict[str, Any], sent: bool) -> None:
        """Learn from an operation in the log, and from whether it was sent to MLflow before.

        Must be called in the order of the log.
        """
        if operation["do"] == "start":
            self._store.run_tags[operation["key"]] = operation["id"]
        elif operation["do"] == "made":
            self._store.run_ids[operation["key"]] = operation["id"]
        elif sent and operation["do"] == "log":
            points = [MetricPoint(*row) for row in operation["rows"]]
            self._store.claim_names(operation["run"], points)
            self._downsampler.add(operation["run"], points)

    def send(self, closed: threading.Event) -> None:
        """Send everything, or up to the group in which `closed` is set; raises as MLflow does."""
        while not closed.is_set():
            if not self._group:
                operations, self._end = next(
                    group_operations(self._log.read(self._end)), ([], self._end)
                )
                self._group.extend(self._downsampled(operations))
                if not operations:
                    return
            for _ in range(self._store.send_in_bulk(self._group)):
                self._group.popleft()
            while self._group:
                self._send_one(self._group[0])
                self._group.popleft()
            self._log.commit(self._end)

    def send_open_windows(self) -> None:
        """Send the newest points of downsampled series, too."""
        for run in self._downsampler.runs:
            for operation in self._open_windows(run):
                self._send_one(operation)

    def _open_windows(self, run: str) -> list[dict[str, Any]]:
        points = self._downsampler.open_windows(run)
        return [{"do": "log", "run": run, "rows": points}] if points else []

    def _downsampled(self, operations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The operations, with the metrics that MLflow is given."""
        result = []
        for operation in operations:
            run = operation.get("run", "")
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

    def _send_one(self, operation: dict[str, Any]) -> None:
        """Send an operation; if MLflow refuses it for good, each of its metrics by itself."""
        try:
            self._store.send(operation)
        except Exception as error:
            if not is_permanent_error(error):
                raise
            names = {point.name for point in operation.get("rows", ())}
            if len(names) < 2:
                self._drop(operation, error)
            for name in sorted(names) if len(names) > 1 else ():
                points = [point for point in operation["rows"] if point.name == name]
                self._send_one({**operation, "rows": points})

    def _drop(self, operation: dict[str, Any], error: Exception) -> None:
        """Leave out an operation that would fail again, and tag the run with the reason."""
        names = "".join(sorted({f" {point.name}" for point in operation.get("rows", ())}))
        reason = str(error).splitlines()[0]
        logger.warning("MLflow refuses %s%s; left out: %s", operation["do"], names, reason)
        run = operation.get("run", operation.get("key"))
        tags = {f"heliostat.refused.{operation['do']}": f"{names.strip()}: {reason}"[:4000]}
        try:
            self._store.send({"do": "tag", "run": run, "tags": tags})
        except Exception as again:
            if not is_permanent_error(again):
                raise


class BackgroundSender:
    """A daemon thread that writes the log to the disk every second and sends it to MLflow."""

    def __init__(self, log: OperationLog, sender: Sender, hold_s: float = 0) -> None:
        """Nothing is sent before `release` is called, or `hold_s` are over."""
        self._log, self._sender = log, sender
        self._held_until_s = time.monotonic() + hold_s
        self._closed, self._wake = threading.Event(), threading.Event()
        self._awaited = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="mlflow-sender")
        self.error: str | None = None
        """The error of the newest attempt; None after one that succeeded."""

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """The log has grown."""
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
                self._log.write_and_sync()
                if began_s >= self._held_until_s:
                    self._sender.send(self._closed)
                self.error, pause_s = None, FIRST_PAUSE_S
                self._awaited.wait(min(SYNC_S, REST * (time.monotonic() - began_s)))
                self._awaited.clear()
            except Exception as error:  # whatever MLflow raises: nothing is lost, it is tried again
                self.error = f"{type(error).__name__}: {error}".splitlines()[0]
                logger.warning("MLflow: %s; trying again", self.error)
                self._closed.wait(pause_s)
                pause_s = min(LONGEST_PAUSE_S, pause_s * 2)
                self._wake.set()
