"""Bounds on metrics and costs."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.spaces.constraints import parse_constraint, total_violation, violations
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import read_leaderboard
from tuning.trials.ranking import violation
from tuning.trials.trial import JOURNAL_FILE, LAST_RESULT_FILE, Sweep


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


@pytest.mark.parametrize(
    ("limit", "best", "order", "front"),
    [
        ("val/latency_ms < 10", 1, [1, 2, 3, 0], [1, 2]),
        ("val/latency_ms < 1", None, [3, 0, 1, 2], []),
        ("val/unknown < 1", None, [3, 0, 1, 2], []),
    ],
)
def test_no_trial_that_breaks_a_constraint_is_the_best_or_on_the_front(
    limit: str, best: int | None, order: list[int], front: list[int], tmp_path: Path
) -> None:
    spec = SweepSpec.model_validate(
        {
            "parameters": {"optimizer.lr": {"uniform": [0, 1]}},
            "constraints": [limit],
            "objective": ["val/loss min", "val/latency_ms min"],
        }
    )
    journal = Journal(tmp_path / JOURNAL_FILE)
    for number, (loss, latency_ms) in enumerate([(0.2, 20.0), (0.3, 9.0), (0.4, 8.0), (0.1, 30.0)]):
        journal.record_suggestion(number, {"optimizer.lr": 0.1})
        folder = tmp_path / "trials" / f"{number:04d}"
        folder.mkdir(parents=True)
        last = {"val/loss": loss, "val/latency_ms": latency_ms, "step": 9, "epoch": 1.0}
        (folder / LAST_RESULT_FILE).write_text(
            json.dumps({**last, "complete": True, "device_s": 1.0})
        )
    board = read_leaderboard(Sweep({}, spec, tmp_path, tmp_path))
    assert [result.number for result in board.results] == order
    assert (board.best and board.best.number) == best
    assert board.pareto_trials == front
    assert [result.number for result in board.finalists(spec)] == ([1, 2] if best else [])
