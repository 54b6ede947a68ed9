"""Ray Tune's tuner for a sweep: its searcher, scheduler and resources, and the trials' events."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ray import tune

from cluster.base.files import write_atomic
from trainers.engine.stall_files import STALLS
from trainers.runs.ray_train import resources_per_worker
from trainers.runs.stalls import last_stall
from trainers.tracking import mlflow_run
from trainers.tracking.mlflow_run import DESCRIPTION_TAG
from tuning.fused import fusion_plan
from tuning.trials.budget import SweepCostPerEpoch, find_open_budget
from tuning.trials.importances import load_packages
from tuning.trials.mlflow_descriptions import trial_description
from tuning.trials.schedulers import build_scheduler
from tuning.trials.searcher import JournaledSearcher
from tuning.trials.space import SweepRunSpec
from tuning.trials.trial import (
    ENDED_FILE,
    FAILED_FILE,
    JOURNAL_FILE,
    OUTAGE_FILE,
    Sweep,
    run_trial,
)

TUNE_FOLDER = "tune"

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
    checkpoint_config = None
    if slots:
        from tuning.fused.tune_adapter import SLOT_RESOURCE, SlotTrainable

        trainable = tune.with_resources(SlotTrainable, {SLOT_RESOURCE: 1})
        checkpoint_config = tune.CheckpointConfig(checkpoint_at_end=False)  # the engine saves
    else:
        function = tune.with_parameters(run_trial, sweep=sweep, tracker=tracker)
        trainable = tune.with_resources(function, _trial_resources(spec))
    # Ray warns of the old output engine, and prints tables of its own, unless told not to.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # It writes every result into three files of its own; ours are in MLflow and with the trial.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    path = str(sweep.folder / TUNE_FOLDER)
    was_started = tune.Tuner.can_restore(path)
    # Creating a tuner writes tune/tuner.pkl, also for a sweep that was started before: the pickled
    # searcher, scheduler and callbacks then are those of this version of our modules, and a sweep
    # can be resumed after an upgrade. The state of the trials is in other files.
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric=sweep.spec.metric,
            mode=sweep.spec.mode,
            search_alg=JournaledSearcher(sweep.spec, sweep.folder / JOURNAL_FILE),
            scheduler=build_scheduler(
                sweep.spec, epochs_per_trial(sweep, spec), SweepCostPerEpoch(sweep.key)
            ),
            num_samples=sweep.spec.total_trials,
            max_concurrent_trials=slots or max_concurrent_trials(spec),
            reuse_actors=True,
            trial_dirname_creator=trial_folder_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(sweep.folder),
            callbacks=[_TrialEvents(sweep)],
            checkpoint_config=checkpoint_config,
            failure_config=tune.FailureConfig(max_failures=spec.scale.max_restarts),
            verbose=0,
        ),
    )
    return tune.Tuner.restore(path, trainable, resume_errored=True) if was_started else tuner


def trial_folder_name(trial: Any) -> str:
    """Name of the trial's folder below `tune`.

    Tune's state of the trials has this function by module and name, so both must stay.
    """
    return f"trial-{trial.config['trial']:04d}-{trial.trial_id}"


def epochs_per_trial(sweep: Sweep, spec: SweepRunSpec) -> float:
    """Epochs of a trial that no scheduler stops."""
    samples = sweep.samples
    return spec.train.total_steps(samples) * spec.train.global_batch / samples


def _trial_resources(spec: SweepRunSpec) -> dict[str, float]:
    """Resources that Tune reserves for a trial; for several workers Ray Train reserves them."""
    if spec.scale.max_workers > 1:
        return {"cpu": 0.01}
    return {name: amount for name, amount in spec.sweep.resources.model_dump().items() if amount}


def max_concurrent_trials(spec: SweepRunSpec) -> int:
    """How many trials run at a time, each in a process: the spec's number, else what fits.

    Tune does not know the resources of a trial's workers, and would start too many trials.
    """
    if spec.sweep.concurrency is not None:
        return spec.sweep.concurrency
    return cluster_capacity(spec)


def cluster_capacity(spec: SweepRunSpec) -> int:
    """How many trials, or engines, fit into the cluster of this moment; at least 1."""
    import ray

    workers = spec.scale.max_workers
    if workers > 1:
        per_worker = resources_per_worker(spec.scale)
        needed = {name: amount * workers for name, amount in per_worker.items()}
    else:
        needed = {name.upper(): amount for name, amount in _trial_resources(spec).items()}
    available = ray.cluster_resources()
    fitting = min(int(available.get(name, 0) / amount) for name, amount in needed.items())
    return max(1, min(fitting, spec.sweep.total_trials))


class _TrialEvents(tune.Callback):  # type: ignore[misc]
    """Passes the events of trials to MLflow, the trials' folders, the budget and the terminal."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

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
        number, result = trial.config["trial"], trial.last_result or {}
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
        tracked = mlflow_run.tracked_run(
            self._sweep.trial_key(trial.config["trial"]),
            self._sweep.trial_spec_data(trial.config),
            parent=self._sweep.key,
            kind="trial",
        )
        if self._slots:
            shared = f"a slot of {self._slots}; device time is divided by the trials that shared it"
            tracked = replace(tracked, tags={**tracked.tags, "heliostat.fused": shared})
        self._tracker().start.remote(tracked)
        if trial.config["trial"] + 1 == self._sweep.spec.total_trials:
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
            tags["heliostat.stopped"] = self._sweep.spec.scheduler.name
        ended = json.dumps({"complete": complete, "step": trial.last_result.get("step")})
        write_atomic(self._sweep.trial_folder(number) / ENDED_FILE, ended)
        tags[DESCRIPTION_TAG] = trial_description(self._sweep, trial.config, trial.last_result)
        self._tracker().finish.remote(self._sweep.trial_key(number), "FINISHED", tags)
        self._notify("done" if complete else "stop", trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        reason = self._failure_reason(number)
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
