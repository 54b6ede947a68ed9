"""The workers of a run: the driver that starts them, with Ray Train or alone, and their code."""

import contextlib
import os
import pickle
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from cluster.base.clock import Moment
from cluster.connection.ray_connection import missing_resources, submission_metadata
from cluster.connection.ray_internals import PREEMPTION_WATCHER_ENV_VAR
from cluster.cost.catalog import ray_resource
from trainers.checkpoints.export import export_latest
from trainers.checkpoints.place import store_at
from trainers.data.remote import local_dataset
from trainers.devices import local_device
from trainers.engine.heartbeat import stall_watchdog
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter, Reporter
from trainers.engine.stall_files import STALLS
from trainers.outcome import Outcome
from trainers.run_folder import CHECKPOINTS
from trainers.runs.failure_policy import OutageError, decide_retry, failure_reason, worker_failure
from trainers.runs.ray_train_internals import announced_preemption, trainer_class
from trainers.runs.stalls import StallWatch
from trainers.runs.visibility import can_see_run, require_run_visible
from trainers.runs.worker_meter import POWER_TRACE_ENV_VAR, WorkerMeter
from trainers.spec import RunSpec, ScaleSpec, resolve, spec_at
from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.reporter import TrackerReporter
from trainers.worker import Worker
from trainers.workload import Workload

POLL_S = 0.2
ANY_MODEL = ("auto", "cpu", "gpu")
"""Values of `scale.accelerator` that name no model of accelerator."""

ProgressCallback = Callable[[int, list[MetricPoint], list[str]], None]
"""Called often with the steps done so far, and the new metrics and new lines for the user."""


@dataclass(frozen=True)
class WorkerConfig:
    """The arguments of a run's workers."""

    spec_data: Mapping[str, Any]
    dataset: Path
    folder: Path
    key: str
    started: Moment = field(default_factory=Moment.now)
    """When the command was given."""
    power_trace: str | None = field(default_factory=lambda: os.environ.get(POWER_TRACE_ENV_VAR))
    """A recorded power trace that replaces the readings of the workers' devices."""
    threads: int | None = field(default_factory=lambda: _threads_of_command())
    """Threads of each worker on a CPU; its share of the machine's cores when None."""
    alone: bool = False
    """Whether this is one worker without Ray Train; see `fit`."""


def _threads_of_command() -> int | None:
    """OMP_NUM_THREADS of the user; Ray itself sets it to 1 in workers and submitted jobs."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and submission_metadata() is None else None


def run_workers(
    config: WorkerConfig, tracker: Any, on_progress: ProgressCallback, stop: threading.Event
) -> Outcome:
    """Train with Ray Train until the last step, or until `stop` is set and the state saved.

    Blocks, and calls `on_progress` from this thread. Lost workers are replaced. Raises the
    SpecError of a worker, or TrainingError with one line that says why training failed.
    """
    import ray

    outcome: list[Outcome] = []
    errors: list[BaseException] = []

    def train_to_end() -> None:
        try:
            outcome.append(Outcome(**fit(_train_loop, config, {"tracker": tracker})))
        except BaseException as error:
            errors.append(error)

    ray.get(tracker.watch.remote(config.key))
    thread = threading.Thread(target=train_to_end, daemon=True, name="ray-train")
    thread.start()
    stalls = StallWatch(config.folder / STALLS)
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            if stop.is_set():  # again and again: a tracker that was lost does not know it
                tracker.request_stop.remote(config.key)
            steps, points, lines = ray.get(tracker.poll.remote(config.key))
            stall = stalls.poll()
            on_progress(steps, points, [*lines, str(stall)] if stall else lines)
        on_progress(*ray.get(tracker.poll.remote(config.key)))
    except SystemExit:  # Ray Tune ends the trial that this run is
        ray.get(tracker.request_stop.remote(config.key))
        thread.join()
        raise
    try:
        if errors:
            raise failure_reason(errors[0], config.folder) from errors[0]
        return outcome[0]
    finally:
        stalls.remove_empty()


def fit(
    train_loop: Callable[[dict[str, Any]], Any], worker_config: WorkerConfig, more: dict[str, Any]
) -> Any:
    """Call `train_loop` in every worker; returns what it returns on rank 0. Blocks.

    `train_loop` is given a dictionary: `more`, and the pickled `worker_config`. A failure of
    workers is an exception with `worker_failures`, the exception of each failed worker by rank.

    One worker on a machine that gets no preemption notices has no use for Ray Train, whose
    controller and its helper are two more processes, between which a start goes back and forth.
    """
    spec, _ = resolve(worker_config.spec_data, RunSpec)
    watched = os.environ.get(PREEMPTION_WATCHER_ENV_VAR) != "0"
    if spec.scale.workers != 1 or spec.scale.accelerator not in ANY_MODEL or watched:
        return _ray_trainer(train_loop, worker_config, more, spec.scale).fit().return_value
    config = {**more, "worker_config": pickle.dumps(replace(worker_config, alone=True))}
    return _fit_alone(train_loop, config, spec.scale)


class LoneWorkerError(Exception):
    """The one worker of a run has failed, for good."""

    def __init__(self, failure: Exception) -> None:
        super().__init__(str(failure))
        self.worker_failures = {0: failure}


def _fit_alone(
    train_loop: Callable[[dict[str, Any]], Any], config: dict[str, Any], scale: ScaleSpec
) -> Any:
    """Call `train_loop` in an actor, again if it is lost. Raises LoneWorkerError."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    resources = resources_per_worker(scale)
    group = placement_group([resources])  # by which `driver_meter` knows what is reserved
    named = {"CPU": "num_cpus", "GPU": "num_gpus"}
    worker = ray.remote(TrainWorker).options(
        **{named[name]: amount for name, amount in resources.items()},
        scheduling_strategy=PlacementGroupSchedulingStrategy(group),
    )
    restarts = 0
    try:
        while True:
            actor = worker.remote()
            try:
                return ray.get(actor.run.remote(train_loop, config))
            except ray.exceptions.RayTaskError as error:
                failure = error.cause
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                failure = error
            if decide_retry({0: failure}) == "raise" or restarts == scale.max_restarts:
                raise LoneWorkerError(failure) from failure
            restarts += 1
            ray.kill(actor)
    finally:
        remove_placement_group(group)


class TrainWorker:
    """The process of a worker without Ray Train; it ends with the handle."""

    def run(self, train_loop: Callable[[dict[str, Any]], Any], config: dict[str, Any]) -> Any:
        return train_loop(config)


def _ray_trainer(
    train_loop: Callable[[dict[str, Any]], Any],
    worker_config: WorkerConfig,
    more: dict[str, Any],
    scale: ScaleSpec,
) -> Any:
    """Ray's trainer for several workers, or for machines that come and go; see `fit`."""
    from ray.train import FailureConfig, RunConfig

    # How soon Ray Train notices that workers are done or dead, or that a node is to go; its
    # defaults are 2 s and 5 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    return trainer_class(decide_retry)(
        train_loop,
        # Ray's controller unpickles this too; as bytes it does not import the user's code there.
        train_loop_config={**more, "worker_config": pickle.dumps(worker_config)},
        scaling_config=_scaling_config(scale),
        run_config=RunConfig(
            name=secrets.token_hex(4),
            storage_path=str(worker_config.folder / "ray"),
            failure_config=FailureConfig(max_failures=scale.max_restarts),
        ),
    )


def resources_per_worker(scale: ScaleSpec) -> dict[str, float]:
    """What Ray reserves for each of the spec's workers: CPUs, and one accelerator or none."""
    import ray

    cpus = {"CPU": scale.cpus_per_worker}
    if scale.accelerator == "cpu" or (
        scale.accelerator == "auto" and not ray.cluster_resources().get("GPU", 0)
    ):
        return cpus
    return {**cpus, ray_resource(scale.accelerator): 1}


def _scaling_config(scale: ScaleSpec) -> Any:
    """Ray Train's configuration for the spec's workers."""
    from ray.train import ScalingConfig

    resources = resources_per_worker(scale)
    return ScalingConfig(
        num_workers=scale.workers,
        use_gpu="GPU" in resources,
        resources_per_worker=resources,
        accelerator_type=None if scale.accelerator in ANY_MODEL else scale.accelerator,
    )


def resource_shortage(scale: ScaleSpec) -> str | None:
    """One line on the resources that the cluster lacks today for the spec's workers, or None."""
    fewest = scale.workers if isinstance(scale.workers, int) else scale.workers[0]
    missing = missing_resources(fewest, resources_per_worker(scale))
    return f"scale.workers: {missing}" if missing else None


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """The code of each worker; returns the fields of an `Outcome`."""
    import ray

    run: WorkerConfig = pickle.loads(config["worker_config"])
    tracker, rank = config["tracker"], _place(run).rank
    try:
        return _train(run, tracker)
    except OutageError as error:
        told = tracker.post_message.remote(run.key, f"worker {rank} failed: {error}")
        ray.wait([told], timeout=5)  # this process may be ended right after
        raise


def _train(run: WorkerConfig, tracker: Any) -> dict[str, Any]:
    """Train, and export the model. Raises what `worker_failure` returns."""
    local_rank = _place(run).local_rank
    notice = (lambda: None) if run.alone else preemption_notice
    with worker_context(run) as (spec, workload, worker):
        require_run_visible(run.folder, spec)
        dataset = local_dataset(run.dataset, spec)
        of_first = TrackerReporter(tracker, run.key, preemption_notice=notice)
        reporter: Reporter = of_first if worker.is_rank_zero else NullReporter()
        with (
            WorkerMeter(tracker, run.key, worker.hardware, local_rank, run.power_trace),
            watch_for_stalls(run, spec, worker),
        ):
            begin_s = run.started.unix_s_here()
            outcome = train(spec, workload, dataset, run.folder, reporter, worker, begin_s)
        if outcome.complete and worker.is_rank_zero and can_see_run(run.folder):
            for line in export_latest(run.folder, *spec_at(spec, workload, outcome.step)):
                reporter.log_note("export", line)
            reporter.flush()
        if outcome.complete and local_rank == 0:
            store_at(run.folder / CHECKPOINTS, spec.checkpoint.uri, moves=False).forget_copies()
        return asdict(outcome)


@contextlib.contextmanager
def worker_context(config: WorkerConfig) -> Iterator[tuple[RunSpec, Workload, Worker]]:
    """Set this process up as one of a run's workers, on its device.

    Errors are converted to an exception type that tells the driver whether to restart.
    """
    import torch

    place = _place(config)
    cores = (os.cpu_count() or 1) // place.local_world_size
    try:
        spec, workload = resolve(config.spec_data, RunSpec)
        torch.set_num_threads(spec.scale.threads or config.threads or max(1, cores))
        hardware = local_device(spec.scale.accelerator, place.device_index)
        hardware.select()
        yield spec, workload, Worker(place.rank, place.world_size, hardware, place.local_world_size)
    except Exception as error:
        failure = worker_failure(error, preempted=lambda: preemption_notice() is not None)
        raise failure from (None if failure is error else error)


class _Place(NamedTuple):
    """The place of this process in its group."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device_index: int = 0


def _place(config: WorkerConfig) -> _Place:
    if config.alone:
        return _Place()
    import ray.train.torch

    context = ray.train.get_context()
    return _Place(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_local_rank(),
        context.get_local_world_size(),
        ray.train.torch.get_device().index or 0,
    )


def watch_for_stalls(
    config: WorkerConfig, spec: RunSpec, worker: Worker
) -> AbstractContextManager[None]:
    """Within this context, a worker that hangs is ended, and its stacks are kept for the driver."""
    timeout_s = spec.train.stall_timeout_s
    return stall_watchdog(config.folder / STALLS, worker.rank, worker.world_size, timeout_s)


def preemption_notice() -> str | None:
    """A phrase on the node of this run that is about to be preempted, and when; None without.

    Ray's own `get_preemption_info` is a barrier; none is needed, as a notice reaches all workers.
    """
    import ray

    info = announced_preemption()
    if info is None:
        return None
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = ", ".join(addresses.get(node, node) for node in info.preempted_node_ids)
    when = "soon"
    if info.deadline_ms is not None:
        when = time.strftime("at %H:%M:%S %Z", time.localtime(info.deadline_ms / 1000))
    return f"node {nodes} is going {when}"
