"""The end of a sweep: MLflow hears of it in any case, and the user sees the first error."""

import contextlib
import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.base.errors import SpecError
from trainers.run_folder import TRIALS
from tuning import sweep as sweeps
from tuning import tuner
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, LAST_RESULT_FILE, Sweep
from tuning.tuner import TUNE_FOLDER

SPEC = {
    "workload": "vision",
    "sweep": {"parameters": {"optimizer.lr": {"uniform": [0.1, 1]}}, "trials": 6},
}
CLEARED = {"heliostat.reason": ""}


class Tracker:
    """Records the calls that the tracker's actor would get."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *values: self.calls.append((method, *values)))

    def called(self, method: str) -> list[tuple[Any, ...]]:
        return [values for name, *values in self.calls if name == method]  # type: ignore[misc]


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    tracker = Tracker()
    monkeypatch.setattr(sweeps.mlflow_run, "start_tracking", lambda *_, **__: tracker)
    monkeypatch.setattr(sweeps.mlflow_run, "end_tracking", lambda *_: {"run_id": "r"})
    monkeypatch.setattr(sweeps, "wait_until_sent", lambda *_, **__: None)
    return tracker


@pytest.fixture
def sweep(tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep of six trials, all of which have ended; Ray Tune itself has nothing to do."""

    @contextlib.contextmanager
    def nothing(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(reason=None)

    monkeypatch.setattr(sweeps, "open_budget", nothing)
    monkeypatch.setattr(sweeps, "settle", lambda *_: ({"cost": "$1"}, {"heliostat.cost": "$1"}))
    monkeypatch.setattr(sweeps, "epochs_per_trial", lambda *_: 1.0)
    monkeypatch.setattr(sweeps, "_fused_slots", nothing)
    monkeypatch.setattr(sweeps, "create_tuner", lambda *_: SimpleNamespace(fit=lambda: None))
    journal = Journal(tmp_path / JOURNAL_FILE)
    for number in range(6):
        journal.record_suggestion(number, {"optimizer.lr": 0.1 + 0.1 * number})
        journal.record_end(number, float(number), 1, True)
        folder = tmp_path / TRIALS / f"{number:04d}"
        folder.mkdir(parents=True)
        last = {"val/loss": float(number), "step": 1, "epoch": 1.0, "complete": True}
        (folder / LAST_RESULT_FILE).write_text(json.dumps(last))
        (folder / ENDED_FILE).write_text("{}")
    sweep = SweepSpec.model_validate(SPEC["sweep"])
    return Sweep(
        {**SPEC, "checkpoint": {}, "scale": {"accelerator": "auto"}}, sweep, tmp_path, tmp_path
    )


def damage_a_result(sweep: Sweep) -> None:
    (sweep.trial_folder(3) / LAST_RESULT_FILE).write_text('{"val/lo')


def test_the_first_error_is_what_the_user_sees_and_mlflow_hears_of_the_end(
    sweep: Sweep, tracker: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fails(*_: Any) -> Any:
        raise SpecError("the first error")

    damage_a_result(sweep)
    monkeypatch.setattr(sweeps, "create_tuner", fails)
    monkeypatch.setattr(sweeps, "settle", lambda *_: fails())
    with caplog.at_level(logging.ERROR), pytest.raises(SpecError, match="the first error"):
        sweeps.run_to_end(sweep, lambda *_: None)
    assert "JSONDecodeError" in caplog.text
    tags = {"heliostat.reason": "the first error"}
    assert tracker.called("finish") == [[sweep.key, "KILLED", tags]]


def test_mlflow_hears_of_the_end_when_a_result_is_damaged(sweep: Sweep, tracker: Tracker) -> None:
    damage_a_result(sweep)
    with pytest.raises(json.JSONDecodeError):
        sweeps.run_to_end(sweep, lambda *_: None)
    [[key, status, tags]] = tracker.called("finish")
    assert (key, status, tags["heliostat.cost"]) == (sweep.key, "KILLED", "$1")


def test_importances_are_computed_after_mlflow_heard_of_the_end(
    sweep: Sweep, tracker: Tracker
) -> None:
    board, tracked = sweeps.run_to_end(sweep, lambda *_: None)
    assert tracked == {"run_id": "r", "account": {"cost": "$1"}, "reason": None}
    assert board.importances == {"optimizer.lr": 1.0}
    [[_, status, before]] = tracker.called("finish")
    assert status == "FINISHED"
    assert "heliostat.reason" not in before
    [[_, after]] = tracker.called("set_tags")
    assert [name for name, *_ in tracker.calls][-2:] == ["finish", "set_tags"]
    assert before["mlflow.note.content"].startswith("6 of 6 trials have ended, 0 of them failed.")
    assert "importance of optimizer.lr" not in before["mlflow.note.content"]
    assert "| importance of optimizer.lr | 1 |" in after["mlflow.note.content"]


def test_a_sweep_without_importances_still_has_its_leaderboard(
    sweep: Sweep, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("fANOVA")

    monkeypatch.setattr(sweeps, "with_importances", fails)
    board, _ = sweeps.run_to_end(sweep, lambda *_: None)
    assert [result.number for result in board.results] == list(range(6))
    assert tracker.called("set_tags") == []


def fail_all(sweep: Sweep, reason: str) -> None:
    """All trials have failed, without a result."""
    for number in range(6):
        folder = sweep.trial_folder(number)
        for name in (LAST_RESULT_FILE, ENDED_FILE):
            (folder / name).unlink()
        (folder / FAILED_FILE).write_text(reason)


def test_a_sweep_without_a_result_has_failed(
    sweep: Sweep, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit() -> None:
        assert not list(sweep.folder.glob(f"{TRIALS}/*/{FAILED_FILE}")), "they run again"
        fail_all(sweep, "ValueError: again")

    (sweep.folder / TUNE_FOLDER).mkdir()
    for number in range(6):
        (sweep.trial_folder(number) / FAILED_FILE).write_text("ValueError: before")
    monkeypatch.setattr(sweeps, "create_tuner", lambda *_: SimpleNamespace(fit=fit))
    board, tracked = sweeps.run_to_end(sweep, lambda *_: None)
    assert tracked["failure"] == "all 6 trials failed"
    assert board.failed == dict.fromkeys(range(6), "ValueError: again")
    *_, [_, status, tags] = tracker.called("finish")
    assert (status, tags["heliostat.reason"]) == ("FAILED", "all 6 trials failed")
    cleared = [values for values in tracker.called("set_tags") if values[1:] == [CLEARED]]
    again = [sweep.trial_key(number) for number in range(6)]
    assert [key for key, _ in cleared] == [sweep.key, *again]


def test_a_mistake_of_all_trials_interrupts_ray_tune(
    sweep: Sweep, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune has a handler for Ctrl-C, and returns from `fit` after it."""
    interrupted: list[int] = []

    def fit() -> None:
        fail_all(sweep, "TypeError: loss() takes 2 arguments")
        (sweep.trial_folder(4) / FAILED_FILE).unlink()  # it was running
        for number in (0, 5, 1, 2):
            sweeps_callbacks[sweep.key]("error", number, {})
            if interrupted:
                return

    sweeps_callbacks = tuner._trial_callbacks
    before = signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    monkeypatch.setattr(sweeps, "create_tuner", lambda *_: SimpleNamespace(fit=fit))
    try:
        _, tracked = sweeps.run_to_end(sweep, lambda *_: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted == [signal.SIGINT]
    # The middle of 0.1 to 1 is 0.55, and the learning rates were 0.1, 0.6 and 0.2.
    line = "3 of the first trials failed alike: TypeError: loss() takes 2 arguments"
    assert tracked["failure"] == line
    ends = {
        key: (status, tags["heliostat.reason"]) for key, status, tags in tracker.called("finish")
    }
    assert ends[sweep.key] == ("FAILED", line)
    assert ends[sweep.trial_key(4)] == ("KILLED", "interrupted"), "it goes on no more"
    assert ends[sweep.trial_key(0)] == ("FAILED", "TypeError: loss() takes 2 arguments")


def test_some_failures_do_not_fail_the_sweep(
    sweep: Sweep, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit() -> None:
        (sweep.trial_folder(2) / FAILED_FILE).write_text("the loss is nan at step 3")

    monkeypatch.setattr(sweeps, "create_tuner", lambda *_: SimpleNamespace(fit=fit))
    board, tracked = sweeps.run_to_end(sweep, lambda *_: None)
    assert "failure" not in tracked
    assert list(board.failed) == [2]
    [[_, status, _]] = tracker.called("finish")
    assert status == "FINISHED"
