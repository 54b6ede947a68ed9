"""The order of trials, and the Pareto front of trials with several objectives."""

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.run_folder import TRIALS
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import Leaderboard, pareto_front, read_leaderboard
from tuning.trials.trial import JOURNAL_FILE, LAST_RESULT_FILE, Sweep

MODES = {"val/accuracy": "max", "cost_usd": "min"}


def test_a_front_of_two_objectives() -> None:
    figures = {
        0: {"val/accuracy": 0.9, "cost_usd": 5.0},
        1: {"val/accuracy": 0.8, "cost_usd": 1.0},
        2: {"val/accuracy": 0.8, "cost_usd": 2.0},  # 1 has the same accuracy for less
        3: {"val/accuracy": 0.9, "cost_usd": 5.0},  # equals 0
        4: {"val/accuracy": 0.99},  # of unknown cost
        5: {"val/accuracy": float("nan"), "cost_usd": 0.1},
    }
    assert pareto_front(figures, MODES) == [0, 1, 3]
    assert pareto_front(figures, {"val/accuracy": "max"}) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20))
def test_the_front_dominates_all_others_and_nothing_dominates_it(
    points: list[tuple[int, int]],
) -> None:
    figures = {
        n: {"val/accuracy": float(a), "cost_usd": float(c)} for n, (a, c) in enumerate(points)
    }
    front = pareto_front(figures, MODES)
    assert front

    def dominates(one: int, other: int) -> bool:
        (a, c), (b, d) = points[one], points[other]
        return (a, c) != (b, d) and a >= b and c <= d

    for number in figures:
        assert (number in front) != any(dominates(one, number) for one in front)


def board_of(folder: Path, results: list[dict[str, Any]], **fields: Any) -> Leaderboard:
    """The leaderboard of a sweep whose trials were interrupted with these last results."""
    spec = {"parameters": {"optimizer.lr": {"uniform": [0, 1]}}, **fields}
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / JOURNAL_FILE)
    for number, result in enumerate(results):
        journal.record_suggestion(number, {"optimizer.lr": 0.1 * number})
        trial = folder / TRIALS / f"{number:04d}"
        trial.mkdir(parents=True)
        last = {"step": 20, "epoch": 2.0, "complete": False, "device_s": 1.0, **result}
        (trial / LAST_RESULT_FILE).write_text(json.dumps(last))
    return read_leaderboard(Sweep({}, SweepSpec.model_validate(spec), folder, folder))


def test_the_evaluation_that_counts_is_the_one_that_the_spec_selects(tmp_path: Path) -> None:
    """The first trial was the best one after ten steps, and got worse."""
    worse = {"val/loss": 9.0, "best/val/loss": 1.0, "best/step": 10, "best/epoch": 1.0}
    results = [worse, {"val/loss": 5.0}]
    for select, order in (("last", [(1, 5.0, 20), (0, 9.0, 20)]), ("best", [(0, 1.0, 10)])):
        board = board_of(tmp_path / select, results, select=select)
        found = [(result.number, result.value, result.step) for result in board.results]
        assert found[: len(order)] == order
        assert board.best is board.results[0]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_not_finite_is_last_and_never_the_best(tmp_path: Path, mode: str) -> None:
    values = [math.nan, -math.inf, 0.5, math.inf, 0.25]
    results = [{"val/loss": value} for value in values]
    board = board_of(tmp_path / "some", results, mode=mode)
    assert [r.number for r in board.results] == [*((4, 2) if mode == "min" else (2, 4)), 0, 1, 3]
    assert board_of(tmp_path / "none", results[:2], mode=mode).best is None


def test_objectives_are_those_of_the_evaluation_that_counts(tmp_path: Path) -> None:
    best = {"best/val/loss": 1.0, "best/val/accuracy": 0.5, "best/step": 10, "best/epoch": 1.0}
    board = board_of(
        tmp_path,
        [{"val/loss": 9.0, "val/accuracy": 0.9, **best}],
        objective=["val/loss min", "val/accuracy max"],
        select="best",
    )
    assert board.results[0].objectives == {"val/loss": 1.0, "val/accuracy": 0.5}


@given(st.integers(2, 4).flatmap(lambda n: st.lists(st.tuples(*[st.integers(0, 3)] * n))))
def test_a_front_of_any_number_of_objectives(points: list[tuple[int, ...]]) -> None:
    """A trial is on it if each other one is worse in something, or the same."""
    modes = {
        str(place): ("min", "max")[place % 2]
        for place in range(4 if not points else len(points[0]))
    }
    figures = {
        n: {name: float(v) for name, v in zip(modes, p, strict=True)} for n, p in enumerate(points)
    }

    def worse_somewhere(other: tuple[int, ...], one: tuple[int, ...]) -> bool:
        return any(
            b > a if place % 2 == 0 else b < a
            for place, (a, b) in enumerate(zip(one, other, strict=True))
        )

    expected = [
        n
        for n, one in enumerate(points)
        if all(other == one or worse_somewhere(other, one) for other in points)
    ]
    assert pareto_front(figures, modes) == expected


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_front_of_10_000_trials_that_all_trade_off(objectives: int) -> None:
    """It takes 0.05 s; comparing each with each takes 130 s."""
    draw = random.Random(0)
    names = [str(place) for place in range(objectives)]
    points = [[draw.random() for _ in names[1:]] for _ in range(10_000)]
    figures = {
        n: dict(zip(names, [*each, -sum(each)], strict=True)) for n, each in enumerate(points)
    }
    began = time.process_time()
    assert pareto_front(figures, dict.fromkeys(names, "min")) == list(range(10_000))
    assert time.process_time() - began < 2
