"""The Pareto front of trials with several objectives."""

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
