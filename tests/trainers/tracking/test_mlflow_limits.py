"""What MLflow cannot hold: names become allowed ones, and downsampled series keep their shape."""

import math
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.tracking.mlflow_limits import (
    EXACT_POINTS,
    AllowedNames,
    Downsampler,
    NumberOutOfRangeError,
    check_range,
)
from trainers.tracking.mlflow_store import is_permanent_error
from trainers.tracking.operation_log import MetricPoint

CHUNKS = st.lists(st.integers(1, 40_000), min_size=1, max_size=6)


@given(st.lists(st.text("a_@#./ ", min_size=1, max_size=6), unique=True))
def test_names_are_allowed_and_one_to_one(names: list[str]) -> None:
    first, second = AllowedNames(), AllowedNames()
    allowed = [first.get("run", "metric", name) for name in names]
    assert len(set(allowed)) == len(names)
    assert allowed == [second.get("run", "metric", name) for name in names]
    assert all(re.fullmatch(r"[/\w.\- :]{1,250}", name) for name in allowed)


def test_runs_and_kinds_have_their_own_names() -> None:
    names = AllowedNames()
    assert {names.get("a", "metric", "x@"), names.get("b", "metric", "x#")} == {"x_"}
    assert names.get("a", "param", "x#") == "x_"
    assert re.fullmatch(r"x_-[0-9a-f]{8}", names.get("a", "metric", "x#"))


@pytest.mark.parametrize("step", [2**63, -(2**63) - 1])
def test_a_number_that_does_not_fit_is_a_permanent_error(step: int) -> None:
    with pytest.raises(NumberOutOfRangeError, match=str(step)) as refused:
        check_range([MetricPoint("loss", 0.0, step, 0)])
    assert is_permanent_error(refused.value)
    assert not is_permanent_error(ValueError("of MLflow's own code"))
    check_range([MetricPoint("loss", 0.0, 2**63 - 1, -(2**63))])


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
