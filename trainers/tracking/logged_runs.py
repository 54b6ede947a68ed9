"""How far each run got, as its log has it: in memory while it runs, in the log afterwards.

A sweep has thousands of trials that have ended, and each may get another point, of its cost, or be
started again. So the operations that such a run has from its end on carry its series as they were
before the operation: the last one of them is all that must be read to go on.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trainers.tracking.operation_log import MetricPoint, OperationLog

Series = dict[str, list[int]]
"""Name of each series of a run, in the order of their first points -> the step of its last point,
and the number of its points."""


def series_after(operation: Mapping[str, Any], series: Series) -> Series:
    """The series of a run after an operation; `series` may be changed."""
    if "series" in operation:
        series = _copy(operation["series"])
    if operation["do"] == "log":
        add_new_points(series, operation["rows"])
    elif operation["do"] == "rewind":
        for progress in series.values():
            progress[0] = min(progress[0], operation["step"] - 1)
    return series


def _copy(series: Mapping[str, list[int]]) -> Series:
    return {name: list(progress) for name, progress in series.items()}


def add_new_points(
    series: Series, points: Iterable[tuple[str, float, int, int]]
) -> list[MetricPoint]:
    """Add points to the series of a run; returns those that are new.

    A point is new if its step is later than any before it in the same series: after a recovery,
    steps are done again.
    """
    new = []
    for point in points:
        name, _, step, _ = point
        progress = series.setdefault(name, [-1, 0])
        if step > progress[0]:
            progress[0] = step
            progress[1] += 1
            new.append(MetricPoint(*point))
    return new


class LoggedRuns:
    """The series of the runs in a log, to which it appends the operations of runs."""

    def __init__(self, log: OperationLog, observe_ms: Callable[[int], None]) -> None:
        """`observe_ms` gets the timestamps of points."""
        self._log, self._observe_ms = log, observe_ms
        self._series: dict[str, Series] = {}
        """Of the runs that run, as far as they were read."""
        self._ended: dict[str, int | None] = {}
        """Runs that have ended -> the begin of the last operation that carries their series; None
        where it does not, in logs of earlier versions."""

    def observe(self, operation: Mapping[str, Any], begin: int) -> None:
        """Learn from an operation that the log had before; metrics may be left out."""
        run, do = operation.get("run", operation.get("key", "")), operation["do"]
        if do in ("start", "resume"):
            self._ended.pop(run, None)
        elif do == "finish" or (run in self._ended and do in ("log", "rewind")):
            self._ended[run] = begin if "series" in operation else None

    def is_running(self, run: str) -> bool:
        return run not in self._ended

    def append_start(self, operation: Mapping[str, Any]) -> tuple[int, int]:
        """Append the start of a new run."""
        self._series[operation["key"]] = {}
        return self._log.append(operation)

    def append_points(
        self, run: str, points: Iterable[tuple[str, float, int, int]]
    ) -> list[MetricPoint]:
        """Append the new ones of a run's points; returns them."""
        series = self._read(run)
        before = _copy(series) if run in self._ended else {}
        new = add_new_points(series, points)
        if new:
            for point in new:
                self._observe_ms(point.timestamp_ms)
            self._append({"do": "log", "run": run, "rows": new}, series, before)
        return new

    def append(self, operation: Mapping[str, Any]) -> tuple[int, int]:
        """Append an operation of a run that is neither its start nor metrics."""
        run, do = operation["run"], operation["do"]
        if do not in ("resume", "rewind", "finish"):
            return self._log.append(operation)
        before = self._read(run)
        series = series_after(operation, _copy(before))
        return self._append(operation, series, before)

    def _append(
        self, operation: Mapping[str, Any], series: Series, before: Series
    ) -> tuple[int, int]:
        """Append an operation after which a run has `series`, and had those `before`."""
        run, do = operation["run"], operation["do"]
        if run in self._ended or do == "finish":
            operation = {"do": do, "run": run, "series": before, **operation}
        begin, end = self._log.append(operation)
        ends = do == "finish" or (run in self._ended and do != "resume")
        if ends and self._log.write_error is None:
            self._series.pop(run, None)
            self._ended[run] = begin
        else:  # it runs; or the line is not in the file, from which it would be read
            self._series[run] = series
            self._ended.pop(run, None)
        return begin, end

    def _read(self, run: str) -> Series:
        """The series of a run now; they stay in memory if it runs."""
        if run in self._series:
            return self._series[run]
        begin = self._ended.get(run)
        if begin is not None:
            return series_after(self._log.read_at(begin), {})
        series: Series = {}
        for operation in self._log.read_run(run):
            series = series_after(operation, series)
            for _, _, _, timestamp_ms in operation.get("rows", ()):
                self._observe_ms(timestamp_ms)
        if run not in self._ended:
            self._series[run] = series
        return series
