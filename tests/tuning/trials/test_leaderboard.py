"""The Pareto front of trials with several objectives."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.trials.leaderboard import pareto_front

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
