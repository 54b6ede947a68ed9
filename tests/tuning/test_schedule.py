"""The spec's scheduler as Ray's own."""

from typing import Any

import pytest
from ray.tune import schedulers

from tuning.schedule import build_scheduler
from tuning.space import SweepSpec

KINDS = {
    "asha": schedulers.AsyncHyperBandScheduler,
    "median": schedulers.MedianStoppingRule,
    "pbt": schedulers.PopulationBasedTraining,
    "none": schedulers.FIFOScheduler,
}


def sweep(name: str) -> SweepSpec:
    parameters: dict[str, Any] = {
        "optimizer.lr": {"loguniform": [1e-3, 1e-1]},
        "model.dropout": {"uniform": [0, 0.5]},
        "model.width": {"log_integer": [4, 64]},
        "optimizer.name": {"choice": ["adamw", "sgd"]},
        "train.seed": {"integer": [0, 3]},
    }
    return SweepSpec.model_validate({"parameters": parameters, "scheduler": {"name": name}})


@pytest.mark.parametrize("name", KINDS)
def test_each_name_is_rays_scheduler(name: str) -> None:
    assert type(build_scheduler(sweep(name), 10)) is KINDS[name] or name == "pbt"
    assert isinstance(build_scheduler(sweep(name), 10), KINDS[name])


def test_pbt_never_leaves_the_space() -> None:
    pbt = build_scheduler(sweep("pbt"), 10)
    config = {"optimizer.lr": 0.1, "model.dropout": 0.5, "model.width": 64, "train.seed": 3}
    config |= {"optimizer.name": "sgd", "trial": 5}
    raised = {"optimizer.lr": 0.12, "model.dropout": 0.6, "model.width": 76, "train.seed": 3}
    assert pbt._custom_explore_fn({**config, **raised}) == config
