"""What MLflow cannot hold: odd names, long texts, large numbers, and very long series.

MLflow gets slow with long histories: a batch that repeats one metric took 12 s where the
series had 100,000 points, and its pages draw 2,500. So the first 20,000 points of a series are
sent as they are. After them, the last, the least and the greatest point of each window are sent.
Windows are 8 points wide, and twice as wide whenever the series is twice as long: a million points
come to about 60,000. The grid is even but for that, since the final length of a series is unknown.
The operation log keeps all points.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from trainers.engine.reporter import mlflow_name
from trainers.tracking.operation_log import MetricPoint

MAX_LENGTH = {"parameters": 6000, "tags": 5000}
"""Characters. MLflow cuts longer parameters without a word, and refuses longer tags."""
EXACT_POINTS = 20_000
FIRST_WINDOW = 8
DOWNSAMPLING_NOTE = (
    f"the first {EXACT_POINTS:,} points of each metric are complete; after them the last, the "
    "least and the greatest of widening windows; all points are in the run's folder, "
    "track/spool.jsonl"
)


class NumberOutOfRangeError(ValueError):
    """A step or timestamp does not fit in the 64 bits that MLflow's requests have for it."""


def check_range(points: Iterable[MetricPoint]) -> None:
    """Raises NumberOutOfRangeError."""
    for point in points:
        for number in (point.step, point.timestamp_ms):
            if not -(2**63) <= number < 2**63:
                raise NumberOutOfRangeError(f"{number} does not fit in 64 bits")


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def excerpt(text: str, file: str) -> str:
    """The beginning of a text that is too long, and where the whole of it is."""
    return f"{text[:200]}... ({len(text)} characters, whole in {file})"


class AllowedNames:
    """Maps names to names that MLflow accepts, one to one among the names of a run and kind.

    The first of several names that would become the same one gets it; to the others a part of
    their hash is appended. So the result depends on the order of the calls, which must be that of
    the operation log.
    """

    def __init__(self) -> None:
        self._allowed: dict[tuple[str, str, str], str] = {}
        self._original: dict[tuple[str, str, str], str] = {}

    def get(self, run: str, kind: str, name: str) -> str:
        known = self._allowed.get((run, kind, name))
        if known is not None:
            return known
        allowed = mlflow_name(name)
        if self._original.setdefault((run, kind, allowed), name) != name:
            allowed = f"{allowed}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
            self._original[run, kind, allowed] = name
        self._allowed[run, kind, name] = allowed
        return allowed


@dataclass
class _Series:
    count: int = 0
    width: int = 0
    """Points in the open window when it is full; 0 when no window is open."""
    filled: int = 0
    last: MetricPoint | None = None
    least: MetricPoint | None = None
    greatest: MetricPoint | None = None

    def add(self, point: MetricPoint) -> list[MetricPoint]:
        """Take the next point; returns the points that are to be sent now."""
        self.count += 1
        if self.count <= EXACT_POINTS:
            return [point]
        if not self.width:
            self.width, self.filled = FIRST_WINDOW << int(math.log2(self.count / EXACT_POINTS)), 0
            self.least = self.greatest = None
        self.filled += 1
        self.last = point
        if not math.isnan(point.value):
            if self.least is None or point.value < self.least.value:
                self.least = point
            if self.greatest is None or point.value > self.greatest.value:
                self.greatest = point
        if self.filled < self.width:
            return []
        self.width = 0
        return self.window()

    def window(self) -> list[MetricPoint]:
        """The points of the newest window that are sent, in order."""
        points = {point.step: point for point in (self.least, self.greatest, self.last) if point}
        return [points[step] for step in sorted(points)]


class Downsampler:
    """Selects the points of each series; a function of the points added, in their order."""

    def __init__(self) -> None:
        self._series: dict[str, dict[str, _Series]] = {}

    def add(self, run: str, points: list[MetricPoint]) -> list[MetricPoint]:
        """Take a run's new points; returns the points that are to be sent now."""
        series = self._series.setdefault(run, {})
        return list(
            chain(*(series.setdefault(point.name, _Series()).add(point) for point in points))
        )

    def open_windows(self, run: str) -> list[MetricPoint]:
        """The points that stand for windows that are not full yet, with the last point of each.

        They are sent again, as the same points, when the windows are full.
        """
        return list(chain(*(s.window() for s in self._series.get(run, {}).values() if s.width)))

    def is_downsampled(self, run: str) -> bool:
        """Whether MLflow was not sent all points of a run."""
        return any(series.count > EXACT_POINTS for series in self._series.get(run, {}).values())

    @property
    def runs(self) -> list[str]:
        return list(self._series)
