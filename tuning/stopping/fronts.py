"""Non-dominated fronts of points of several losses, each of which is better when it is smaller.

A point dominates another one if it is nowhere worse and somewhere better. The first front has the
points that no other one dominates, the second those that only points of the first dominate, and so
on. Equal points are in the same front.
"""

import bisect
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Losses = tuple[float, ...]


def first_front(points: Sequence[Losses]) -> list[int]:
    """Positions of the points that no other point dominates, in ascending order.

    O(n log n) for up to three losses (Kung, Luccio and Preparata, JACM 1975). For more, n times the
    size of the front, in numpy.
    """
    distinct = sorted(set(points))
    few = not distinct or len(distinct[0]) <= 3
    front = set(_front_of_three(distinct) if few else _front_of_many(distinct))
    return [position for position, point in enumerate(points) if point in front]


def _front_of_three(points: Sequence[Losses]) -> Iterator[Losses]:
    """The first front of different points of up to three losses, which are sorted.

    A point is dominated only by one before it. Of those it is enough to know the steps of the
    second and third loss: the least third loss up to each second one.
    """
    seconds: list[float] = []
    thirds: list[float] = []
    for point in points:
        _, second, third = (*point, 0.0, 0.0)[:3]
        place = bisect.bisect_right(seconds, second)
        if place and thirds[place - 1] <= third:
            continue
        yield point
        begin = bisect.bisect_left(seconds, second)
        end = begin
        while end < len(thirds) and thirds[end] >= third:
            end += 1
        seconds[begin:end], thirds[begin:end] = [second], [third]


def _front_of_many(points: Sequence[Losses]) -> Iterator[Losses]:
    """The same of any number of losses. Who dominates a point is before it, and on the front."""
    front, count = np.empty((len(points), len(points[0]))), 0
    for point in points:
        front[count] = point
        if not _dominates(front[:count], front[count]):
            count += 1
            yield point


def _dominates(members: npt.NDArray[np.float64], point: npt.NDArray[np.float64]) -> bool:
    """Whether one of the members, (n, losses), dominates the point."""
    no_worse = (members <= point).all(axis=1)
    return bool((no_worse & (members < point).any(axis=1)).any())


class Fronts:
    """The fronts of a set of points that grows, and the place of each new point among them.

    A point goes into the first front of which no member dominates it, found by bisection, and moves
    those that it dominates to the next front, where they do the same (Li et al., "Efficient
    non-domination level update", IEEE Transactions on Cybernetics 2017).
    """

    def __init__(self) -> None:
        self._fronts: list[npt.NDArray[np.float64]] = []

    def __len__(self) -> int:
        """The number of points."""
        return sum(len(front) for front in self._fronts)

    def add(self, point: Losses) -> int:
        """Add a point; returns how many of the earlier points are better.

        Better are those of earlier fronts, and those of its own front that are in a less crowded
        place.
        """
        new = np.array([point])
        level = bisect.bisect_left(
            self._fronts, True, key=lambda front: not _dominates(front, new[0])
        )
        self._insert(level, new)
        crowding = crowding_distances(self._fronts[level])
        mine = crowding[(self._fronts[level] == new).all(axis=1)].max()
        earlier = sum(len(front) for front in self._fronts[:level])
        return earlier + int((crowding > mine).sum())

    def _insert(self, level: int, moved: npt.NDArray[np.float64]) -> None:
        """Put points, none of which dominates another, into a front, and cascade."""
        while level < len(self._fronts):
            front = self._fronts[level]
            beaten = np.zeros(len(front), bool)
            for each in moved:
                beaten |= (each <= front).all(axis=1) & (each < front).any(axis=1)
            if beaten.all():  # all later fronts keep their members, one place later
                break
            self._fronts[level] = np.concatenate([front[~beaten], moved])
            moved, level = front[beaten], level + 1
            if not len(moved):
                return
        self._fronts.insert(level, moved)


def crowding_distances(front: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The crowding distance of each point of a front, (n, losses): larger where it is emptier.

    Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Transactions on
    Evolutionary Computation 2002. The best by any one loss have infinity.
    """
    distances = np.zeros(len(front))
    for losses in front.T:
        order = np.argsort(losses, kind="stable")
        ordered = losses[order]
        span = ordered[-1] - ordered[0]
        distances[order[[0, -1]]] = math.inf
        if span > 0:
            distances[order[1:-1]] += (ordered[2:] - ordered[:-2]) / span
    return distances
