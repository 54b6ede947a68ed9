"""Non-dominated fronts, compared with their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.stopping.fronts import Fronts, Losses, crowding_distances, first_front


def dominates(one: Losses, other: Losses) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def fronts_of(points: list[Losses]) -> list[list[Losses]]:
    """Every front, by peeling one after another off."""
    left, fronts = list(points), []
    while left:
        front = [p for p in left if not any(dominates(other, p) for other in left)]
        left = [p for p in left if any(dominates(other, p) for other in left)]
        fronts.append(front)
    return fronts


def some_points(losses: int) -> st.SearchStrategy[list[Losses]]:
    number = st.integers(0, 6).map(float)
    return st.lists(st.tuples(*[number] * losses), max_size=25)


@settings(max_examples=50)
@given(st.integers(1, 4).flatmap(some_points))
def test_the_first_front_is_what_no_other_point_dominates(points: list[Losses]) -> None:
    undominated = [n for n, p in enumerate(points) if not any(dominates(q, p) for q in points)]
    assert first_front(points) == undominated


@settings(max_examples=50)
@given(st.integers(2, 4).flatmap(some_points))
def test_a_point_is_placed_behind_those_of_earlier_fronts(points: list[Losses]) -> None:
    fronts = Fronts()
    for count, point in enumerate(points, start=1):
        better = fronts.add(point)
        sorted_fronts = fronts_of(points[:count])
        rank = next(n for n, front in enumerate(sorted_fronts) if point in front)
        earlier = sum(map(len, sorted_fronts[:rank]))
        assert earlier <= better < earlier + len(sorted_fronts[rank])
        assert len(fronts) == count


def test_within_a_front_the_emptier_places_are_better() -> None:
    """On the line x + y = 10, (5, 5) has neighbours 2 away, and (6, 4) then one on each side."""
    fronts = Fronts()
    assert [fronts.add(point) for point in [(0.0, 10.0), (10.0, 0.0), (5.0, 5.0)]] == [0, 0, 2]
    assert fronts.add((6.0, 4.0)) == 3  # (0, 10) and (10, 0), and (5, 5) with 0 to 6 around it
    assert fronts.add((2.0, 8.0)) == 2


def test_the_crowding_distance_is_that_of_nsga_ii() -> None:
    """Of (1, 3): its neighbours differ by 3 of 4 in x, and by 4 of 5 in y."""
    front = np.array([(0.0, 5.0), (1.0, 3.0), (3.0, 1.0), (4.0, 0.0)])
    inner = [3 / 4 + 4 / 5, 3 / 4 + 3 / 5]
    assert crowding_distances(front).tolist() == pytest.approx([np.inf, *inner, np.inf])
