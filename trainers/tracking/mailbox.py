"""What the tracker holds for the drivers of runs: points, messages, requests to stop."""

from collections import defaultdict, deque
from collections.abc import Iterable

from cluster.cost.billing import UsageReport
from trainers.tracking.operation_log import MetricPoint

MAX_UNPOLLED_POINTS = 10_000
"""Points of a run that are kept for its driver; the oldest are dropped first."""


class DriverMailbox:
    """Messages between the workers of each run and its driver, which polls.

    The points of a trial are kept only where it has a driver of its own, which watches it.
    """

    def __init__(self) -> None:
        self._points: dict[str, deque[MetricPoint]] = {}
        """Run that is watched -> its points that were not taken yet."""
        self._steps_done: dict[str, int] = {}
        self._messages: defaultdict[str, list[str]] = defaultdict(list)
        self._stop_requested: set[str] = set()
        self._usage_reports: dict[str, UsageReport] = {}

    def watch(self, run: str) -> None:
        """Keep the points of a run, from now on."""
        self._points.setdefault(run, deque(maxlen=MAX_UNPOLLED_POINTS))

    def put_points(self, run: str, points: Iterable[MetricPoint]) -> None:
        if "/" not in run:  # not a trial
            self.watch(run)
        if run in self._points:
            self._points[run].extend(points)

    def rewind(self, run: str, step: int) -> None:
        """Drop the points of `step` and later ones that were not taken."""
        if run in self._points:
            kept = [point for point in self._points[run] if point.step < step]
            self._points[run] = deque(kept, maxlen=MAX_UNPOLLED_POINTS)

    def put_step(self, run: str, step: int) -> None:
        self._steps_done[run] = step

    def put_message(self, run: str, message: str) -> None:
        self._messages[run].append(message)

    def take(self, run: str) -> tuple[int, list[MetricPoint], list[str]]:
        """Steps done by a run, and its points and messages since the last call."""
        points = list(self._points.pop(run, ()))
        self.watch(run)
        return self._steps_done.get(run, 0), points, self._messages.pop(run, [])

    def request_stop(self, run: str) -> None:
        self._stop_requested.add(run)

    def is_stop_requested(self, run: str) -> bool:
        return run in self._stop_requested

    def start(self, run: str) -> None:
        """A run starts, perhaps again: nothing of an earlier attempt counts."""
        self._stop_requested.discard(run)
        self._steps_done.pop(run, None)
        self._messages.pop(run, None)
        if run in self._points:
            self._points[run].clear()

    def finish(self, run: str) -> None:
        """Drop what nobody took. A request to stop stays: the workers may not know of it yet."""
        for kept in (self._points, self._steps_done, self._messages):
            kept.pop(run, None)

    def put_usage_report(self, report: UsageReport) -> None:
        """Replaces the report that the same meter sent before."""
        self._usage_reports[report.session] = report

    def take_usage_reports(self) -> list[UsageReport]:
        """The reports that meters sent since the last call."""
        reports, self._usage_reports = list(self._usage_reports.values()), {}
        return reports
