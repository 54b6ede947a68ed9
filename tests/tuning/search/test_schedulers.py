"""Ray Tune's schedulers, as the spec describes them."""

import pickle
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from tuning.search.schedulers import build_scheduler
from tuning.search.stopping_scheduler import InOrder, StoppingScheduler
from tuning.spaces.space import SchedulerSpec, SweepSpec

KINDS = {
    "asha": StoppingScheduler,
    "median": StoppingScheduler,
    "extrapolation": StoppingScheduler,
    "none": InOrder,
}


def sweep(name: str, **scheduler: Any) -> SweepSpec:
    parameters: dict[str, Any] = {
        "optimizer.lr": {"loguniform": [1e-3, 1e-1]},
        "model.dropout": {"uniform": [0, 0.5]},
        "model.width": {"log_integer": [4, 64]},
        "optimizer.name": {"choice": ["adamw", "sgd"]},
        "train.seed": {"integer": [0, 3]},
    }
    return SweepSpec.model_validate(
        {"parameters": parameters, "scheduler": {"name": name, **scheduler}}
    )


@pytest.mark.parametrize("name", KINDS)
def test_each_name_is_a_scheduler(name: str) -> None:
    assert type(build_scheduler(sweep(name), 10)) is KINDS[name]
    assert isinstance(build_scheduler(sweep(name), 10), KINDS[name])


def test_expensive_trials_are_stopped_earlier_when_compared_by_cost() -> None:
    """One epoch of the expensive trial costs as much as two of the cheap one."""
    decisions = {}
    for resource in ("epoch", "usd"):
        spec = sweep("asha", grace_epochs=2, resource=resource)
        asha = build_scheduler(spec, 10, lambda trial, _: 1.0 + trial)
        asha.set_search_properties("val/loss", "min")
        cheap, expensive = (SimpleNamespace(trial_id=str(n), config={"trial": n}) for n in range(2))
        for trial in (cheap, expensive):
            asha.on_trial_add(None, trial)
        asha = pickle.loads(cloudpickle.dumps(asha))
        for epoch in (1, 2):
            decision = asha.on_trial_result(None, cheap, {"epoch": epoch, "val/loss": 1.0})
            assert decision == "CONTINUE"
        decisions[resource] = asha.on_trial_result(None, expensive, {"epoch": 1, "val/loss": 2.0})
    assert decisions == {"epoch": "CONTINUE", "usd": "STOP"}


def test_grace_epochs_may_exceed_the_epochs_of_a_trial() -> None:
    """Then asha stops no trial."""
    asha = build_scheduler(sweep("asha", grace_epochs=4.5), 2)
    asha.set_search_properties("val/loss", "min")
    trials = [SimpleNamespace(trial_id=str(n), config={"trial": n}) for n in range(8)]
    for trial in trials:
        asha.on_trial_add(None, trial)
        for epoch in (1, 2):
            result = {"epoch": epoch, "val/loss": float(trial.trial_id)}
            assert asha.on_trial_result(None, trial, result) == "CONTINUE"


def test_only_schedulers_that_compare_trials_do_so_by_cost() -> None:
    with pytest.raises(ValueError, match="resource joule: pbt does not compare running trials"):
        SchedulerSpec(name="pbt", resource="joule")
