"""Ray Tune's schedulers, as the spec describes them."""

import pickle
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from tuning.trials.schedulers import (
    build_scheduler,
    early_stopping_text,
    expected_step_share,
    first_rung_epochs,
    rung_epochs,
)
from tuning.trials.space import SchedulerSpec, SweepSpec
from tuning.trials.stopping_scheduler import InOrder, StoppingScheduler

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


@pytest.mark.parametrize(
    ("fields", "epochs", "every", "rungs"),
    [
        ({}, 20, 1, [1, 3, 9]),
        ({}, 27, 1, [1, 3, 9]),  # a trial ends by itself
        ({}, 20, 2, [2, 6, 18]),
        ({"grace_epochs": 5, "reduction": 2}, 40, 2, [6, 12, 24]),
        ({}, 2, 0.5, [1]),
        ({}, 20, 0.3, [1.2, 3.6, 10.8]),
        ({"grace_epochs": 4}, 20, 0, [4, 12]),
        ({}, 5, 5, []),
        ({"grace_epochs": 30}, 20, 1, []),
    ],
)
def test_rungs_are_evaluations(
    fields: dict[str, Any], epochs: float, every: float, rungs: list[float]
) -> None:
    spec = SchedulerSpec(**fields)
    assert rung_epochs(spec, epochs, every) == pytest.approx(rungs)
    assert first_rung_epochs(spec, epochs, every) == pytest.approx(min([*rungs, epochs]))


def test_the_terminal_says_when_trials_are_compared() -> None:
    assert early_stopping_text(sweep("asha"), 20, 2) == (
        "asha compares trials after 2, 6, 18 of 20 epochs"
    )
    assert early_stopping_text(sweep("median", grace_epochs=3), 20, 2) == (
        "median stops trials from 4 of 20 epochs on"
    )
    assert early_stopping_text(sweep("extrapolation"), 20, 2) == (
        "extrapolation stops trials from 8 of 20 epochs on"
    )
    assert early_stopping_text(sweep("asha"), 5, 5).startswith("asha stops no trial: ")
    assert early_stopping_text(sweep("none"), 5, 5) == ""


def test_the_expected_share_of_steps_is_that_of_the_rungs() -> None:
    """Epochs of asha: 10, then 20 for a third, 60 for a ninth, 110 for a 27th of the trials."""
    asha = SchedulerSpec(grace_epochs=10)
    epochs = 10 + 20 / 3 + 60 / 9 + 110 / 27
    assert expected_step_share(asha, 200) == pytest.approx(1.5 * epochs / 200)
    assert expected_step_share(asha, 10) == 1
    assert expected_step_share(SchedulerSpec(name="none"), 200) == 1


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
