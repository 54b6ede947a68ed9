"""The engine in this process, without Ray: what its two kinds of threads do to each other."""

import errno
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from cluster.base.errors import CheckpointError, TrainingError
from tests.tuning.one_process_tune import Handle, OneProcessTune
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.manifest import read_manifest
from trainers.run_folder import CHECKPOINTS
from tuning.fused import trial_saver
from tuning.fused.engine import Engine
from tuning.sweep import new_sweep
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import read_leaderboard
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, LAST_RESULT_FILE

EPOCH = 4
"""Steps of an epoch, after each of which a trial is evaluated."""
StartEngine = Callable[..., Engine]


def config(number: int, lr: float = 0.01) -> dict[str, Any]:
    return {"trial": number, "optimizer.lr": lr}


def within(seconds: float, action: Callable[..., Any], *args: Any) -> Any:
    """The result of an action in another thread; TimeoutError if that takes longer."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(action(*args))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(seconds)


def next_step(engine: Engine, lease: str) -> int:
    """Train up to the next evaluation, and return its step."""
    step: int = within(30, engine.next, lease)["step"]
    return step


def train_to_end(engine: Engine, lease: str) -> None:
    while not within(30, engine.next, lease)["done"]:
        pass


def disk_full(*args: Any, **kwargs: Any) -> None:
    raise CheckpointError("the disk is full")


class TestSaving:
    def test_while_a_trial_starts_does_not_end_the_engine(
        self, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The trials are saved one by one, and a call adds another one meanwhile."""
        monkeypatch.setattr(trial_saver, "FIRST_SAVE_S", 0.0)
        monkeypatch.setattr(trial_saver, "save_interval_s", lambda *_: 0.0)
        engine = start_engine("checkpoint.every_steps=auto")
        leases = [engine.start(config(number)) for number in range(2)]
        save, late = Checkpoints.save, iter([2])

        def save_while_another_starts(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
            for number in late:
                leases.append(within(30, engine.start, config(number)))
            save(self, *args, **kwargs)

        monkeypatch.setattr(Checkpoints, "save", save_while_another_starts)
        for epoch in (1, 2):
            for lease in leases[:2]:
                assert next_step(engine, lease) == EPOCH * epoch
        assert next_step(engine, leases[2]) == EPOCH

    @pytest.mark.parametrize("every", ["auto", "1"])
    def test_that_fails_ends_the_trial_and_not_the_engine(
        self, every: str, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trial_saver, "FIRST_SAVE_S", 0.0)
        monkeypatch.setattr(trial_saver, "save_interval_s", lambda *_: 0.0)
        engine = start_engine(f"checkpoint.every_steps={every}")
        unsaved, other = engine.start(config(0)), engine.start(config(1))
        folder = engine._trials.get(unsaved).folder
        save = Checkpoints.save

        def save_or_fail(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
            if self is engine._trials.get(unsaved).checkpoints:
                disk_full()
            save(self, *args, **kwargs)

        monkeypatch.setattr(Checkpoints, "save", save_or_fail)
        with pytest.raises(TrainingError, match="the disk is full"):
            train_to_end(engine, unsaved)
        assert (folder / FAILED_FILE).read_text() == "the disk is full"
        assert [next_step(engine, other) for _ in range(4)] == [4, 8, 12, 16]

    def test_keeps_the_best_evaluation_where_it_counts(
        self, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only evaluations that are better than all before them are saved, and the last one."""
        saved: list[int] = []
        save = Checkpoints.save

        def noted(self: Checkpoints, step: int, *args: Any, **kwargs: Any) -> None:
            saved.append(step)
            save(self, step, *args, **kwargs)

        monkeypatch.setattr(Checkpoints, "save", noted)
        engine = start_engine("sweep.select=best", "checkpoint.keep=1", "train.epochs=12")
        lease = engine.start(config(0, lr=1.0))
        folder = engine._trials.get(lease).folder
        results = [within(30, engine.next, lease) for _ in range(12)]
        told = {result["step"]: result["val/loss"] for result in results}
        result = results[-1]
        assert result["complete"]
        best = min(told, key=told.__getitem__)
        assert (result["best/step"], result["best/val/loss"]) == (best, told[best])
        records = [s for s in told if all(told[s] < told[t] for t in told if t < s)]
        assert saved == sorted({*records, max(told)})
        within(30, engine.stop, lease)
        checkpoint = Checkpoints(folder / CHECKPOINTS).at(best)
        assert checkpoint is not None
        assert read_manifest(checkpoint)["metrics"]["val/loss"] == told[best]

    def test_that_fails_when_a_trial_is_stopped_frees_its_slot(
        self, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = start_engine()
        leases = [engine.start(config(number)) for number in range(4)]
        for lease in leases:
            next_step(engine, lease)
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "save", disk_full)
            with pytest.raises(CheckpointError):
                within(30, engine.stop, leases[0])
        assert next_step(engine, engine.start(config(4))) == EPOCH


class TestATrial:
    def test_that_a_scheduler_had_stopped_is_done_when_it_starts_again(
        self, start_engine: StartEngine
    ) -> None:
        """Otherwise Tune might wait for its next evaluation, for ever."""
        engine = start_engine()
        lease = engine.start(config(0))
        result = within(30, engine.next, lease)
        assert not result["done"]
        ended = engine._trials.get(lease).folder / ENDED_FILE
        ended.write_text(json.dumps({"complete": False, "step": result["step"]}))
        within(30, engine.stop, lease)
        again = within(30, engine.next, engine.start(config(0)))
        assert again["done"]
        assert again["step"] == result["step"]

    def test_that_starts_again_ends_the_wait_of_the_instance_before(
        self, start_engine: StartEngine
    ) -> None:
        engine = start_engine()
        first = engine.start(config(0))
        next_step(engine, first)
        instance = engine._trials.get(first)
        second = engine.start(config(0))
        engine._trials.add(instance)  # as for a call that looked it up just before
        with pytest.raises(TrainingError, match="trial 0 was started again"):
            within(10, engine.next, first)
        assert not (instance.folder / FAILED_FILE).exists()
        assert next_step(engine, second) == 2 * EPOCH

    def test_reports_an_evaluation_that_was_saved_but_not_reported(
        self, start_engine: StartEngine
    ) -> None:
        """As when the driver was lost in between; the value is the same."""
        engine = start_engine()
        first = engine.start(config(0))
        value = within(30, engine.next, first)["val/loss"]
        folder = engine._trials.get(first).folder
        within(30, engine.stop, first)
        (folder / LAST_RESULT_FILE).unlink()
        second = engine.start(config(0))
        result = within(30, engine.next, second)
        assert (result["step"], result["val/loss"]) == (EPOCH, value)
        assert next_step(engine, second) == 2 * EPOCH

    def test_fails_by_the_line_of_a_mistake_in_its_metrics(
        self, start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = start_engine()
        lease = engine.start(config(0))
        workload = type(engine._trials.get(lease).variant.workload)
        monkeypatch.setattr(workload, "metrics", lambda *_: {"accuracy": 0.5})
        line = r"^the workload's metrics must return .* \('accuracy' has a float\)$"
        with pytest.raises(TrainingError, match=line):
            within(60, engine.next, lease)

    def test_fails_by_a_mistake_and_not_by_an_outage(self, start_engine: StartEngine) -> None:
        """An outage ends the engine's process, and the trial is started again."""
        engine = start_engine()
        trial = engine._trials.get(engine.start(config(0)))
        with pytest.raises(OSError, match="Stale file handle"):
            engine._loop._fail_by(trial, OSError(errno.ESTALE, "Stale file handle"))
        assert not trial.ended
        engine._loop.call(lambda: engine._loop._fail_by(trial, KeyError("x")))
        assert trial.ended


def test_trials_of_pbt_in_slots_take_over_as_those_in_processes_do(
    start_engine: StartEngine, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The take-overs are the same, and the values are but for rounding."""
    pbt = ("sweep.scheduler={name: pbt, every_epochs: 1}", "sweep.trials=4", "train.epochs=6")
    rates = [{"optimizer.lr": rate} for rate in (0.02, 0.05, 1e-4, 2e-4)]
    found = []
    for fused in (True, False):
        engine = start_engine(*pbt, "checkpoint.keep=1") if fused else None
        sweep = engine._sweep if engine else new_sweep("s.yaml", [*pbt], None)
        if engine:
            monkeypatch.setattr(engine, "_tracker", Handle())
        OneProcessTune(sweep, rates, monkeypatch).run(engine=engine)
        assert not list(sweep.folder.rglob("*taken*"))
        board = read_leaderboard(sweep)
        values = {result.number: result.value for result in board.results}
        found.append((Journal(sweep.folder / JOURNAL_FILE).changes, values))
        for number in values:
            kept = sweep.trial_folder(number) / CHECKPOINTS
            assert len(list(kept.glob("step-*"))) <= 3
    (changes, values), (changes_alone, alone) = found
    assert changes == changes_alone
    assert changes
    assert values == pytest.approx(alone, rel=1e-5)
