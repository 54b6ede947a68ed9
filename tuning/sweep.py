"""From a spec to Ray Tune and back: one sweep, its trials, its end."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from cluster.base.config import apply_overrides, read_yaml
from cluster.base.errors import SpecError
from cluster.base.files import write_atomic
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import count_samples
from trainers.devices import local_device
from trainers.engine.stall_files import STALLS
from trainers.run_folder import SPEC, create_run_folder, find_run_folder, unique_name
from trainers.runs import run, session
from trainers.runs.ray_train import scaling_config
from trainers.runs.stalls import last_stall
from trainers.spec import resolve
from trainers.tracking.descriptions import DESCRIPTION_TAG
from trainers.tracking.operation_log import now_ms
from tuning.fused import fusion_plan
from tuning.trials.budget import SweepCostPerEpoch, find_open_budget, open_budget, settle
from tuning.trials.leaderboard import (
    Leaderboard,
    read_leaderboard,
    sweep_description,
    trial_description,
    write_best,
)
from tuning.trials.schedulers import build_scheduler
from tuning.trials.searcher import JournaledSearcher
from tuning.trials.space import SweepRunSpec, read_sweep_spec
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, Sweep, run_trial

BEST_SPEC_FILE, TUNE_FOLDER = "best.yaml", "tune"

TrialCallback = Callable[[str, int, dict[str, Any]], None]
"""Told of a trial's `start`, `result`, `stop`, `done` and `error`, with its number and result."""

_trial_callbacks: dict[str, TrialCallback] = {}
"""By sweep: Tune pickles its callbacks, and what watches a sweep lives in one process only."""


def new_sweep(name: str, overrides: list[str], sweep_name: str | None) -> Sweep:
    """A new sweep of the spec `name`, in a folder of its own."""
    stem, spec = read_sweep_spec(name, overrides)
    data = run.resolved_data(spec)
    spec, workload = resolve(data, SweepRunSpec)
    dataset = prepare_dataset(workload, Path(spec.storage), spec.datasets)
    folder = create_run_folder(Path(spec.storage), sweep_name or unique_name(f"{stem}-sweep"), data)
    return Sweep(data, spec.sweep, dataset, folder)


def resumed_sweep(name: str, storage: Path, overrides: Sequence[str] = ()) -> Sweep:
    """An earlier sweep, to go on with. Only what it may spend can be changed."""
    folder = find_run_folder(name, storage)
    for assignment in overrides:
        if assignment.partition(".")[0] not in ("budget", "cost"):
            raise SpecError(f"--set {assignment}: cannot change in a sweep that has begun")
    data = apply_overrides(read_yaml(folder / SPEC), overrides)
    if "sweep" not in data:
        raise SpecError(f"--resume {name}: is a single run; use heliostat train --resume")
    spec, workload = resolve(data, SweepRunSpec)
    return Sweep(
        data, spec.sweep, prepare_dataset(workload, Path(spec.storage), spec.datasets), folder
    )


def run_to_end(
    sweep: Sweep, on_trial_event: TrialCallback, log_line: Callable[[str], None] = lambda line: None
) -> tuple[Leaderboard, dict[str, Any]]:
    """Run a sweep, or what is left of it, in the Ray that is connected.

    Ctrl-C ends it early with its state saved. `tell` is given a line on how trials share devices.
    Returns what the trials came to, and what MLflow has of the sweep (`Tracker.read`, or
    `unsent`), with `account` and `reason` as `trainers.runs.execution.run_to_end` gives them.
    """
    spec, _ = resolve(sweep.spec_data, SweepRunSpec)
    tracker = session.start_tracking(sweep.folder, spec, sweep.spec_data, kind="sweep")
    _trial_callbacks[sweep.key] = on_trial_event
    became: dict[str, Any] = {}
    tags: dict[str, str] = {}
    try:
        with open_budget(sweep, spec, tracker, epochs_per_trial(sweep, spec)) as purse:
            try:
                with _fused_slots(sweep, spec, tracker, log_line) as slots:
                    _create_tuner(sweep, spec, tracker, slots).fit()
            finally:
                lines, tags = settle(sweep, purse, tracker)
                became = {"account": lines, "reason": purse.reason}
    finally:
        del _trial_callbacks[sweep.key]
        board = read_leaderboard(sweep)
        finished = len(board.ended) == sweep.spec.total_trials
        if board.best is not None:
            write_best(sweep, board.best, sweep.folder / BEST_SPEC_FILE)
            tracker.log_artifact.remote(sweep.key, str(sweep.folder / BEST_SPEC_FILE))
            if finished:
                best = (f"best/{sweep.spec.metric}", board.best.value, 0, now_ms())
                tracker.log.remote(sweep.key, [best], 0)
        if board.pareto_trials:
            tags["heliostat.pareto_front"] = ", ".join(
                f"{number:04d}" for number in board.pareto_trials
            )
        if not finished:
            tags["heliostat.reason"] = became.get("reason") or "stopped"
        tags[DESCRIPTION_TAG] = sweep_description(sweep, board, became.get("account", {}))
        tracker.finish.remote(sweep.key, "FINISHED" if finished else "KILLED", tags)
        tracked = session.end_tracking(tracker, sweep.key)
    return board, {**tracked, **became}


def epochs_per_trial(sweep: Sweep, spec: SweepRunSpec) -> float:
    """Epochs of a whole trial."""
    samples = count_samples(sweep.dataset, "train")
    return spec.train.total_steps(samples) * spec.train.global_batch / samples


@contextlib.contextmanager
def _fused_slots(
    sweep: Sweep, spec: SweepRunSpec, tracker: Any, log_line: Callable[[str], None]
) -> Iterator[int]:
    """The engines of a sweep that is fused; yields how many slots they have, 0 if it is not."""
    import ray

    from tuning.fused.tune_adapter import start_engines, trials_in_slots

    hosts: list[Any] = []
    try:
        chosen = fusion_plan.load_plan(sweep) or fusion_plan.plan_from_spec(sweep)
        if chosen is None and _trials_run_on_local_cpu(
            spec
        ):  # what it compiles, engines find on the disk
            chosen, _ = fusion_plan.try_plan(sweep, cluster_capacity(spec))
        if chosen is None:
            hosts = start_engines(sweep, tracker, cluster_capacity(spec))
            chosen = ray.get(hosts[0].plan.remote(len(hosts)))
        chosen.save(sweep)
        at_once = min(sweep.spec.total_trials, sweep.spec.concurrency or sweep.spec.total_trials)
        needed = math.ceil(at_once / chosen.slots) if chosen.slots else 0
        needed = min(needed, cluster_capacity(spec))
        while len(hosts) > needed:
            ray.kill(hosts.pop())
        hosts += start_engines(sweep, tracker, needed - len(hosts))
        if not hosts:
            each = f"{max_concurrent_trials(spec)} at a time, each in a process"
            log_line(f"{chosen.line}; {each}" if chosen.line else each)
            yield 0
            return
        log_line(chosen.line)
        for host in hosts:
            host.prepare.remote()
        slots = min(chosen.slots * len(hosts), at_once)
        with trials_in_slots(hosts, slots):
            yield slots
    finally:
        for host in hosts:
            ray.kill(host)


def _trials_run_on_local_cpu(spec: SweepRunSpec) -> bool:
    """Whether a trial has what this process has: CPUs of the only machine."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    on_cpu = not spec.sweep.resources.gpu and local_device(spec.scale.accelerator).type == "cpu"
    return on_cpu and len(nodes) == 1


def verify_fused_trials(sweep: Sweep, board: Leaderboard) -> Iterator[str]:
    """A line for each of three fused trials, as they are trained once more, alone."""
    import ray

    from tuning.fused import verify

    if not fusion_plan.planned_slots(sweep):
        yield "nothing to verify: no trial was fused"
        return
    needs = sweep.spec.resources
    alone = ray.remote(num_cpus=needs.cpu, num_gpus=needs.gpu)(verify.measure_deviation)
    for found in [alone.remote(sweep, standing) for standing in verify.trials_to_verify(board)]:
        yield str(ray.get(found))


def _create_tuner(sweep: Sweep, spec: SweepRunSpec, tracker: Any, slots: int) -> tune.Tuner:
    """Ray's tuner, taken up where it was if it has been here before."""
    saves = None
    if slots:
        from tuning.fused.tune_adapter import SLOT_RESOURCE, SlotTrainable

        trainable = tune.with_resources(SlotTrainable, {SLOT_RESOURCE: 1})
        saves = tune.CheckpointConfig(checkpoint_at_end=False)  # the engine's own are enough
    else:
        function = tune.with_parameters(run_trial, sweep=sweep, tracker=tracker)
        trainable = tune.with_resources(function, _trial_resources(spec))
    path = str(sweep.folder / TUNE_FOLDER)
    if tune.Tuner.can_restore(path):
        return tune.Tuner.restore(path, trainable, resume_errored=True)
    # Ray warns of the old output engine, and prints tables of its own, unless told not to.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # It writes every result into three files of its own; ours are in MLflow and with the trial.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    return tune.Tuner(
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
            trial_dirname_creator=_trial_folder_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(sweep.folder),
            callbacks=[_SweepCallback(sweep)],
            checkpoint_config=saves,
            failure_config=tune.FailureConfig(max_failures=spec.scale.max_restarts),
            verbose=0,
        ),
    )


def _trial_folder_name(trial: Any) -> str:
    return f"trial-{trial.config['trial']:04d}-{trial.trial_id}"


def _trial_resources(spec: SweepRunSpec) -> dict[str, float]:
    """What Tune reserves for a trial; a trial of several workers lets Ray Train do that."""
    if spec.scale.max_workers > 1:
        return {"cpu": 0.01}
    return {name: amount for name, amount in spec.sweep.resources.model_dump().items() if amount}


def max_concurrent_trials(spec: SweepRunSpec) -> int:
    """Processes of trials at a time: the spec's number, else as many as there is room for.

    Tune does not see what the workers of a trial need, and would start too many.
    """
    if spec.sweep.concurrency is not None:
        return spec.sweep.concurrency
    return cluster_capacity(spec)


def cluster_capacity(spec: SweepRunSpec) -> int:
    """How many trials, or engines, the cluster has room for today; at least 1."""
    import ray

    workers = spec.scale.max_workers
    if workers > 1:
        each = scaling_config(spec.scale).resources_per_worker
        needs = {name: amount * workers for name, amount in each.items()}
    else:
        needs = {name.upper(): amount for name, amount in _trial_resources(spec).items()}
    have = ray.cluster_resources()
    room = min(int(have.get(name, 0) / amount) for name, amount in needs.items())
    return max(1, min(room, spec.sweep.total_trials))


class _SweepCallback(tune.Callback):  # type: ignore[misc]
    """Keeps MLflow's child runs, the trials' folders and whoever watches up to date."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def _tracker(self) -> Any:
        import ray

        return ray.get_actor(self._sweep.key)  # a resumed sweep has another one than before

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        purse = find_open_budget(self._sweep.key)
        if purse is not None:
            purse.stop_when_spent(any(not trial.is_finished() for trial in trials))

    def _notify(self, event: str, trial: Any) -> None:
        purse = find_open_budget(self._sweep.key)
        if purse is not None:
            purse.on_trial_event(event, trial.config["trial"], trial.last_result or {})
        watch = _trial_callbacks.get(self._sweep.key)
        if watch is not None:
            watch(event, trial.config["trial"], trial.last_result or {})

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        tracked = session.tracked_run(
            self._sweep.trial_key(number),
            self._sweep.trial_spec_data(trial.config),
            parent=self._sweep.key,
            kind="trial",
        )
        slots = fusion_plan.planned_slots(self._sweep)
        if slots:
            shared = f"a slot of {slots}; device time is divided by the trials that shared it"
            tracked = replace(tracked, tags={**tracked.tags, "heliostat.fused": shared})
        self._tracker().start.remote(tracked)
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
        failed = self._sweep.trial_folder(number) / FAILED_FILE
        own, engines = self._sweep.trial_folder(number) / STALLS, self._sweep.folder / STALLS
        stall = last_stall(own) or last_stall(engines)
        reason = f"{stall}" if stall else "its worker was lost too often"
        reason = failed.read_text() if failed.exists() else reason
        tags = {"heliostat.reason": reason, DESCRIPTION_TAG: f"**Failed**: {reason}"}
        self._tracker().finish.remote(self._sweep.trial_key(number), "FAILED", tags)
        self._notify("error", trial)
