"""What the tracker keeps in memory: timestamps, steps already reported, and mail for the driver.

Plain state without locks or threads; the tracker guards it.
"""

from collections import defaultdict, deque
from collections.abc import Iterable

from cluster.cost.billing import UsageReport
from trainers.tracking.operation_log import MetricPoint, now_ms

MAX_UNPOLLED_POINTS = 10_000
"""Points of a run that are kept for its driver; the oldest are dropped first."""


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
