"""The reporter of the first worker: sends metrics to the tracker without waiting for it."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from trainers.engine.reporter import NullReporter
from trainers.stores import external_wait
from trainers.tracking.operation_log import MetricPoint, now_ms


class TrackerReporter(NullReporter):
    """Sends to a tracker actor at most twice a second, and not before its last answer came.

    While the tracker is away, metrics wait in memory and are sent in one call when it is back.
    `preemption_notice` returns a phrase such as "node a is about to be preempted", or None.
    """

    def __init__(
        self,
        tracker: Any,
        run: str,
        interval_s: float = 0.5,
        preemption_notice: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._tracker, self._run, self._interval_s = tracker, run, interval_s
        self._lock = threading.Lock()  # checkpoints are written, and flush, in a thread
        self._unsent_points: list[MetricPoint] = []
        self._unsynced = True
        """Whether there is more than the last `flush` has sent."""
        self._step = 0
        self._next_send = 0.0
        self._in_flight: list[Any] = []
        self._stop = False
        self._preemption_notice = preemption_notice
        self._preempted = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now = now_ms()
        points = [MetricPoint(name, float(value), step, now) for name, value in metrics.items()]
        with self._lock:
            self._unsent_points += points
            self._unsynced = True

    def log_note(self, name: str, text: str) -> None:
        with self._lock:
            self._unsynced = True
            self._in_flight.append(self._tracker.log_note.remote(self._run, name, text))

    def on_step_end(self, step: int) -> None:
        self._step, self._unsynced = step, True
        now = time.monotonic()
        if now >= self._next_send:
            self._next_send = now + self._interval_s
            self._collect(timeout_s=0)
            # Calls to an actor that is away are queued without limit, and each `ray.wait` would
            # look at all of them.
            if not self._in_flight:
                self._send()

    def _send(self, sync: bool = False) -> None:
        with self._lock:
            points, self._unsent_points = self._unsent_points, []
            self._unsynced = not sync
            self._in_flight.append(self._tracker.log.remote(self._run, points, self._step, sync))

    def _collect(self, timeout_s: float | None) -> None:
        """Take the answers of the calls in flight; with None, wait for all of them."""
        import ray

        with self._lock:
            in_flight = list(self._in_flight)
        if not in_flight:
            return
        done, _ = ray.wait(in_flight, num_returns=len(in_flight), timeout=timeout_s)
        stop = any(ray.get(done))
        with self._lock:
            self._stop |= stop
            self._in_flight = [ref for ref in self._in_flight if ref not in done]

    def flush(self) -> None:
        if self._unsynced:
            self._send(sync=True)
        with external_wait():
            self._collect(timeout_s=None)

    def should_stop(self) -> bool:
        return self._stop

    def preemption_pending(self) -> bool:
        if not self._preempted and (notice := self._preemption_notice()):
            self._preempted = True
            self._tracker.post_message.remote(self._run, f"{notice}; saving after every step")
        return self._preempted
