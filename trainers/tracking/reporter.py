"""What the training loop tells the world about itself, without ever waiting for it."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainers.tracking.operation_log import MetricPoint, now_ms

if TYPE_CHECKING:
    from trainers.checkpoints.checkpoints import Checkpoints


class TrackerReporter:
    """A reporter that sends to a tracker actor twice a second at most.

    `leaving` says in a phrase which machine is about to be taken away, or None.
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
        self._step = 0
        self._next_send = 0.0
        self._in_flight: list[Any] = []
        self._stop = False
        self._preemption_notice = preemption_notice
        self._preempted = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now = now_ms()
        rows = [(name, float(value), step, now) for name, value in metrics.items()]
        with self._lock:
            self._unsent_points += rows

    def log_note(self, name: str, text: str) -> None:
        with self._lock:
            self._in_flight.append(self._tracker.note.remote(self._run, name, text))

    def on_step_end(self, step: int) -> None:
        self._step = step
        now = time.monotonic()
        if now >= self._next_send:
            self._next_send = now + self._interval_s
            self._collect(self._send(), timeout_s=0)

    def _send(self, sync: bool = False) -> list[Any]:
        with self._lock:
            rows, self._unsent_points = self._unsent_points, []
            self._in_flight.append(self._tracker.log.remote(self._run, rows, self._step, sync))
            return list(self._in_flight)

    def _collect(self, sent: list[Any], timeout_s: float | None) -> None:
        import ray

        done, _ = ray.wait(sent, num_returns=len(sent), timeout=timeout_s)
        stop = any(ray.get(done))
        with self._lock:
            self._stop |= stop
            self._in_flight = [ref for ref in self._in_flight if ref not in done]

    def flush(self) -> None:
        self._collect(self._send(sync=True), timeout_s=None)

    def on_evaluation_end(
        self, metrics: Mapping[str, float], step: int, checkpoints: "Checkpoints"
    ) -> None:
        pass

    def should_stop(self) -> bool:
        return self._stop

    def preemption_pending(self) -> bool:
        if not self._preempted and (leaving := self._preemption_notice()):
            self._preempted = True
            self._tracker.tell.remote(self._run, f"{leaving}; saving after every step")
        return self._preempted
