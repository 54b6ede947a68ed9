"""The scheduler that Tune is given: its decisions, and what it knows after an interruption."""

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from tuning.search.schedulers import build_scheduler
from tuning.search.stopping_scheduler import EVALUATIONS_FILE
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal


def sweep(**fields: Any) -> SweepSpec:
    return SweepSpec.model_validate({"parameters": {"x": {"uniform": [0, 1]}}, **fields})


def tell(scheduler: Any, number: int, epoch: float, value: float, **result: Any) -> bool:
    """Tell the scheduler of a trial's evaluation; returns whether it stops the trial."""
    trial = SimpleNamespace(trial_id=f"t{number}", config={"trial": number})
    told = {"epoch": epoch, "val/loss": value, "complete": False, **result}
    decision = scheduler.on_trial_result(None, trial, told)
    assert decision in ("STOP", "CONTINUE")
    return bool(decision == "STOP")


@pytest.mark.parametrize("name", ["asha", "median", "extrapolation"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_trial_that_is_not_finite_is_stopped_where_others_are(name: str, bad: float) -> None:
    scheduler = build_scheduler(sweep(scheduler={"name": name}), 9, evaluate_every_epochs=1)
    assert not tell(scheduler, 0, 1, 0.5)
    assert tell(scheduler, 1, 1, bad)
    assert not tell(scheduler, 2, 1, 0.4)


def test_trials_that_are_not_finite_do_not_cost_the_others_their_places() -> None:
    """Ray 2.60 never stopped the first, and stopped two thirds of the others."""
    asha = build_scheduler(sweep(), 9, evaluate_every_epochs=1)
    assert not tell(asha, 0, 1, 0.5)
    assert [tell(asha, trial, 1, math.nan) for trial in range(1, 9)] == [True] * 8
    # Of ten to twelve trials three go on: 0.5 is the first, and these are all no worse than third.
    assert [tell(asha, trial, 1, loss) for trial, loss in [(9, 0.6), (10, 0.4), (11, 0.55)]] == [
        *(False, False, False)
    ]


def test_where_no_trial_is_finite_nobody_is_stopped_for_it() -> None:
    """A metric that is not defined in the first epoch, but in the third."""
    asha = build_scheduler(sweep(), 9, evaluate_every_epochs=1)
    assert not tell(asha, 0, 1, math.nan)
    assert not tell(asha, 1, 1, math.nan)
    assert not tell(asha, 0, 3, 0.5)
    assert not tell(asha, 2, 1, math.nan)
    assert tell(asha, 1, 3, math.nan)


def test_the_rungs_of_asha_are_evaluations() -> None:
    """Evaluations each 4 of 40 epochs: rungs at 4, 12 and 36, not at 1, 3, 9 and 27."""
    asha = build_scheduler(sweep(), 40, evaluate_every_epochs=4)
    epochs = range(4, 41, 4)
    for epoch in epochs:
        assert not tell(asha, 0, epoch, 0.5)
    stopped = [epoch for epoch in epochs if tell(asha, 1, epoch, 0.9)]
    assert stopped == [4, 12, 36]


def test_by_the_best_evaluation_a_trial_that_got_worse_goes_on() -> None:
    for select, stops in (("last", True), ("best", False)):
        asha = build_scheduler(sweep(select=select), 9, evaluate_every_epochs=1)
        for epoch in (1, 2, 3):
            tell(asha, 0, epoch, 0.5)
        best = {"best/val/loss": 0.1, "best/step": 10, "best/epoch": 1.0}
        assert not tell(asha, 1, 1, 0.1, **best)
        assert tell(asha, 1, 3, 0.9, **best) is stops


def test_a_complete_trial_is_not_stopped_but_counts() -> None:
    """Its costs may pass a rung at its last evaluation."""
    spec = sweep(scheduler={"resource": "usd", "grace_epochs": 3})
    asha = build_scheduler(spec, 4, lambda *_: 2.0, evaluate_every_epochs=1)
    assert not tell(asha, 0, 2, 0.1)
    assert not tell(asha, 1, 2, 0.9, complete=True)
    assert not tell(asha, 2, 2, 0.05)
    assert tell(asha, 3, 2, 0.2)


def test_several_objectives_are_compared_by_their_front() -> None:
    spec = sweep(objective=["val/loss min", "val/accuracy max"], scheduler={"reduction": 2})
    asha = build_scheduler(spec, 9, evaluate_every_epochs=1)
    accuracies = {0: 0.5, 1: 0.9, 2: 0.4, 3: 0.95}
    values = {0: 0.1, 1: 0.9, 2: 0.95, 3: 0.05}
    stopped = [tell(asha, n, 1, values[n], **{"val/accuracy": accuracies[n]}) for n in accuracies]
    assert stopped == [False, False, True, False]
    assert tell(asha, 4, 1, 0.01, **{"val/accuracy": math.nan})


@pytest.mark.parametrize("name", ["asha", "median", "extrapolation"])
def test_an_interrupted_sweep_goes_on_with_its_rungs(name: str, tmp_path: Path) -> None:
    """It decides as if it had not been interrupted. Tune pickles a new scheduler at each start."""
    spec = sweep(scheduler={"name": name})

    def fresh(folder: Path | None) -> Any:
        scheduler = build_scheduler(spec, 9, evaluate_every_epochs=1, folder=folder)
        return pickle.loads(cloudpickle.dumps(scheduler))

    def losses(trial: int) -> list[float]:
        return [1 / epoch + (7 * trial) % 5 for epoch in range(1, 9)]

    undisturbed, first = fresh(None), fresh(tmp_path)
    for trial in range(6):
        for epoch, value in enumerate(losses(trial), start=1):
            assert tell(undisturbed, trial, epoch, value) == tell(first, trial, epoch, value)
    with (tmp_path / EVALUATIONS_FILE).open("a") as file:
        file.write("[9, 0.0, 1.0, [0.")  # the driver was lost as it wrote
    resumed = fresh(tmp_path)
    for trial in range(6, 12):
        for epoch, value in enumerate(losses(trial), start=1):
            assert tell(undisturbed, trial, epoch, value) == tell(resumed, trial, epoch, value)
    assert len((tmp_path / EVALUATIONS_FILE).read_text().splitlines()) == 12 * 8


def test_an_evaluation_that_the_driver_was_lost_before_is_read_from_the_trial(
    tmp_path: Path,
) -> None:
    asha = build_scheduler(sweep(), 9, evaluate_every_epochs=1, folder=tmp_path)
    tell(asha, 0, 1, 0.5)
    tell(asha, 0, 2, 0.5)
    journal = Journal(tmp_path / "journal.jsonl")
    for trial, epoch in ((0, 3), (1, 3), (2, 5)):  # the last two: no line is known of them
        journal.record_suggestion(trial, {"x": 0.5})
        folder = tmp_path / "trials" / f"{trial:04d}"
        folder.mkdir(parents=True)
        last = {"epoch": float(epoch), "val/loss": 0.1 * trial, "step": 10, "complete": False}
        (folder / "last.json").write_text(json.dumps(last))
    asha = build_scheduler(sweep(), 9, evaluate_every_epochs=1, folder=tmp_path)
    assert not tell(asha, 0, 3, 0.0)  # known: it decides nothing
    assert not tell(asha, 2, 6, 9.0)  # has passed the rung at 3 epochs; where it was is not known
    assert tell(asha, 3, 3, 0.2)  # worse than trials 0 and 1 at this rung


def test_a_trial_that_is_started_again_is_not_compared_twice() -> None:
    asha = build_scheduler(sweep(), 9, evaluate_every_epochs=1)
    tell(asha, 0, 1, 0.5)
    assert tell(asha, 1, 1, 0.9)
    assert not tell(asha, 1, 1, 0.9)


def test_trials_are_started_in_their_order_and_new_ones_before_paused_ones() -> None:
    scheduler = build_scheduler(sweep(scheduler={"name": "none"}), 9)
    statuses = {4: "RUNNING", 2: "PAUSED", 7: "PENDING", 5: "PENDING"}
    trials = [SimpleNamespace(status=s, config={"trial": n}) for n, s in statuses.items()]

    def chosen() -> int:
        controller = SimpleNamespace(get_live_trials=lambda: trials)
        trial = scheduler.choose_trial_to_run(controller)
        trial.status = "RUNNING"
        return int(trial.config["trial"])

    assert [chosen() for _ in range(3)] == [5, 7, 2]
