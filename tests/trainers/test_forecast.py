"""Forecasts: what they add up, what is remembered, what residuals do to the next intervals."""

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.forecast import (
    Forecast,
    Interval,
    Length,
    Memory,
    added,
    compared,
    forecast,
    key_of,
    keys_of,
    length,
    score,
    widening,
)
from trainers.pools import Pool, Probe, probed
from trainers.run import settled
from trainers.scaling import Place, Unknown
from trainers.spec import RunSpec, find_spec, resolve

NUMBERS = st.floats(1e-3, 1e6)


@given(NUMBERS, st.floats(0.01, 3), NUMBERS, st.floats(0.01, 3))
def test_intervals_hold_their_middle(a: float, error: float, b: float, other: float) -> None:
    x, y = Interval.around(a, error), Interval.around(b, other)
    for found in (added([x, y]), x.times(y), x.times(3.0), x.widened(0.5), x.widened(2)):
        assert 0 <= found.low <= found.middle <= found.high
    assert added([x, y]).high <= x.high + y.high  # not both are wrong at once
    assert x.times(y).high >= max(x.high * y.middle, x.middle * y.high) * (1 - 1e-9)


def a_probe(workers: int, batch: int, step_s: float) -> Probe:
    place = Place(workers, 1, batch / workers, 2.0)
    return Probe(place, batch, step_s, 0.01, 9.0, 0.5, 0.2, 0.1, 1.0, {}, None, "cpu", None)


def test_a_forecast_adds_up_all_that_a_run_does() -> None:
    pool = Pool("cpu", (2,), 2.0)
    found = probed(pool, [a_probe(1, 64, 0.02), a_probe(2, 64, 0.015)], 64)
    whole = forecast(found, 2, Length(steps=1001, evaluations=10, tests=1, saves=4))
    assert isinstance(whole, Forecast)
    assert whole.wall_s.middle == pytest.approx(1000 * 0.015 + 9 + 10 * 0.5 + 0.2 + 4 * 0.1 + 1)
    assert whole.basis == "measured"
    assert isinstance(forecast(found, 3, Length(10, 1, 0, 1)), Unknown)


def test_the_length_of_a_run_is_that_of_its_loop() -> None:
    spec, _ = resolve(find_spec("digits")[1], RunSpec)
    assert length(spec, 1257, has_test=True) == Length(590, 6, 1, 1)
    every = spec.checkpoint.model_copy(update={"every_steps": 100})
    assert length(spec.model_copy(update={"checkpoint": every}), 1257, False).saves == 6
    best = spec.checkpoint.model_copy(update={"keep_best": 1})
    assert length(spec.model_copy(update={"checkpoint": best}), 1257, False).saves == 6


def test_the_shipped_error_bars_hold_until_there_are_runs() -> None:
    assert widening([]) == pytest.approx(1)
    assert widening([0.1] * 30) == 0.25  # not below a quarter
    assert widening([0.4] * 30) == pytest.approx(0.4)
    assert widening([3.0]) == 3.0  # one of eleven is more than one of ten
    few = [widening([2.0] * count) for count in range(11)]
    assert few == sorted(few)
    narrower = [widening([0.3] * count) for count in range(12)]
    assert narrower == sorted(narrower, reverse=True)


def test_nine_of_ten_later_runs_lie_within_whatever_the_errors_are() -> None:
    """With errors twice as large as shipped, and of another shape: the guarantee is free of it."""
    draw = random.Random(0)
    inside = []
    for _ in range(300):
        seen = [draw.expovariate(1) for _ in range(40)]
        inside.append(draw.expovariate(1) <= widening(seen))
    assert 0.85 <= sum(inside) / len(inside) <= 0.95


def test_scores_do_not_depend_on_how_wide_the_interval_was_made() -> None:
    narrow = Forecast(Interval.around(100, 0.2), Interval(1, 1, 1), "measured")
    wide = Forecast(narrow.wall_s.widened(3), narrow.step_s, "measured", 3.0)
    assert score(narrow, 120) == pytest.approx(1)
    assert score(wide, 120) == pytest.approx(1)
    assert score(wide, 100 / 1.2) == pytest.approx(-1)


def test_what_was_forecast_is_found_again_by_the_run_that_does_it(tmp_path: Path) -> None:
    spec, _ = resolve({**find_spec("digits")[1], "storage": str(tmp_path)}, RunSpec)
    data = settled(spec)
    elsewhere = {**data, "storage": "/other", "tracking": {**data["tracking"], "uri": "http://x"}}
    two = {**data, "scale": {**data["scale"], "workers": 2}}
    wider = {**data, "model": {**data["model"], "width": 24}}
    memory = Memory(tmp_path)
    assert memory.recall([key_of(data, "cpu")]) is None
    older = Forecast(Interval(1, 2, 3), Interval(1, 2, 3), "measured", 1.0, 5.0)
    newer = Forecast(Interval(4, 5, 6), Interval(1, 2, 3), "measured", 1.5, 6.0)
    for each in (older, newer):
        memory.remember(key_of(data, "cpu"), each)
    assert Memory(tmp_path).recall(keys_of(elsewhere, with_gpus=False)) == newer
    assert memory.recall(keys_of(data, with_gpus=True)) is None
    for other in (two, wider):
        assert memory.recall(keys_of(other, with_gpus=False)) is None


def test_what_runs_took_is_kept_and_a_torn_line_is_nothing(tmp_path: Path) -> None:
    expected = Forecast(Interval.around(10, 0.2), Interval(1, 1, 1), "measured")
    memory = Memory(tmp_path)
    memory.took("first", expected, 12.0)
    with (tmp_path / "forecasts.jsonl").open("a") as file:
        file.write('{"kind": "actual", "sco\n')
    memory.took("second", expected, 10.0)
    assert memory.scores() == [pytest.approx(1), 0.0]
    assert math.isclose(widening(memory.scores()), widening([1.0, 0.0]))
    assert compared(expected, 12.5) == (
        "10 s forecast (measured), 12.5 s taken: +25%, outside 8.33 to 12 s"
    )
