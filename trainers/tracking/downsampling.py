"""Which points of a very long series MLflow is given; the spool keeps them all.

MLflow gets slow with long histories: a batch that repeats one metric took 12 s where the
series had 100,000 points, and its pages draw 2,500. So the first 20,000 points of a series are
sent as they are, and of those after them one of the last, the least and the greatest of each
window. Windows are 8 points wide and twice as wide whenever the series is twice as long: a million
points come to about 60,000. The grid is even but for that, since nobody knows how long a series
will be.
"""

import math
from dataclasses import dataclass
from itertools import chain

from trainers.tracking.operation_log import MetricPoint

EXACT_POINTS = 20_000
FIRST_WINDOW = 8
DOWNSAMPLING_NOTE = (
    f"the first {EXACT_POINTS:,} points of each metric are whole; after them the last, the least and "
    "the greatest of windows that widen; all points are in the run's folder, track/spool.jsonl"
)


@dataclass
class _Series:
    count: int = 0
    width: int = 0
    """Points in the open window when it is full; 0 when no window is open."""
    filled: int = 0
    last: MetricPoint | None = None
    least: MetricPoint | None = None
    greatest: MetricPoint | None = None

    def add(self, row: MetricPoint) -> list[MetricPoint]:
        self.count += 1
        if self.count <= EXACT_POINTS:
            return [row]
        if not self.width:
            self.width, self.filled = FIRST_WINDOW << int(math.log2(self.count / EXACT_POINTS)), 0
            self.least = self.greatest = None
        self.filled += 1
        self.last = row
        if not math.isnan(row[1]):
            self.least = row if self.least is None or row[1] < self.least[1] else self.least
            more = self.greatest is None or row[1] > self.greatest[1]
            self.greatest = row if more else self.greatest
        if self.filled < self.width:
            return []
        self.width = 0
        return self.window()

    def window(self) -> list[MetricPoint]:
        """The points of the newest window that are sent, in order."""
        points = {row[2]: row for row in (self.least, self.greatest, self.last) if row}
        return [points[step] for step in sorted(points)]


class Downsampler:
    """Picks the points of each series; a function of what it has taken, in that order."""

    def __init__(self) -> None:
        self._series: dict[str, dict[str, _Series]] = {}

    def add(self, run: str, rows: list[MetricPoint]) -> list[MetricPoint]:
        """What of a run's new points is to be sent."""
        series = self._series.setdefault(run, {})
        return list(chain(*(series.setdefault(row[0], _Series()).add(row) for row in rows)))

    def open_windows(self, run: str) -> list[MetricPoint]:
        """What of windows that are not full yet would be sent, the last point above all.

        It is sent again when they are full, as the same points.
        """
        return list(chain(*(s.window() for s in self._series.get(run, {}).values() if s.width)))

    def is_downsampled(self, run: str) -> bool:
        """Whether MLflow has not been given all points of a run."""
        return any(series.count > EXACT_POINTS for series in self._series.get(run, {}).values())

    @property
    def runs(self) -> list[str]:
        return list(self._series)
