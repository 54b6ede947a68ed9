"""Non-dominated fronts of points of several losses, each of which is better when it is smaller.

A point dominates another one if it is nowhere worse and somewhere better. The first front has the
points that no other one dominates, the second those that only points of the first dominate, and so
on. Equal points are in the same front.
"""

import bisect
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Losses = tuple[float, ...]


def first_front(points: Sequence[Losses]) -> list[int]:
    """Positions of the points that no other point dominates, in ascending order.

    O(n log n) for up to three losses. For more, n times the size of the front, in numpy.
    """
    order = sorted(range(len(points)), key=points.__getitem__)
    if not order:
        return []
    if len(points[0]) <= 3:
        return sorted(_staircase(points, order))
    # In this order a point is dominated only by earlier ones, and then by one of the front.
    found: list[int] = []
    front = np.empty((len(points), len(points[0])))
    for position in order:
        point = np.array(points[position])
        if not _dominates(front[: len(found)], point):
            front[len(found)] = point
            found.append(position)
    return sorted(found)


def _staircase(points: Sequence[Losses], order: Sequence[int]) -> list[int]:
    """The first front of points of up to three losses; `order` sorts them.

    A point is dominated only by one before it. In the losses after the first one, the points of the
    front that matter are steps: the second loss rises and the third one falls.
    """
    found: list[int] = []
    seconds, thirds = list[float](), list[float]()
    for position in order:
        point = points[position]
        if found and points[found[-1]] == point:
            found.append(position)
            continue
        second, third = (*point, 0.0, 0.0)[1:3]
        end = bisect.bisect_right(seconds, second)
        if end and thirds[end - 1] <= third:
            continue
        found.append(position)
        begin = stop = bisect.bisect_left(seconds, second)
        while stop < len(thirds) and thirds[stop] >= third:
            stop += 1
        seconds[begin:stop], thirds[begin:stop] = [second], [third]
    return found


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
