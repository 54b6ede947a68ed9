"""Ray Tune's tuner for a sweep: its searcher, scheduler and resources, and the trials' events."""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import ConcurrencyLimiter, SearchGenerator

from cluster.base.files import write_atomic
from trainers.engine.stall_files import STALLS
from trainers.run_folder import stop_requests
from trainers.runs.stalls import last_stall
from trainers.tracking import mlflow_run
from trainers.tracking.mlflow_run import DESCRIPTION_TAG
from tuning.fused import fusion_plan
from tuning.search.pbt import PopulationBasedTraining
from tuning.search.schedulers import build_scheduler
from tuning.search.searcher import JournaledSearcher
from tuning.spaces.space import SweepRunSpec
from tuning.trial_resources import max_concurrent_trials, tune_resources
from tuning.trials.budget import SweepCostPerEpoch, find_open_budget
from tuning.trials.importances import load_packages
from tuning.trials.journal import Journal
from tuning.trials.mlflow_descriptions import trial_description
from tuning.trials.ranking import best_points
from tuning.trials.repeats import REPEATS_FIELD
from tuning.trials.trial import (
    ENDED_FILE,
    FAILED_FILE,
    JOURNAL_FILE,
    OUTAGE_FILE,
    Sweep,
    run_trial,
)
from tuning.tune_search import ENDLESS, RepeatSearch, SweepSearch

TUNE_FOLDER, REPEATS_FOLDER = "tune", "tune-repeats"
"""Tune's state of the search, and of the trainings that `sweep.repeat` adds to it."""
LOOK_S = 1.0
"""Seconds between two looks at the requests to stop a trial, at least."""
HAND = "hand"
"""What stopped a trial that `heliostat stop` ended, in place of the scheduler's name."""

TrialCallback = Callable[[str, int, dict[str, Any]], None]
"""Called at a trial's `start`, `result`, `stop`, `done` and `error` with its number and result."""

_trial_callbacks: dict[str, TrialCallback] = {}
"""Sweep key -> callback. Tune pickles its callbacks, and a terminal belongs to one process."""


@contextlib.contextmanager
def trial_events(sweep: Sweep, on_trial_event: TrialCallback) -> Iterator[None]:
    """Have the events of the sweep's trials passed to the callback."""
    _trial_callbacks[sweep.key] = on_trial_event
    try:
        yield
    finally:
        del _trial_callbacks[sweep.key]


def create_tuner(sweep: Sweep, spec: SweepRunSpec, tracker: Any, slots: int) -> tune.Tuner:
    """Ray's tuner for a new or an interrupted sweep; `slots` is 0 where trials are processes."""
    journaled = JournaledSearcher(
        sweep.spec, sweep.folder / JOURNAL_FILE, epochs_per_trial(sweep, spec)
    )
    scheduler = _scheduler(sweep, spec)
    search = SweepSearch(journaled, slots or max_concurrent_trials(spec))
    trainable = _trainable(sweep, spec, tracker, slots)
    path = str(sweep.folder / TUNE_FOLDER)
    was_started = tune.Tuner.can_restore(path)
    # Creating a tuner writes tune/tuner.pkl, also for a sweep that was started before: the pickled
    # searcher, scheduler and callbacks then are those of this version of our modules, and a sweep
    # can be resumed after an upgrade. The state of the trials is in other files.
    tuner = _new_tuner(sweep, spec, TUNE_FOLDER, trainable, search, scheduler, slots)
    return tune.Tuner.restore(path, trainable, resume_errored=True) if was_started else tuner


def create_repeats_tuner(
    sweep: Sweep, spec: SweepRunSpec, tracker: Any, left: Mapping[int, dict[str, Any]]
) -> tune.Tuner:
    """Ray's tuner for the trainings `left` of the best configurations, each in a process.

    Tune begins anew at a resume: each trial goes on from its own checkpoint.
    """
    searcher = RepeatSearch(sweep.key, sweep.spec.metric, sweep.spec.mode, left)
    search = SearchGenerator(ConcurrencyLimiter(searcher, max_concurrent_trials(spec)))
    trainable = _trainable(sweep, spec, tracker, 0)
    scheduler = tune.schedulers.FIFOScheduler()
    return _new_tuner(sweep, spec, REPEATS_FOLDER, trainable, search, scheduler, 0)


def _trainable(sweep: Sweep, spec: SweepRunSpec, tracker: Any, slots: int) -> Any:
    """What Tune calls a trainable: a trial in a slot, or in a process of its own."""
    if slots:
        from tuning.fused.tune_adapter import SLOT_RESOURCE, SlotTrainable

        return tune.with_resources(SlotTrainable, {SLOT_RESOURCE: 1})
    function = tune.with_parameters(run_trial, sweep=sweep, tracker=tracker)
    return tune.with_resources(function, tune_resources(spec))


def _new_tuner(
    sweep: Sweep,
    spec: SweepRunSpec,
    name: str,
    trainable: Any,
    search: SearchGenerator,
    scheduler: Any,
    slots: int,
) -> tune.Tuner:
    """A tuner whose state is in the folder `name` of the sweep."""
    # Ray warns of the old output engine, and prints tables of its own, unless told not to.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # It writes every result into three files of its own; ours are in MLflow and with the trial.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    engine_saves = tune.CheckpointConfig(checkpoint_at_end=False)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric=sweep.spec.metric,
            mode=sweep.spec.mode,
            search_alg=search,
            scheduler=scheduler,
            num_samples=ENDLESS,
            reuse_actors=True,
            trial_dirname_creator=trial_folder_name,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(sweep.folder),
            stop=StopsByHand(sweep.folder),
            callbacks=[_TrialEvents(sweep)],
            checkpoint_config=engine_saves if slots else None,
            failure_config=tune.FailureConfig(max_failures=spec.scale.max_restarts),
            verbose=0,
        ),
    )


def _scheduler(sweep: Sweep, spec: SweepRunSpec) -> Any:
    if sweep.spec.scheduler.name == "pbt":
        return PopulationBasedTraining(sweep)
    return build_scheduler(
        sweep.spec,
        epochs_per_trial(sweep, spec),
        SweepCostPerEpoch(sweep.key),
        spec.train.evaluate_every_epochs,
        sweep.folder,
    )


def trial_folder_name(trial: Any) -> str:
    """Name of the trial's folder below `tune`.

    Tune's state of the trials has this function by module and name, so both must stay.
    """
    return f"trial-{trial.config['trial']:04d}-{trial.trial_id}"


def epochs_per_trial(sweep: Sweep, spec: SweepRunSpec) -> float:
    """Epochs of a trial that no scheduler stops."""
    samples = sweep.samples
    return spec.train.total_steps(samples) * spec.train.global_batch / samples


class StopsByHand(tune.Stopper):  # type: ignore[misc]
    """Ends trials, at their next evaluation, that `heliostat stop SWEEP/TRIAL` asked to end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._requested: set[str] = set()
        self._next_look = 0.0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if time.monotonic() >= self._next_look:
            self._requested = stop_requests(self._folder)
            self._next_look = time.monotonic() + LOOK_S
        number = result.get("config", {}).get("trial")  # there is none before the first evaluation
        return number is not None and f"{number:04d}" in self._requested

    def stop_all(self) -> bool:
        return False


def end_interrupted_trials(sweep: Sweep, tracker: Any) -> None:
    """End the MLflow runs of trials that were at work when Tune was stopped: it tells nobody."""
    journal = Journal(sweep.folder / JOURNAL_FILE)
    for number in (*journal.parameters, *journal.repeats):
        folder = sweep.trial_folder(number)
        if not folder.exists() or (folder / ENDED_FILE).exists():
            continue
        failed = folder / FAILED_FILE
        status, reason = ("FAILED", failed.read_text()) if failed.exists() else ("KILLED", "")
        tags = {"heliostat.reason": reason or "interrupted"}
        tracker.finish.remote(sweep.trial_key(number), status, tags)


class _TrialEvents(tune.Callback):  # type: ignore[misc]
    """Passes the events of trials to MLflow, the trials' folders, the budget and the terminal."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep, self._metric = sweep, sweep.spec.metric

    def __getstate__(self) -> dict[str, Any]:
        # A resumed sweep has another actor, and may be planned anew.
        return {k: v for k, v in self.__dict__.items() if k not in ("_actor", "_slots")}

    def _tracker(self) -> Any:
        return self._actor

    @functools.cached_property
    def _actor(self) -> Any:
        import ray

        return ray.get_actor(self._sweep.key)

    @functools.cached_property
    def _slots(self) -> int:
        return fusion_plan.planned_slots(self._sweep)

    def _notify(self, event: str, trial: Any) -> None:
        number = trial.config["trial"]
        # Before the first one, `last_result` waits for the trial's actor.
        result = trial.last_result if trial.has_reported_at_least_once else {}
        if REPEATS_FIELD in trial.config:  # its value counts in a mean, and is not a best one
            result = {name: each for name, each in result.items() if name != self._metric}
        budget = find_open_budget(self._sweep.key)
        if budget is not None:
            budget.on_trial_event(event, number, result)
        on_trial_event = _trial_callbacks.get(self._sweep.key)
        if on_trial_event is not None:
            on_trial_event(event, number, result)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        budget = find_open_budget(self._sweep.key)
        if budget is not None:
            budget.stop_when_spent(any(not trial.is_finished() for trial in trials))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, tags = trial.config["trial"], {}
        tracked = mlflow_run.tracked_run(
            self._sweep.trial_key(number),
            self._sweep.trial_spec_data(trial.config),
            parent=self._sweep.key,
            kind="trial",
        )
        if REPEATS_FIELD in trial.config:
            tags["heliostat.repeats"] = f"{trial.config[REPEATS_FIELD]:04d}"
        elif self._slots:
            shared = f"a slot of {self._slots}; device time is divided by the trials that shared it"
            tags["heliostat.fused"] = shared
        self._tracker().start.remote(replace(tracked, tags={**tracked.tags, **tags}))
        if number + 1 == self._sweep.spec.total_trials:
            load_packages()  # needed when the sweep ends; until then slots get idle
        self._notify("start", trial)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._notify("result", trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number, complete = trial.config["trial"], bool(trial.last_result.get("complete"))
        tags: dict[str, str] = {}
        if not complete:
            by_hand = f"{number:04d}" in stop_requests(self._sweep.folder)
            tags["heliostat.stopped"] = HAND if by_hand else self._sweep.spec.scheduler.name
        ended = json.dumps({"complete": complete, "step": trial.last_result.get("step")})
        write_atomic(self._sweep.trial_folder(number) / ENDED_FILE, ended)
        tags[DESCRIPTION_TAG] = trial_description(
            self._sweep, trial.config, trial.last_result, tags.get("heliostat.stopped", "")
        )
        self._log_best(number, trial.last_result)
        self._tracker().finish.remote(self._sweep.trial_key(number), "FINISHED", tags)
        self._notify("done" if complete else "stop", trial)

    def _log_best(self, number: int, result: dict[str, Any]) -> None:
        """Log the evaluation that counts where it need not be the last one, which MLflow shows."""
        if self._sweep.spec.select == "best":
            points = best_points(self._sweep.spec, result)
            self._tracker().log.remote(self._sweep.trial_key(number), points, result.get("step", 0))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if (self._sweep.trial_folder(trial.config["trial"]) / FAILED_FILE).exists():
            trial.max_failures = 0  # another attempt would end with the same error

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        reason = self._failure_reason(number)
        write_atomic(self._sweep.trial_folder(number) / FAILED_FILE, reason)
        tags = {"heliostat.reason": reason, DESCRIPTION_TAG: f"**Failed**: {reason}"}
        self._tracker().finish.remote(self._sweep.trial_key(number), "FAILED", tags)
        self._notify("error", trial)

    def _failure_reason(self, number: int) -> str:
        """The error of the trial's process, its last outage or stall, else that it was lost."""
        folder = self._sweep.trial_folder(number)
        if (folder / FAILED_FILE).exists():
            return (folder / FAILED_FILE).read_text()
        if (folder / OUTAGE_FILE).exists():
            return f"{(folder / OUTAGE_FILE).read_text()}; it failed too often (scale.max_restarts)"
        stall = last_stall(folder / STALLS) or last_stall(self._sweep.folder / STALLS)  # engines'
        return str(stall) if stall else "its worker was lost too often"
