"""The order of checkpoints by a metric."""

import math

import pytest

from trainers.checkpoints.ranking import best_checkpoints, loss_of
from trainers.spec import CheckpointSpec


@pytest.mark.parametrize(("mode", "order"), [("min", ["b", "d"]), ("max", ["a", "b"])])
def test_the_best_are_finite_and_the_first_of_equal_ones(mode: str, order: list[str]) -> None:
    values = {"a": 3.0, "b": 1.0, "c": math.nan, "d": 1.0, "e": -math.inf, "f": math.inf}
    spec = CheckpointSpec.model_validate({"keep_best": 2, "metric": "val/f1", "mode": mode})
    metrics = {name: {"val/f1": value} for name, value in values.items()} | {"g": {}}
    assert best_checkpoints(spec, metrics) == order


def test_a_smaller_loss_is_better_in_either_mode() -> None:
    assert loss_of(1.0, "min") < loss_of(2.0, "min") < loss_of(None, "min")
    assert loss_of(2.0, "max") < loss_of(1.0, "max") < loss_of(math.nan, "max")
