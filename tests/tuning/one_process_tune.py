"""Ray Tune's part of a sweep in this process: one trial at a time, each until it is paused."""

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from trainers.tracking.reporter import TrackerReporter
from tuning.search.pbt import PopulationBasedTraining
from tuning.trials import trial as trials
from tuning.trials.journal import Journal
from tuning.trials.trial import JOURNAL_FILE, Sweep

if TYPE_CHECKING:
    from tuning.fused.engine import Engine


class DriverLostError(BaseException):
    """The driver is killed here."""


class Trial:
    """What a scheduler knows of a trial of Tune."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.status = TuneTrial.PENDING

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_finished(self) -> bool:
        return self.status in (TuneTrial.TERMINATED, TuneTrial.ERROR)


class Handle:
    """A tracker as the handle of its actor; without one, calls are forgotten."""

    def __init__(self, tracker: Any = None) -> None:
        self._tracker = tracker

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                return getattr(self._tracker, name)(*args) if self._tracker else None

        return Method


class OneProcessTune:
    """Trains the trials of a sweep with pbt as Tune's controller has them trained."""

    def __init__(
        self, sweep: Sweep, suggested: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`suggested` are the parameters of all trials, with which they begin."""
        self.sweep, self._monkeypatch = sweep, monkeypatch
        journal = Journal(sweep.folder / JOURNAL_FILE)
        for number, parameters in enumerate(suggested):
            if number not in journal.parameters:
                journal.record_suggestion(number, parameters)
        self.trials = [Trial({"trial": n, **own}) for n, own in enumerate(suggested)]
        self._running: Trial | None = None

    def get_live_trials(self) -> list[Trial]:
        return self.trials

    def pause_trial(self, trial: Trial, should_checkpoint: bool) -> None:
        assert not should_checkpoint, "Tune would keep a checkpoint"
        trial.status = TuneTrial.PAUSED

    def run(
        self,
        tracker: Any = None,
        edit: Callable[[dict[str, Any]], Any] = dict,
        engine: "Engine | None" = None,
    ) -> None:
        """Train all trials to their ends, in slots of an engine if one is given.

        `edit` may change results.
        """
        scheduler = PopulationBasedTraining(self.sweep)
        for trial in self.trials:
            if not trial.is_finished():
                trial.status = TuneTrial.PENDING
            scheduler.on_trial_add(self, trial)

        def report(result: dict[str, Any]) -> None:
            assert self._running is not None
            edit(result)
            decision = scheduler.on_trial_result(self, self._running, result)
            paused = self._running.status == TuneTrial.PAUSED
            assert decision == ("NOOP" if paused else "CONTINUE")
            if paused:
                raise SystemExit

        with self._monkeypatch.context() as patches:
            patches.setattr(tune, "report", report)
            patches.setattr(ray, "get", lambda answer: answer)
            patches.setattr(TrackerReporter, "_collect", _forget_answers)
            patches.setattr(trials, "WorkerMeter", lambda *_, **__: contextlib.nullcontext())
            patches.setattr(trials, "stall_watchdog", lambda *_: contextlib.nullcontext())
            while (trial := scheduler.choose_trial_to_run(self)) is not None:
                self._running, trial.status = trial, TuneTrial.RUNNING
                try:
                    if engine is None:
                        trials.run_trial(trial.config, self.sweep, Handle(tracker))
                    else:
                        _run_in_slot(engine, trial.config, report)
                except SystemExit:
                    continue
                trial.status = TuneTrial.TERMINATED
                scheduler.on_trial_complete(self, trial, {})


def _run_in_slot(
    engine: "Engine", config: dict[str, Any], report: Callable[[dict[str, Any]], None]
) -> None:
    lease = engine.start(config)
    try:
        while not (result := engine.next(lease))["done"]:
            report(result)
        report(result)
    finally:
        engine.stop(lease)


def _forget_answers(reporter: TrackerReporter, timeout_s: float | None) -> None:
    reporter._in_flight = []
