"""The step time as a function of the number of workers: a model of few terms, fitted to probes.

A step consists of computation, on each worker by itself, and of the exchange of gradients, with
separate terms within one node and between nodes. On the published traces of Pollux (OSDI '21, 1 to
16 nodes of 4 T4) this model did better than Amdahl's law, the universal scaling law and Ernest,
provided that a few nodes were probed; `tests/trainers/planning/test_step_time.py` has the numbers.
An exchange of small messages takes a time that grows with the nodes, which the traces hardly show.
There is no prediction for a kind of placement that was not probed at all, such as several nodes
after probes of one: there every model was wrong by half and more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured", "interpolated", "extrapolated", "data sheet"]

MAX_EXTRAPOLATION = 4.0
"""The largest ratio to the largest probed count for which there is a prediction."""
COMPUTATION_WEIGHT = 0.5
"""Error of a step without any exchange, relative to that of an exchange as large as was probed."""
KNOWN_GROWTH, UNKNOWN_GROWTH = (0.32, 0.5), (0.65, 1.0)
"""(Scale, growth) of the relative error that 9 of 10 predictions stay below, see `_error`. The
growth of the exchange with the nodes, or with the workers of a node, is known if two numbers above
1 were probed. The scales are those that hold for a model that was not looked at: on Pollux's traces
at most 1.5 times what the other models need, and on simulated exchanges that are bound by latency
what all need together (0.32 and 0.49 there, 0.17 and 0.59 simulated). The module's test does both.
"""
JITTER_S = 1e-3
"""Seconds by which a step varies however short it is: those of 54 to 82 ms there did by 1 to 2."""
OUTSIDE_BATCH_ERROR = 0.46
"""Relative error if the batch per worker lies outside the probed range."""
MEASUREMENT_ERROR = 0.15
"""Relative error of a probed placement itself, besides the spread that the probe saw."""
EXCHANGE_TERMS = ("within the node", "between nodes", "each node")


@dataclass(frozen=True)
class Placement:
    """The workers of a step, for one model on one kind of node."""

    workers: int
    nodes: int
    samples: float
    """Samples of each worker in a step."""
    cores: float | None = None
    """Cores of a node if the workers compute on them; None if each has an accelerator."""

    @property
    def oversubscription(self) -> float:
        """Workers per core of a node, at least 1: the factor by which a worker is slowed down."""
        if self.cores is None:
            return 1.0
        return max(1.0, math.ceil(self.workers / self.nodes) / self.cores)

    @property
    def threads_per_worker(self) -> float:
        """Cores that each worker computes on; below 1 if workers take turns."""
        if self.cores is None:
            return 1.0
        if self.oversubscription > 1:
            return 1 / self.oversubscription
        return float(self.cores // math.ceil(self.workers / self.nodes))


@dataclass(frozen=True)
class Measurement:
    """A measured step time."""

    place: Placement
    step_s: float
    spread: float = 0.0
    """Relative error that 9 of 10 repetitions would stay within, as far as the probe could tell."""


@dataclass(frozen=True)
class Basis:
    """The kind of a prediction."""

    kind: Kind
    factor: float = 1.0
    """Ratio of the workers, or nodes, to the largest number that was probed."""

    def __str__(self) -> str:
        return f"{self.kind} x {self.factor:.3g}" if self.kind == "extrapolated" else self.kind


@dataclass(frozen=True)
class Prediction:
    step_s: float
    error: float
    """Relative: 9 of 10 step times lie within a factor of 1 + `error` of `step_s`."""
    basis: Basis


@dataclass(frozen=True)
class Unknown:
    """No prediction, with the reason."""

    reason: str


@dataclass(frozen=True)
class StepTimeModel:
    """The model, fitted to `measurements`."""

    terms: Mapping[str, float]
    """Name of a term -> its coefficient in seconds."""
    measurements: tuple[Measurement, ...]

    def step_s(self, place: Placement) -> float:
        """The sum of the terms, also for a placement that `predict` refuses."""
        return sum(
            self.terms[name] * value for name, value in _features(place, self.measurements).items()
        )

    def predict(self, place: Placement) -> Prediction | Unknown:
        """The step time at `place`: measured, or from the model with its error."""
        for measured in self.measurements:
            if measured.place == place:
                error = math.hypot(MEASUREMENT_ERROR, measured.spread)
                error += JITTER_S / measured.step_s
                return Prediction(measured.step_s, error, Basis("measured"))
        basis = self._basis(place)
        if isinstance(basis, Unknown):
            return basis
        step_s = self.step_s(place)
        return Prediction(step_s, self._error(place, step_s, basis.factor), basis)

    def _error(self, place: Placement, step_s: float, factor: float) -> float:
        """The relative error of a prediction of `step_s`, at `factor` times what was probed.

        It is that of the computation and that of the exchange, by their shares of the step. The
        exchange may grow with the workers while the terms say that it does not, and a share of
        nearly all makes its error that of the step.
        """
        features = _features(place, self.measurements).items()
        exchange_s = sum(self.terms[name] * n for name, n in features if name in EXCHANGE_TERMS)
        scale, growth = KNOWN_GROWTH if self._knows_growth(place) else UNKNOWN_GROWTH
        grown = 1 + growth * (max(1.0, factor) - 1)
        error = scale * (COMPUTATION_WEIGHT + exchange_s / step_s * grown) + JITTER_S / step_s
        per_worker = [each.place.samples for each in self.measurements]
        if not min(per_worker) <= place.samples <= max(per_worker):
            error = max(error, OUTSIDE_BATCH_ERROR)
        return error

    def _knows_growth(self, place: Placement) -> bool:
        """Whether the probes show how the exchange grows up to `place`."""
        places = [each.place for each in self.measurements]
        if place.nodes > 1:
            probed, wanted = {each.nodes for each in places} - {1}, place.nodes
        else:
            probed, wanted = (
                {each.workers for each in places if each.nodes == 1} - {1},
                place.workers,
            )
        return place.workers == 1 or (len(probed) > 1 and wanted >= min(probed))

    def _basis(self, place: Placement) -> Basis | Unknown:
        places = [each.place for each in self.measurements]
        if place.workers == 1:
            wanted, probed = 1, [each.workers for each in places if each.workers == 1]
        elif place.nodes == 1:
            wanted = place.workers
            probed = [each.workers for each in places if each.nodes == 1 and each.workers > 1]
            if not probed:
                return Unknown("no two workers of one node were probed together")
        else:
            wanted, probed = place.nodes, [each.nodes for each in places if each.nodes > 1]
            if not probed:
                return Unknown("no two nodes were probed together")
        if not probed:
            return Unknown("one worker alone was not probed")
        factor = wanted / max(probed)
        if factor <= 1:
            return Basis("interpolated")
        if factor > MAX_EXTRAPOLATION:
            return Unknown(f"{factor:.3g} times more than was probed")
        return Basis("extrapolated", factor)


def fit(measurements: Sequence[Measurement]) -> StepTimeModel:
    """Fit the terms by non-negative least squares of the relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    rows = [_features(each.place, measurements) for each in measurements]
    names = list(rows[0])
    # Each row is divided by its time: 10 % off counts the same for a short and a long step.
    weighted = np.array([[row[name] for name in names] for row in rows])
    weighted /= np.array([[each.step_s] for each in measurements])
    coefficients, _ = nnls(weighted, np.ones(len(measurements)))
    return StepTimeModel(
        dict(zip(names, map(float, coefficients), strict=True)), tuple(measurements)
    )


def _features(place: Placement, measurements: Sequence[Measurement]) -> dict[str, float]:
    """Name of a term -> the factor of its coefficient. The measurements decide on the terms.

    A node does no more per second than its cores: with more workers than cores, the computation
    of each worker takes as many times longer (`oversubscription`).
    """
    features = {"each step": place.oversubscription}
    if len({each.place.samples for each in measurements}) > 1:
        features["each sample"] = place.samples * place.oversubscription
        if place.cores is not None:
            features["each sample over threads"] = place.samples / place.threads_per_worker
    one_node = place.nodes == 1
    features["within the node"] = (place.workers - 1) / place.workers if one_node else 0.0
    probed = {each.place.nodes for each in measurements if each.place.nodes > 1}
    # One number of nodes does not show how the time grows with them; see the module's test.
    between = (place.nodes - 1) / place.nodes if len(probed) > 1 else 1.0
    features["between nodes"] = 0.0 if one_node else between
    if len(probed) > 1:  # messages around a ring: two for each node, however small they are
        features["each node"] = place.nodes - 1.0
    return features


MIN_GAIN = 0.5
"""The least throughput of a further worker that pays, as a share of a single worker's."""


def knee(speeds: Mapping[int, float]) -> int:
    """The number of workers after which another one adds less than half of a single one's speed.

    `speeds`: number of workers -> samples per second, for all numbers that are available.
    """
    counts = sorted(speeds)
    single = speeds[counts[0]] / counts[0]
    best = counts[0]
    for count in counts[1:]:
        if (speeds[count] - speeds[best]) / (count - best) >= MIN_GAIN * single:
            best = count
    return best
