"""When a sweep's scheduler decides about its trials."""

from typing import Any

import pytest

from tuning.spaces.rungs import (
    early_stopping_text,
    expected_step_share,
    first_rung_epochs,
    rung_epochs,
)
from tuning.spaces.space import SchedulerSpec, SweepSpec


def sweep(name: str, **scheduler: Any) -> SweepSpec:
    parameters = {"optimizer.lr": {"loguniform": [1e-3, 1e-1]}}
    return SweepSpec.model_validate(
        {"parameters": parameters, "scheduler": {"name": name, **scheduler}}
    )


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
