"""How long a step takes on more workers: a model of few terms, fitted to probes.

A step is what each worker does alone, and the exchange of gradients: within one node, or between
nodes, which are two tiers of their own. On the published traces of Pollux (OSDI '21, 1 to 16
nodes of 4 T4) this did better than Amdahl's law, the universal scaling law and Ernest, provided
that a few nodes were probed; `tests/trainers/planning/test_step_time.py` has the figures. What was not
probed at all, such as several nodes after probes of one, is not predicted: there every model was
wrong by half and more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured", "interpolated", "extrapolated", "data sheet"]

EXTRAPOLATION_ERRORS = ((1.5, 0.24), (2.0, 0.26), (3.0, 0.39), (4.0, 0.42))
"""By how many times more than was probed: the relative error that 9 of 10 predictions stay below.
The larger of two figures from Pollux's traces (weak scaling, probes on 1, 2 and 4 nodes): that of
the paper's six models, and that of the four in the module's test."""
INTERPOLATION_ERROR = 0.23
"""The same between probes: 3 nodes there."""
ONE_NODE_COUNT_ERROR = 0.57
"""The same where one number of nodes above 1 was probed, so that how the exchange grows with it
is not known: 3 nodes from 2 there."""
OUTSIDE_BATCH_ERROR = 0.46
"""The same where each worker also gets another share of a batch than any that was probed."""
MEASUREMENT_ERROR = 0.15
"""The same for what was probed itself, besides the spread that the probe saw."""


@dataclass(frozen=True)
class Placement:
    """What the time of a step depends on, for one model on one kind of node."""

    workers: int
    nodes: int
    samples: float
    """Of each worker in a step."""
    cores: float | None = None
    """Of a node, where workers compute on them; None where each has a device of its own."""

    @property
    def oversubscription(self) -> float:
        """By how much a worker is slowed down because the node has fewer cores than workers."""
        if self.cores is None:
            return 1.0
        return max(1.0, math.ceil(self.workers / self.nodes) / self.cores)

    @property
    def threads_per_worker(self) -> float:
        """Cores that each worker computes on; below 1 where they take turns."""
        if self.cores is None:
            return 1.0
        if self.oversubscription > 1:
            return 1 / self.oversubscription
        return float(self.cores // math.ceil(self.workers / self.nodes))


@dataclass(frozen=True)
class Measurement:
    """A step time that was measured."""

    place: Placement
    step_s: float
    spread: float = 0.0
    """Relative; what 9 of 10 repetitions would stay within, as far as the probe could tell."""


@dataclass(frozen=True)
class Basis:
    """What a prediction rests on."""

    kind: Kind
    factor: float = 1.0
    """How many times more workers or nodes than were probed."""

    def __str__(self) -> str:
        return f"{self.kind} x {self.factor:.3g}" if self.kind == "extrapolated" else self.kind


@dataclass(frozen=True)
class Prediction:
    step_s: float
    error: float
    """Relative; 9 of 10 stay within `step_s` divided and multiplied by 1 + `error`."""
    basis: Basis


@dataclass(frozen=True)
class Unknown:
    """No prediction, and why."""

    reason: str


@dataclass(frozen=True)
class StepTimeModel:
    """The model fitted to `points`: seconds by term."""

    terms: Mapping[str, float]
    measurements: tuple[Measurement, ...]

    def step_s(self, place: Placement) -> float:
        """What the terms add up to, also where `predict` has no trust in it."""
        return sum(
            self.terms[name] * value for name, value in _features(place, self.measurements).items()
        )

    def predict(self, place: Placement) -> Prediction | Unknown:
        """The time of a step at `place`."""
        for point in self.measurements:
            if point.place == place:
                error = math.hypot(MEASUREMENT_ERROR, point.spread)
                return Prediction(point.step_s, error, Basis("measured"))
        basis = self._basis(place)
        if isinstance(basis, Unknown):
            return basis
        error = INTERPOLATION_ERROR
        if basis.kind == "extrapolated":
            error = next(error for factor, error in EXTRAPOLATION_ERRORS if basis.factor <= factor)
        if place.nodes > 1 and len({point.place.nodes for point in self.measurements} - {1}) == 1:
            error = max(error, ONE_NODE_COUNT_ERROR)
        shares = [point.place.samples for point in self.measurements]
        if not min(shares) <= place.samples <= max(shares):
            error = max(error, OUTSIDE_BATCH_ERROR)
        return Prediction(self.step_s(place), error, basis)

    def _basis(self, place: Placement) -> Basis | Unknown:
        places = [point.place for point in self.measurements]
        if place.workers == 1:
            asked, probed = 1, [each.workers for each in places if each.workers == 1]
        elif place.nodes == 1:
            asked = place.workers
            probed = [each.workers for each in places if each.nodes == 1 and each.workers > 1]
            if not probed:
                return Unknown("no two workers of one node were probed together")
        else:
            asked, probed = place.nodes, [each.nodes for each in places if each.nodes > 1]
            if not probed:
                return Unknown("no two nodes were probed together")
        if not probed:
            return Unknown("one worker alone was not probed")
        factor = asked / max(probed)
        if factor <= 1:
            return Basis("interpolated")
        if factor > EXTRAPOLATION_ERRORS[-1][0]:
            return Unknown(f"{factor:.3g} times more than was probed")
        return Basis("extrapolated", factor)


def fit(measurements: Sequence[Measurement]) -> StepTimeModel:
    """The terms, none negative, with the least squares of relative errors over the points."""
    import numpy as np
    from scipy.optimize import nnls

    rows = [_features(point.place, measurements) for point in measurements]
    names = list(rows[0])
    # Each row over its own time: an error of 10 % counts the same for a short and a long step.
    weighted = np.array([[row[name] for name in names] for row in rows])
    weighted /= np.array([[point.step_s] for point in measurements])
    found, _ = nnls(weighted, np.ones(len(measurements)))
    return StepTimeModel(dict(zip(names, map(float, found), strict=True)), tuple(measurements))


def _features(place: Placement, points: Sequence[Measurement]) -> dict[str, float]:
    """By term, what its coefficient is multiplied by; which terms there are is up to the points.

    Never does a node do more per second than its cores: past as many workers, all that a worker
    does alone is stretched by their number.
    """
    found = {"each step": place.oversubscription}
    if len({point.place.samples for point in points}) > 1:
        found["each sample"] = place.samples * place.oversubscription
        if place.cores is not None:
            found["each sample over threads"] = place.samples / place.threads_per_worker
    alone = place.nodes == 1
    found["within the node"] = (place.workers - 1) / place.workers if alone else 0.0
    probed = {point.place.nodes for point in points if point.place.nodes > 1}
    # One number of nodes does not show how the time grows with them; see the module's test.
    share = (place.nodes - 1) / place.nodes if len(probed) > 1 else 1.0
    found["between nodes"] = 0.0 if alone else share
    return found


MIN_GAIN = 0.5
"""The least that a further worker may bring, of what a worker brings alone."""


def knee(speeds: Mapping[int, float]) -> int:
    """The number of workers after which another one does less than half of a lone one's work.

    `speeds` are samples per second by number of workers, over what can be had.
    """
    counts = sorted(speeds)
    lone = speeds[counts[0]] / counts[0]
    best = counts[0]
    for count in counts[1:]:
        if (speeds[count] - speeds[best]) / (count - best) >= MIN_GAIN * lone:
            best = count
    return best
