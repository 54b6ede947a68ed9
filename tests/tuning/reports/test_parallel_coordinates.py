"""The parallel coordinates of trials that do not all have the same parameters."""

from typing import Any

import pytest

from tuning.reports.parallel_coordinates import parallel_coordinates
from tuning.reports.sweep_charts import slice_chart
from tuning.spaces.distributions import Distribution
from tuning.trials.leaderboard import TrialResult

SPACE = {
    "optimizer.name": Distribution(choice=["sgd", "adamw"]),
    "optimizer.momentum": Distribution(uniform=(0.0, 0.8), when={"optimizer.name": "sgd"}),
    "train.seed": Distribution(choice=[1, True, 1.0]),
}


def result(number: int, value: float, parameters: dict[str, Any]) -> TrialResult:
    return TrialResult(number, parameters, value, step=1, epoch=1.0, complete=True)


RESULTS = [
    result(1, 0.1, {"optimizer.name": "adamw", "train.seed": 1.0}),
    result(0, 0.3, {"optimizer.name": "sgd", "optimizer.momentum": 0.2, "train.seed": True}),
    result(2, 0.5, {"optimizer.name": "sgd", "optimizer.momentum": 0.8, "train.seed": 1}),
]


def test_a_line_leaves_out_the_axes_that_its_trial_does_not_have() -> None:
    lines = parallel_coordinates(RESULTS, SPACE, "val/loss", "min").datasets["lines"]
    points = {
        (trial, axis): at
        for trial, axis, at in zip(lines["trial"], lines["axis"], lines["at"], strict=True)
    }
    assert points == pytest.approx(
        {
            (1, "optimizer.name"): 1.0,
            (0, "optimizer.name"): 0.0,
            (2, "optimizer.name"): 0.0,
            (0, "optimizer.momentum"): 0.25,
            (2, "optimizer.momentum"): 1.0,
            (1, "train.seed"): 1.0,
            (0, "train.seed"): 0.5,
            (2, "train.seed"): 0.0,
            (1, "val/loss"): 0.0,
            (0, "val/loss"): 0.5,
            (2, "val/loss"): 1.0,
        }
    )


def test_a_slice_has_the_trials_with_the_parameter() -> None:
    path, statuses = "optimizer.momentum", dict.fromkeys(range(3), "complete")
    dots = slice_chart(path, RESULTS, SPACE[path], "val/loss", statuses).datasets["dots"]
    assert (dots["trial"], dots["x"]) == ([0, 2], [0.2, 0.8])
