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
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from trainers.engine.reporter import mlflow_name
from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.preflight import mask_password

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


def shortened(kind: str, texts: Mapping[str, str]) -> dict[str, str]:
    """The texts of a kind, with the beginning of those too long for MLflow and where they are."""
    short = dict(texts)
    for name, text in texts.items():
        if len(text) > MAX_LENGTH[kind]:
            file = _file_of_text(kind, name)
            short[name] = f"{text[:200]}... ({len(text)} characters, whole in {file})"
    return short


def long_texts(operation: Mapping[str, Any]) -> dict[str, str]:
    """The parameters and tags of an operation that are too long for MLflow, by their file."""
    found = {}
    for section, kind in (("params", "parameters"), ("tags", "tags")):
        for name, value in operation.get(section, {}).items():
            if isinstance(value, (str, list, dict)) and len(as_text(value)) > MAX_LENGTH[kind]:
                found[_file_of_text(kind, name)] = mask_password(as_text(value))
    return found


def _file_of_text(kind: str, name: str) -> str:
    return f"{kind}/{re.sub('[^A-Za-z0-9_.-]', '_', name)}.txt"


class AllowedNames:
    """Maps names to names that MLflow accepts, one to one among the names of a run and kind.

    The first of several names that would become the same one gets it; to the others a part of
    their hash is appended. So the result depends on the order of the calls, which must be that of
    the operation log.
    """

    def __init__(self) -> None:
        self._allowed: defaultdict[str, dict[tuple[str, str], str]] = defaultdict(dict)
        self._original: defaultdict[str, dict[tuple[str, str], str]] = defaultdict(dict)

    def get(self, run: str, kind: str, name: str) -> str:
        known = self._allowed[run].get((kind, name))
        if known is not None:
            return known
        allowed = mlflow_name(name)
        if self._original[run].setdefault((kind, allowed), name) != name:
            allowed = f"{allowed}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
            self._original[run][kind, allowed] = name
        self._allowed[run][kind, name] = allowed
        return allowed

    def forget(self, run: str) -> None:
        """Drop the names of a run, which must be given again before it has others."""
        self._allowed.pop(run, None)
        self._original.pop(run, None)


@dataclass(slots=True)
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

    def knows(self, run: str) -> bool:
        return run in self._series

    def restore(self, run: str, counts: Mapping[str, int]) -> bool:
        """Begin with the number of points of each series of a run.

        Returns False where that does not suffice: a series is downsampled, and depends on its
        points.
        """
        if any(count > EXACT_POINTS for count in counts.values()):
            return False
        self._series[run] = {name: _Series(count) for name, count in counts.items()}
        return True

    def forget(self, run: str) -> None:
        self._series.pop(run, None)

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
