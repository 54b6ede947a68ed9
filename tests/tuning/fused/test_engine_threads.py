"""Calls of Tune from many threads at once: the engine's tables have one owner each."""

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.base.errors import TrainingError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.manifest import read_manifest
from trainers.run_folder import CHECKPOINTS
from tuning.fused import trial_saver
from tuning.fused.engine import Engine
from tuning.fused.engine_trial import SupersededError, TrialFiles
from tuning.trials.trial import FAILED_FILE, LAST_RESULT_FILE, last_result

StartEngine = Callable[..., Engine]
CALLERS, NUMBERS = 8, 6
"""Threads that call the engine, and trials: some threads start the same trial at the same time."""
STEPS = 16


def config(number: int) -> dict[str, Any]:
    return {"trial": number, "optimizer.lr": 0.01 * 0.7**number}


@pytest.fixture
def saves_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two chunks of steps, all trials are saved."""
    monkeypatch.setattr(trial_saver, "FIRST_SAVE_S", 0.0)
    monkeypatch.setattr(trial_saver, "save_interval_s", lambda *_: 0.0)


class Caller(threading.Thread):
    """Starts, trains and stops trials, as fast as the engine answers."""

    def __init__(self, engine: Engine, seed: int, end_s: float) -> None:
        super().__init__(daemon=True)
        self._engine, self._draw, self._end_s = engine, random.Random(seed), end_s
        self.calls = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() < self._end_s:
                with contextlib.suppress(SupersededError):  # another thread starts the trial
                    self._live_through(self._draw.randrange(NUMBERS))
        except BaseException as error:
            self.error = error

    def _live_through(self, number: int) -> None:
        lease = self._engine.start(config(number))
        for _ in range(self._draw.randrange(4)):
            result = self._engine.next(lease)
            self.calls += 1
            assert result["step"] <= STEPS
            if result["done"]:
                break
        if self._draw.random() < 0.7:  # otherwise the next start of the trial stops it
            self._engine.stop(lease)


@pytest.mark.usefixtures("saves_all_the_time")
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_starting_stopping_and_saving_at_full_speed(
    start_engine: StartEngine, seconds: float
) -> None:
    """The engine lives on, no slot is lost, and each trial can be resumed where it was."""
    engine = start_engine("checkpoint.every_steps=auto")
    end_s = time.monotonic() + seconds
    callers = [Caller(engine, seed, end_s) for seed in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(seconds + 60)
        assert not caller.is_alive(), "a call never returned"
    assert [caller.error for caller in callers] == [None] * CALLERS
    assert sum(caller.calls for caller in callers) > seconds
    for trial in engine._trials.all():
        engine.stop(trial.lease)
    pool = engine._loop._pool
    assert engine._trials.all() == []
    assert pool.waiting == []
    assert pool.trials_in_slots() == 0
    assert all(each.program._occupants == {} for each in pool.programs)
    for number in range(NUMBERS):
        folder = engine._sweep.trial_folder(number)
        assert not (folder / FAILED_FILE).exists()
        newest, last = Checkpoints(folder / CHECKPOINTS).latest(), last_result(folder)
        saved = read_manifest(newest) if newest is not None else {"step": 0}
        assert saved["step"] >= last.get("step", 0)
        if saved["step"] == last.get("step"):
            assert saved["metrics"]["val/loss"] == last["val/loss"]
        lease = engine.start(config(number))
        while not engine.next(lease)["done"]:
            pass
        assert json.loads((folder / LAST_RESULT_FILE).read_text())["step"] == STEPS
        engine.stop(lease)


def test_of_two_starts_of_a_trial_one_instance_is_left(start_engine: StartEngine) -> None:
    engine = start_engine()
    leases: list[str] = []
    starts = [
        threading.Thread(target=lambda: leases.append(engine.start(config(0)))) for _ in range(8)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join(30)
    (left,) = engine._trials.all()
    assert left.lease in leases
    assert (left.folder / trial_saver.LEASE_FILE).read_text() == left.lease
    for lease in set(leases) - {left.lease}:
        with pytest.raises(TrainingError, match="trial 0 was started again"):
            engine.next(lease)
    assert engine.next(left.lease)["step"] == 4


def test_an_instance_that_was_stopped_writes_no_result(start_engine: StartEngine) -> None:
    """Its call has the result, and gets to write it after the next instance has gone further."""
    engine = start_engine()
    first = engine.start(config(0))
    assert engine.next(first)["step"] == 4
    instance = engine._trials.get(first)
    second = engine.start(config(0))
    assert [engine.next(second)["step"] for _ in range(2)] == [8, 12]
    instance.results.get()  # that it was superseded
    instance.results.put({"step": 8, "complete": False, "val/loss": 0.0})
    engine._trials.add(instance)
    with pytest.raises(SupersededError):
        engine.next(first)
    assert json.loads((instance.folder / LAST_RESULT_FILE).read_text())["step"] == 12


def test_files_of_an_instance(tmp_path: Path) -> None:
    files = TrialFiles(tmp_path)
    assert files.write("a", "1")
    files.close()
    assert not files.write("a", "2")
    assert (tmp_path / "a").read_text() == "1"


def test_calls_after_the_stop_are_told_so(start_engine: StartEngine) -> None:
    engine = start_engine()
    lease = engine.start(config(3))
    engine.stop(lease)
    engine.stop(lease)
    with pytest.raises(SupersededError, match="trial 3 was started again, or has been stopped"):
        engine.next(lease)
