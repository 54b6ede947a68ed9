"""Bounds on metrics and costs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.trials.constraints import parse_constraint, total_violation, violations
from tuning.trials.ranking import violation
from tuning.trials.space import SweepSpec


@pytest.mark.parametrize(
    ("text", "kept", "broken"),
    [
        ("cost_usd < 2", [1.99, -1], [2, 2.01]),
        ("cost_usd <= 2", [2, 1.99], [2.01]),
        ("val/accuracy > 0.9", [0.91], [0.9, 0.5]),
        ("val/accuracy >= 9e-1", [0.9, 1], [0.89]),
        ("  val/latency_ms<10  ", [9], [10, math.inf]),
    ],
)
def test_a_violation_is_positive_exactly_where_the_bound_is_broken(
    text: str, kept: list[float], broken: list[float]
) -> None:
    constraint = parse_constraint(text)
    assert all(constraint.violation(value) <= 0 for value in kept)
    assert all(constraint.violation(value) > 0 for value in broken)
    assert constraint.violation(None) == constraint.violation(math.nan) == math.inf


@pytest.mark.parametrize("text", ["", "cost_usd", "cost_usd < x", "cost_usd < nan", "< 2", "a = 2"])
def test_what_is_no_bound_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(ValueError, match="must look like `cost_usd < 2`"):
        parse_constraint(text)


@given(
    value=st.floats(allow_nan=False, allow_infinity=False, width=32),
    limit=st.integers(-5, 5),
    sign=st.sampled_from(["<", "<=", ">", ">="]),
)
def test_bounds_are_python_s_comparisons(value: float, limit: int, sign: str) -> None:
    kept = {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}
    assert (parse_constraint(f"val/x {sign} {limit}").violation(value) <= 0) == kept[sign]


def test_violations_add_up_and_what_is_kept_does_not_make_up_for_them() -> None:
    both, known = ["val/a < 1", "val/b > 5"], {"val/a": 4.0, "val/b": 10.0}
    assert violations(both, known) == {"val/a < 1": 3.0, "val/b > 5": -5.0}
    assert total_violation(both, known) == 3.0
    assert total_violation(both, {"val/a": 0.0, "val/b": 6.0}) == 0.0


def test_a_cost_that_is_not_known_yet_does_not_count() -> None:
    spec = SweepSpec.model_validate(
        {
            "parameters": {"optimizer.lr": {"uniform": [0, 1]}},
            "constraints": ["cost_usd < 2", "val/a < 1"],
        }
    )
    assert violation(spec, {"val/a": 0.5}) == 0
    assert violation(spec, {"val/a": 0.5, "cost_usd": 3.0}) == 1
    assert violation(spec, {"cost_usd": 1.0}) == math.inf
