"""Forecasts of learning curves whose end is known, and who is stopped by them."""

import math

import numpy as np
import pytest

from tuning.stopping.extrapolation import Extrapolation, forecast
from tuning.stopping.rules import Evaluation

END = 50


def power_law(limit: float, height: float, power: float = 0.7, noise: float = 0.0) -> list[float]:
    """The loss after each of END epochs."""
    random = np.random.default_rng(0)
    epochs = np.arange(1, END + 1)
    return (limit + height * epochs**-power + noise * random.normal(size=END)).tolist()


def run(rule: Extrapolation, trial: int, losses: list[float]) -> int:
    """The epoch after which the rule stops a trial; END if it does not."""
    for epoch, loss in enumerate(losses, start=1):
        evaluation = Evaluation(trial, epoch - 1, epoch, (loss,))
        if rule.add(evaluation) and rule.stops(evaluation):
            return epoch
    return END


@pytest.mark.parametrize("seen", [8, 15, 30])
@pytest.mark.parametrize("power", [0.4, 0.7, 1.2])
def test_the_end_of_a_power_law_is_within_the_forecast(seen: int, power: float) -> None:
    losses = power_law(0.2, 1.0, power, noise=0.003)
    mean, deviation = forecast(range(1, seen + 1), losses[:seen], END)
    assert abs(mean - losses[-1]) < 3 * deviation
    assert deviation < abs(losses[seen - 1] - losses[0])


def test_a_forecast_is_in_the_units_of_the_loss() -> None:
    """Ten times the losses, shifted, and in days in place of epochs."""
    losses = power_law(0.2, 1.0, noise=0.003)
    mean, deviation = forecast(range(1, 11), losses[:10], END)
    scaled = [1000 + 10 * loss for loss in losses[:10]]
    mean_of_scaled, of_scaled = forecast([day / 7 for day in range(1, 11)], scaled, END / 7)
    assert mean_of_scaled == pytest.approx(1000 + 10 * mean)
    assert of_scaled == pytest.approx(10 * deviation)


def test_a_constant_curve_stays_where_it_is() -> None:
    mean, deviation = forecast([1, 2, 3, 4], [0.5] * 4, END)
    assert mean == pytest.approx(0.5)
    assert 0 <= deviation < 1e-6


def test_a_trial_that_will_end_worse_is_stopped_and_a_late_one_that_will_win_is_not() -> None:
    """asha with its rungs at 1, 3 and 9 epochs stops the last trial: it is worse until epoch 12."""
    rule = Extrapolation(grace=4, end=END)
    assert run(rule, 0, power_law(0.3, 0.5)) == END
    assert run(rule, 1, power_law(0.6, 0.5)) < 15
    assert run(rule, 2, power_law(0.1, 1.8)) == END


def test_the_best_of_many_noisy_trials_is_hardly_ever_stopped() -> None:
    """Forty trials in ten orders. All but a few steps of those that are clearly worse are saved."""
    limits = np.linspace(0.2, 1.0, 40)
    epochs, lost = 0, 0
    for order in range(10):
        rule, shuffled = Extrapolation(grace=4, end=END), np.random.default_rng(order)
        for trial in shuffled.permutation(40):
            curve = limits[trial] + np.arange(1, END + 1) ** -0.7
            stopped = run(rule, int(trial), (curve + 0.01 * shuffled.normal(size=END)).tolist())
            epochs += stopped
            lost += trial == 0 and stopped < END
    assert lost <= 1
    assert epochs < 0.5 * 10 * 40 * END


def test_trials_that_all_improve_at_the_end_teach_the_width_of_the_forecast() -> None:
    """A schedule halves the loss of every trial in the last tenth. Where no trial has ended so, a
    better one is stopped for another that is ahead of it until then.
    """

    def scheduled(limit: float) -> list[float]:
        return [loss / (2 if epoch > 45 else 1) for epoch, loss in enumerate(power_law(limit, 0.2))]

    taught, untaught = (Extrapolation(grace=4, end=END) for _ in range(2))
    for trial, limit in enumerate([1.4, 1.2, 1.0]):
        assert run(taught, trial, scheduled(limit)) == END
    assert run(untaught, 0, [0.5] * END) == END
    better = scheduled(0.8)
    assert better[-1] < 0.45 < scheduled(1.0)[-1]
    assert run(untaught, 9, better) < END
    assert run(taught, 9, better) == END


def test_evaluations_that_are_not_finite_are_left_out_of_the_curve() -> None:
    rule = Extrapolation(grace=2, end=END)
    run(rule, 0, power_law(0.3, 0.5))
    assert rule.add(Evaluation(1, 1, 2, (math.inf,), math.inf, finite=False))
    assert run(rule, 1, power_law(0.1, 0.5)) == END
