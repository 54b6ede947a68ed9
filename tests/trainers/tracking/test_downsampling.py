"""Downsampled series keep their shape; short series are complete."""

import math
from collections.abc import Iterator
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.tracking.downsampling import EXACT_POINTS, Downsampler
from trainers.tracking.operation_log import MetricPoint

CHUNKS = st.lists(st.integers(1, 40_000), min_size=1, max_size=6)


def series(length: int, peak: int) -> list[MetricPoint]:
    """A falling curve with one spike, one dip and one NaN."""
    values = {peak: 1e6, peak // 2: -1e6, peak // 3: math.nan}
    return [MetricPoint("loss", values.get(i, 1 / (i + 1)), i, i) for i in range(length)]


def in_parts(rows: list[MetricPoint], sizes: list[int]) -> Iterator[list[MetricPoint]]:
    for size in sizes:
        yield rows[:size]
        rows = rows[size:]


@settings(max_examples=20, deadline=None)
@given(CHUNKS, st.floats(0, 0.999))
def test_extremes_and_the_last_point_are_kept(sizes: list[int], place: float) -> None:
    rows = series(sum(sizes), int(place * sum(sizes)))
    sampler, whole = Downsampler(), Downsampler()
    sent = [row for part in in_parts(rows, sizes) for row in sampler.add("run", part)]
    assert sent == whole.add("run", rows), "how the points are divided into calls must not matter"
    assert sent[:EXACT_POINTS] == rows[:EXACT_POINTS]
    assert sampler.is_downsampled("run") == (len(rows) > EXACT_POINTS)
    sent += sampler.open_windows("run")
    steps = [row[2] for row in sent]
    assert steps == sorted(set(steps)), "nothing twice"
    assert sent[-1] == rows[-1]
    values = [0.5, *(row[1] for row in rows if not math.isnan(row[1]))]
    kept = [0.5, *(row[1] for row in sent if not math.isnan(row[1]))]
    assert (min(kept), max(kept)) == (min(values), max(values))
    assert all(b - a <= 64 for a, b in pairwise(steps))


def test_a_long_series_is_sent_as_few_points() -> None:
    sent = len(Downsampler().add("run", series(300_000, 200_000)))
    assert 1.5 * EXACT_POINTS < sent < 3 * EXACT_POINTS
