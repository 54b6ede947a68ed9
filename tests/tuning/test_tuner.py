"""What Ray Tune is given beside the search: who is stopped by hand, who is tried again."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainers.run_folder import request_stop
from tuning import tuner
from tuning.spaces.space import SweepSpec
from tuning.trials.trial import FAILED_FILE, Sweep
from tuning.tuner import StopsByHand, _TrialEvents


def result_of(number: int) -> dict[str, Any]:
    """A result as Tune's trainables complete it."""
    return {"val/loss": 0.5, "step": 3, "config": {"trial": number, "optimizer.lr": 0.1}}


def test_only_the_trials_that_were_asked_to_are_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "LOOK_S", 0.0)
    stops: StopsByHand = pickle.loads(pickle.dumps(StopsByHand(tmp_path)))
    assert not stops("t7", result_of(7))
    request_stop(tmp_path, "0007")
    request_stop(tmp_path, "0012")
    assert [number for number in range(20) if stops(f"t{number}", result_of(number))] == [7, 12]
    assert not stops("t3", {"done": True}), "it returned before its first evaluation"
    assert not stops.stop_all()


def test_a_mistake_is_not_tried_as_often_as_an_outage(tmp_path: Path) -> None:
    spec = SweepSpec.model_validate({"parameters": {"optimizer.lr": {"uniform": [0, 1]}}})
    events = _TrialEvents(Sweep({}, spec, tmp_path, tmp_path))
    trial = SimpleNamespace(config={"trial": 3}, max_failures=5)
    events.on_trial_recover(0, [], trial)
    assert trial.max_failures == 5, "it was lost"
    (tmp_path / "trials" / "0003").mkdir(parents=True)
    (tmp_path / "trials" / "0003" / FAILED_FILE).write_text("ValueError")
    events.on_trial_recover(0, [], trial)
    assert trial.max_failures == 0
