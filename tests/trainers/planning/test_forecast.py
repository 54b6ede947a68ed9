"""Forecasts: their sums, their history, and their calibration by earlier runs."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.planning.forecast import (
    Calibration,
    Forecast,
    ForecastHistory,
    Interval,
    RunLength,
    calibrate,
    describe_outcome,
    forecast,
    forecast_key,
    forecast_keys,
    run_length,
    score,
    sum_independent,
)
from trainers.planning.pools import Pool, ProbeResult, probed_pool
from trainers.planning.step_time import Placement, Unknown
from trainers.runs.run import resolved_data
from trainers.spec import RunSpec, find_spec, resolve

NUMBERS = st.floats(1e-3, 1e6)


@given(NUMBERS, st.floats(0.01, 3), NUMBERS, st.floats(0.01, 3))
def test_intervals_contain_their_middle(a: float, error: float, b: float, other: float) -> None:
    x, y = Interval.around(a, error), Interval.around(b, other)
    moved = [Calibration(shift, width) for shift in (-1.5, 0, 1.5) for width in (0.5, 2)]
    for found in (
        sum_independent([x, y]),
        x.times(y),
        x.times(3.0),
        *(x.calibrated(by) for by in moved),
    ):
        assert 0 <= found.low <= found.middle <= found.high
    assert sum_independent([x, y]).high <= x.high + y.high  # not both are wrong at once
    assert x.times(y).high >= max(x.high * y.middle, x.middle * y.high) * (1 - 1e-9)


def a_probe(workers: int, batch: int, step_s: float) -> ProbeResult:
    place = Placement(workers, 1, batch / workers, 2.0)
    return ProbeResult(place, batch, step_s, 0.01, 9.0, 0.5, 0.2, 0.1, 1.0, {}, None, "cpu", None)


def test_a_forecast_is_the_sum_of_all_parts_of_a_run() -> None:
    pool = Pool("cpu", (2,), 2.0)
    found = probed_pool(pool, [a_probe(1, 64, 0.02), a_probe(2, 64, 0.015)], 64)
    whole = forecast(found, 2, RunLength(steps=1001, evaluations=10, tests=1, saves=4))
    assert isinstance(whole, Forecast)
    assert whole.wall_s.middle == pytest.approx(1000 * 0.015 + 9 + 10 * 0.5 + 0.2 + 4 * 0.1 + 1)
    assert whole.basis == "measured"
    assert isinstance(forecast(found, 3, RunLength(10, 1, 0, 1)), Unknown)


def test_the_length_of_a_run_is_that_of_its_training_loop() -> None:
    spec, _ = resolve(find_spec("digits")[1], RunSpec)
    assert run_length(spec, 1257, has_test=True) == RunLength(590, 6, 1, 1)
    every = spec.checkpoint.model_copy(update={"every_steps": 100})
    assert run_length(spec.model_copy(update={"checkpoint": every}), 1257, False).saves == 6
    best = spec.checkpoint.model_copy(update={"keep_best": 1})
    assert run_length(spec.model_copy(update={"checkpoint": best}), 1257, False).saves == 6


def test_the_shipped_error_bars_hold_until_there_are_runs() -> None:
    assert calibrate([]) == (0, pytest.approx(1))
    assert calibrate([0.1, -0.1] * 15) == (0, 0.25)  # not below a quarter
    assert calibrate([0.4, -0.4] * 15) == (0, pytest.approx(0.4))
    assert calibrate([3.0, -3.0]).widening == 3.0  # one of eleven is more than one of ten
    assert calibrate([3.0]) == (pytest.approx(1), pytest.approx(2))
    few = [calibrate([2.0, -2.0] * count).widening for count in range(6)]
    assert few == sorted(few)
    narrower = [calibrate([0.3, -0.3] * count).widening for count in range(6)]
    assert narrower == sorted(narrower, reverse=True)


def test_the_median_error_of_runs_moves_the_next_interval() -> None:
    """It moves further with more runs, and the interval then need not be wide."""
    found = [calibrate([2.0] * count) for count in (1, 2, 6, 38)]
    assert [each.shift for each in found] == [pytest.approx(x) for x in (2 / 3, 1, 1.5, 1.9)]
    assert found[-1].widening == 0.25
    assert calibrate([-2.0] * 2).shift == -1
    assert calibrate([1.0, 1.0, 1.0, 50.0, 1.0]).shift < 1  # one of them is not all
    shipped = Interval(50, 100, 120)
    assert shipped.calibrated(Calibration(1)).middle == pytest.approx(120)
    assert shipped.calibrated(Calibration(-1)).middle == pytest.approx(50)


def test_nine_of_ten_later_runs_lie_within_the_interval_for_any_distribution() -> None:
    """Here the errors are twice as large as the shipped ones, and exponential."""
    draw = random.Random(0)
    inside = []
    for _ in range(300):
        seen = [draw.expovariate(1) for _ in range(40)]
        found = calibrate(seen)
        inside.append(abs(draw.expovariate(1) - found.shift) <= found.widening)
    assert 0.85 <= sum(inside) / len(inside) <= 0.95


def test_scores_do_not_depend_on_how_the_interval_was_calibrated() -> None:
    shipped = Interval.around(100, 0.2)
    for by in (Calibration(), Calibration(1, 3)):
        expected = Forecast(shipped.calibrated(by), Interval(1, 1, 1), "measured", shipped)
        assert score(expected, 120) == pytest.approx(1)
        assert score(expected, 100 / 1.2) == pytest.approx(-1)


def test_a_run_finds_the_forecast_of_equal_work(tmp_path: Path) -> None:
    spec, _ = resolve({**find_spec("digits")[1], "storage": str(tmp_path)}, RunSpec)
    data = resolved_data(spec)
    elsewhere = {**data, "storage": "/other", "tracking": {**data["tracking"], "uri": "http://x"}}
    two = {**data, "scale": {**data["scale"], "workers": 2}}
    wider = {**data, "model": {**data["model"], "width": 24}}
    history = ForecastHistory(tmp_path)
    assert history.latest_for([forecast_key(data, "cpu")]) is None
    older = Forecast(Interval(1, 2, 3), Interval(1, 2, 3), "measured", Interval(1, 2, 3), 5.0)
    newer = Forecast(Interval(4, 5, 6), Interval(1, 2, 3), "measured", Interval(3, 5, 7), 6.0)
    for each in (older, newer):
        history.record_forecast(forecast_key(data, "cpu"), each)
    assert ForecastHistory(tmp_path).latest_for(forecast_keys(elsewhere, with_gpus=False)) == newer
    assert history.latest_for(forecast_keys(data, with_gpus=True)) is None
    for other in (two, wider):
        assert history.latest_for(forecast_keys(other, with_gpus=False)) is None


def test_actual_times_are_recorded_and_a_torn_line_is_ignored(tmp_path: Path) -> None:
    shipped = Interval.around(10, 0.2)
    expected = Forecast(shipped, Interval(1, 1, 1), "measured", shipped)
    history = ForecastHistory(tmp_path)
    history.record_actual("first", expected, 12.0)
    with (tmp_path / "forecasts.jsonl").open("a") as file:
        file.write('{"kind": "actual", "sco\n')
    history.record_actual("second", expected, 10.0)
    assert history.scores() == [pytest.approx(1), 0.0]
    assert calibrate(history.scores()) == pytest.approx(calibrate([1.0, 0.0]))
    assert describe_outcome(expected, 12.5) == (
        "10 s forecast (measured), 12.5 s taken: +25%, outside 8.33 to 12 s"
    )
