"""Early stopping by extrapolating a trial's learning curve.

After Domhan, Springenberg and Hutter, "Speeding up automatic hyperparameter optimization of deep
neural networks by extrapolation of learning curves" (IJCAI 2015): a trial is stopped when it is
unlikely to end better than what another trial has reached. Their curves were fitted by Markov
chains, for seconds each. Here the shapes of the curves are a grid, and the rest is linear
regression in closed form: 0.1 ms for an evaluation.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tuning.stopping.rules import ROUNDING, Evaluation

MIN_POINTS = 4
"""Evaluations of a trial before its curve is extrapolated."""
CHANCE = 0.05
"""A trial is stopped if its chance to become the best is smaller."""
NORMAL_WIDTH = 1.645
"""Standard deviations below the mean of a normal distribution that leave a chance of CHANCE."""
MAX_CHECKED = 100
"""Trials that were trained to the end from which the width of the forecasts is learned."""
POWERS = (0.1, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0)
RATES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Shapes of curves over the share `u` of the training that is done: u ** -power, exp(-rate u)."""
NOISE = 0.02
"""Standard deviation of an evaluation that is expected beforehand, by the range of the curve."""


def forecast(at: Sequence[float], losses: Sequence[float], end: float) -> tuple[float, float]:
    """The mean and the standard deviation of the loss at `end`, from the losses at `at` < `end`.

    Every shape f of POWERS and RATES is fitted as c + a (f(u) - f(1)), u = at / end, so that c is
    the loss at the end: Bayesian regression with a normal-inverse-gamma prior. The shapes are
    weighted by their evidence. Before the curve is seen, c is the last loss, give or take as much
    as the loss would change if it went on as on average so far. Real curves leave these shapes as
    they go on: the variance is divided by the share of the training that has been seen.
    """
    u, y = np.asarray(at) / end, np.asarray(losses)
    scale = max(float(np.ptp(y)), 1e-12 * max(1.0, float(np.abs(y).max())))
    z = (y - y[-1]) / scale
    shapes = _shapes(u)
    ahead = max(1.0, (1 - u[-1]) / (u[-1] - u[0]))
    # The coefficients (c, a) have these prior variances, in units of the variance of the noise.
    reach = shapes[:, 0] - shapes[:, -1]
    prior_c, prior_a = (ahead / NOISE) ** 2, (2 / reach / NOISE) ** 2
    # The posterior precision, [[cc, ca], [ca, aa]], and the coefficients by Cramer's rule.
    cc, ca, aa = len(z) + 1 / prior_c, shapes.sum(axis=1), (shapes**2).sum(axis=1) + 1 / prior_a
    determinant = cc * aa - ca**2
    sum_z, sum_fz = z.sum(), shapes @ z
    means = (aa * sum_z - ca * sum_fz) / determinant
    slopes = (cc * sum_fz - ca * sum_z) / determinant
    degrees = 4.0 + len(z)
    residual = z @ z - means * sum_z - slopes * sum_fz
    squares = 4.0 * NOISE**2 + np.maximum(residual, 0.0)
    evidence = -0.5 * (
        np.log(determinant) + np.log(prior_a) + degrees * np.log(squares)  # prior_c is common
    )
    weights = np.exp(evidence - evidence.max())
    weights /= weights.sum()
    variances = squares / (degrees - 2) * (1 + aa / determinant)
    mean = float(weights @ means)
    variance = float(weights @ (variances + (means - mean) ** 2))
    variance /= u[-1]
    return float(y[-1]) + scale * mean, scale * math.sqrt(variance)


def _shapes(u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each shape at the shares `u`, less its value at the end: (shapes, points)."""
    powers, rates = np.array(POWERS)[:, None], np.array(RATES)[:, None]
    return np.concatenate([u**-powers - 1, np.exp(-rates * u) - np.exp(-rates)])


class Extrapolation:
    """Stops a trial whose forecast, taken at its best, ends worse than another trial is by now.

    How far forecasts were off is learned from the trials that were trained to the end: a schedule
    of the learning rate may improve all of them late. It compares by the first objective, and with
    trials that keep the constraints.
    """

    def __init__(self, grace: float, end: float) -> None:
        """`grace` and `end` are epochs of a trial: when it can be stopped, and its last one."""
        self._grace, self._end = grace, end
        self._curves: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        """Trial -> (epoch, loss) at its finite evaluations."""
        self._standings: list[tuple[float, int]] = []
        """What counts of each trial by now, where it keeps the constraints, and its number; sorted.
        """
        self._losses: dict[int, float] = {}
        """Trial -> its loss in `_standings`."""
        self._errors: defaultdict[int, list[float]] = defaultdict(list)
        """Number of evaluations -> by how many standard deviations the ends of earlier trials were
        better than forecast after so many, sorted."""

    def add(self, evaluation: Evaluation) -> bool:
        if evaluation.violation == math.inf:
            return evaluation.at * (1 + ROUNDING) >= self._grace
        curve = self._curves[evaluation.trial]
        curve.append((evaluation.at, evaluation.losses[0]))
        self._note_standing(evaluation)
        if evaluation.at * (1 + ROUNDING) >= self._end:
            self._check_forecasts(self._curves.pop(evaluation.trial))
            return False
        return len(curve) >= MIN_POINTS and evaluation.at * (1 + ROUNDING) >= self._grace

    def _note_standing(self, evaluation: Evaluation) -> None:
        trial, loss = evaluation.trial, evaluation.losses[0]
        if trial in self._losses:
            before = (self._losses.pop(trial), trial)
            del self._standings[bisect.bisect_left(self._standings, before)]
        if evaluation.violation == 0:
            self._losses[trial] = loss
            bisect.insort(self._standings, (loss, trial))

    def stops(self, evaluation: Evaluation) -> bool:
        best_two = self._standings[:2]
        others = [loss for loss, trial in best_two if trial != evaluation.trial]
        if not others or evaluation.losses[0] < others[0]:
            return False
        curve = self._curves[evaluation.trial]
        at, losses = zip(*curve, strict=True)
        mean, deviation = forecast(at, losses, self._end)
        return mean - self._width(len(curve)) * deviation > others[0]

    def _width(self, points: int) -> float:
        """Standard deviations below a forecast's mean that leave a chance of CHANCE."""
        errors = self._errors[points]
        seen = errors[min(int(len(errors) * (1 - CHANCE)), len(errors) - 1)] if errors else 0.0
        return max(NORMAL_WIDTH, seen)

    def _check_forecasts(self, curve: list[tuple[float, float]]) -> None:
        """Compare the forecasts along a curve with its end."""
        at, losses = zip(*curve, strict=True)
        for points in range(MIN_POINTS, len(curve)):
            errors = self._errors[points]
            if len(errors) < MAX_CHECKED:
                mean, deviation = forecast(at[:points], losses[:points], self._end)
                bisect.insort(errors, (mean - losses[-1]) / deviation)
