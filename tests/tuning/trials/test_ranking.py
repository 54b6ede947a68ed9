"""Which evaluation counts of a trial, and which value is the better one."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.spaces.space import SweepSpec
from tuning.trials.ranking import (
    best_points,
    is_ranked,
    loss,
    losses,
    selected,
    selected_value,
    violation,
    with_best,
)

VALUES = st.floats(-9, 9) | st.sampled_from([math.nan, math.inf, -math.inf])


def sweep(**fields: Any) -> SweepSpec:
    return SweepSpec.model_validate({"parameters": {"x": {"uniform": [0, 1]}}, **fields})


def results(spec: SweepSpec, values: list[float]) -> list[dict[str, Any]]:
    """The results of a trial with these values of the metric at steps 10, 20, ..."""
    found: list[dict[str, Any]] = []
    for number, value in enumerate(values, start=1):
        result = {spec.metric: value, "step": 10 * number, "epoch": float(number)}
        result |= {"complete": number == len(values), "device_s": 2.0 * number}
        found.append(with_best(spec, result, found[-1] if found else {}))
    return found


@given(st.lists(VALUES, min_size=1, max_size=8), st.sampled_from(["min", "max"]))
def test_the_best_evaluation_is_the_first_of_the_best_finite_ones(
    values: list[float], mode: str
) -> None:
    spec = sweep(mode=mode, select="best")
    last = results(spec, values)[-1]
    finite = [value for value in values if math.isfinite(value)]
    best = (min if mode == "min" else max)(finite) if finite else values[0]
    counts = selected(spec, last)
    assert counts["step"] == 10 * (1 + (values.index(best) if finite else 0))
    assert counts["epoch"] == counts["step"] / 10
    if finite:
        assert selected_value(spec, last) == best


def test_the_last_evaluation_counts_unless_the_spec_says_best() -> None:
    last = results(sweep(), [3.0, 1.0, 2.0])[-1]
    assert selected(sweep(), last) == last
    assert selected_value(sweep(), last) == 2.0
    assert not any(name.startswith("best") for name in last)


def test_what_belongs_to_the_whole_trial_is_that_of_its_last_result() -> None:
    spec = sweep(select="best")
    counts = selected(spec, results(spec, [3.0, 1.0, 2.0])[-1])
    assert counts == {"val/loss": 1.0, "step": 20, "epoch": 2.0, "complete": True, "device_s": 6.0}


def test_a_trial_before_its_first_evaluation_has_no_value() -> None:
    for select in ("last", "best"):
        assert selected_value(sweep(select=select), {}) is None


def test_a_result_of_a_build_without_select_counts_as_it_is() -> None:
    result = {"val/loss": 0.5, "step": 4, "epoch": 1.0, "complete": False}
    assert selected(sweep(select="best"), result) == result


def test_a_best_evaluation_that_a_restart_did_not_reach_yet_does_not_count() -> None:
    """It was told of, but the checkpoint from which the trial began again is older."""
    spec = sweep(select="best")
    before = results(spec, [3.0, 2.0, 1.0])[-1]
    again = with_best(spec, {"val/loss": 2.0, "step": 20, "epoch": 2.0}, before)
    assert selected(spec, again)["step"] == 20


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_is_worse_than_all_that_is(mode: str) -> None:
    spec = sweep(mode=mode)
    for bad in (math.nan, math.inf, -math.inf, None):
        assert not is_ranked(spec, bad)
        assert loss(spec, bad) > max(loss(spec, -1e300), loss(spec, 1e300))
    assert (loss(spec, 1.0) < loss(spec, 2.0)) is (mode == "min")


def test_each_objective_is_a_loss_and_an_unknown_cost_is_the_time_on_the_device() -> None:
    spec = sweep(objective=["val/accuracy max", "val/loss min", "cost_usd min"])
    evaluation = {"val/accuracy": 0.75, "val/loss": math.nan, "device_s": 3.0}
    assert losses(spec, evaluation) == (-0.75, math.inf, 3.0)
    assert losses(spec, {**evaluation, "cost_usd": 0.25}) == (-0.75, math.inf, 0.25)


def test_mlflow_is_told_the_best_evaluation_at_its_step() -> None:
    spec = sweep(select="best")
    last = results(spec, [3.0, 1.0, 2.0])[-1]
    assert [point[:3] for point in best_points(spec, last)] == [("best/val/loss", 1.0, 20)]


def test_constraints_are_judged_by_the_evaluation_that_counts() -> None:
    """It is the best by the metric alone, since that is the one whose checkpoint is kept."""
    spec = sweep(select="best", constraints=["val/latency_ms < 10"])
    last: dict[str, Any] = {}
    for step, value, latency_ms in ((10, 1.0, 20.0), (20, 3.0, 5.0)):
        result = {"val/loss": value, "val/latency_ms": latency_ms, "step": step, "epoch": 1.0}
        last = with_best(spec, result, last)
    assert selected(spec, last)["step"] == 10
    assert violation(spec, selected(spec, last)) == 10
