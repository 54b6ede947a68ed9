"""The workers of a run under Ray Train: the driver that starts them, and the code they run."""

import contextlib
import os
import pickle
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.base.errors import SpecError, TrainingError
from cluster.connection.ray_connection import missing_resources
from cluster.cost.catalog import ray_resource
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import export_model
from trainers.data.remote import local_dataset
from trainers.devices import local_device
from trainers.engine.heartbeat import stall_watchdog
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter, Reporter
from trainers.engine.stall_files import STALLS
from trainers.outcome import Outcome
from trainers.run_folder import CHECKPOINTS, MODEL
from trainers.runs.failure_policy import (
    PeerLostError,
    PeerPreemptedError,
    decide_retry,
    failure_reason,
    format_error,
    is_peer_loss,
)
from trainers.runs.ray_train_internals import announced_preemption, trainer_class
from trainers.runs.stalls import StallWatch
from trainers.runs.visibility import can_see_run, require_run_visible
from trainers.runs.worker_meter import POWER_TRACE_ENV_VAR, WorkerMeter
from trainers.spec import RunSpec, ScaleSpec, resolve
from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.reporter import TrackerReporter
from trainers.worker import Worker
from trainers.workload import Workload

POLL_S = 0.2

ProgressCallback = Callable[[int, list[MetricPoint], list[str]], None]
"""Called often with the steps done so far, and the new metrics and new lines for the user."""


@dataclass(frozen=True)
class WorkerConfig:
    """The arguments of a run's workers."""

    spec_data: Mapping[str, Any]
    dataset: Path
    folder: Path
    key: str
    started: float = field(default_factory=time.time)
    """When the command was given (Unix time)."""
    power_trace: str | None = field(default_factory=lambda: os.environ.get(POWER_TRACE_ENV_VAR))
    """A recorded power trace that replaces the readings of the workers' devices."""
    threads: int | None = None
    """Threads of each worker on a CPU; its share of the machine's cores when None."""


def run_workers(
    config: WorkerConfig, tracker: Any, on_progress: ProgressCallback, stop: threading.Event
) -> Outcome:
    """Train with Ray Train until the last step, or until `stop` is set and the state saved.

    Blocks, and calls `on_progress` from this thread. Lost workers are replaced. Raises the
    SpecError of a worker, or TrainingError with one line that says why training failed.
    """
    import ray

    trainer = ray_trainer(_train_loop, config, {"tracker": tracker})
    outcome: list[Outcome] = []
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            outcome.append(Outcome(**trainer.fit().return_value))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    thread.start()
    stop_requested = False
    stalls = StallWatch(config.folder / STALLS)
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            if stop.is_set() and not stop_requested:
                ray.get(tracker.request_stop.remote(config.key))
                stop_requested = True
            steps, points, lines = ray.get(tracker.poll.remote(config.key))
            stall = stalls.poll()
            on_progress(steps, points, [*lines, str(stall)] if stall else lines)
        on_progress(*ray.get(tracker.poll.remote(config.key)))
    except SystemExit:  # Ray Tune ends the trial that this run is
        tracker.request_stop.remote(config.key)
        thread.join()
        raise
    try:
        if errors:
            raise failure_reason(errors[0], config.folder) from errors[0]
        return outcome[0]
    finally:
        stalls.remove_empty()


def ray_trainer(
    train_loop: Callable[[dict[str, Any]], Any], worker_config: WorkerConfig, more: dict[str, Any]
) -> Any:
    """Ray's trainer that calls `train_loop` in every worker; its `fit` blocks.

    `train_loop` is given a dictionary: `more`, and the pickled `worker_config`. The
    `return_value` of the result is that of rank 0.
    """
    from ray.train import FailureConfig, RunConfig

    spec, _ = resolve(worker_config.spec_data, RunSpec)
    # How soon Ray Train notices that workers are done or dead, or that a node is to go; its
    # defaults are 2 s and 5 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    return trainer_class(decide_retry)(
        train_loop,
        # Ray's controller unpickles this too; as bytes it does not import the user's code there.
        train_loop_config={**more, "worker_config": pickle.dumps(worker_config)},
        scaling_config=scaling_config(spec.scale),
        run_config=RunConfig(
            name=secrets.token_hex(4),
            storage_path=str(worker_config.folder / "ray"),
            failure_config=FailureConfig(max_failures=spec.scale.max_restarts),
        ),
    )


def scaling_config(scale: ScaleSpec) -> Any:
    """Ray Train's configuration for the spec's workers: one accelerator each, or none."""
    import ray
    from ray.train import ScalingConfig

    resource: str | None = ray_resource(scale.accelerator)  # GPU for gpu
    named = scale.accelerator not in ("auto", "cpu", "gpu")
    if scale.accelerator == "cpu" or (
        scale.accelerator == "auto" and not ray.cluster_resources().get("GPU", 0)
    ):
        resource = None
    return ScalingConfig(
        num_workers=scale.workers,
        use_gpu=resource == "GPU",
        resources_per_worker={"CPU": scale.cpus_per_worker, **({resource: 1} if resource else {})},
        accelerator_type=scale.accelerator if named else None,
    )


def resource_shortage(scale: ScaleSpec) -> str | None:
    """One line on the resources that the cluster lacks today for the spec's workers, or None."""
    config = scaling_config(scale)
    fewest = scale.workers if isinstance(scale.workers, int) else scale.workers[0]
    missing = missing_resources(fewest, dict(config.resources_per_worker))
    return f"scale.workers: {missing}" if missing else None


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """The code of each worker; returns the fields of an `Outcome`."""
    import ray.train

    run: WorkerConfig = pickle.loads(config["worker_config"])
    tracker = config["tracker"]
    local_rank = ray.train.get_context().get_local_rank()
    with worker_context(run) as (spec, workload, worker):
        require_run_visible(run.folder, spec)
        dataset = local_dataset(run.dataset, spec)
        reporter: Reporter = NullReporter()
        if worker.is_rank_zero:
            reporter = TrackerReporter(tracker, run.key, preemption_notice=preemption_notice)
        with (
            WorkerMeter(tracker, run.key, worker.hardware, local_rank, run.power_trace),
            watch_for_stalls(run, spec, worker),
        ):
            outcome = train(spec, workload, dataset, run.folder, reporter, worker, run.started)
        latest = Checkpoints(run.folder / CHECKPOINTS).latest() if worker.is_rank_zero else None
        if outcome.complete and latest is not None and can_see_run(run.folder):
            export_model(run.folder / MODEL, spec, workload, latest)
        return asdict(outcome)


@contextlib.contextmanager
def worker_context(config: WorkerConfig) -> Iterator[tuple[RunSpec, Workload, Worker]]:
    """Set this process up as one of Ray Train's workers, on its device.

    Errors are converted to an exception type that tells the driver whether to restart.
    """
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    local_world_size = context.get_local_world_size()
    cores = (os.cpu_count() or 1) // local_world_size
    torch.set_num_threads(config.threads or max(1, cores))
    try:
        spec, workload = resolve(config.spec_data, RunSpec)
        index = ray.train.torch.get_device().index or 0
        hardware = local_device(spec.scale.accelerator, index)
        hardware.select()
        yield spec, workload, Worker(rank, world_size, hardware, local_world_size)
    except Exception as error:
        if is_peer_loss(error):
            traceback.clear_frames(error.__traceback__)  # its model: this process may train again
            lost = PeerPreemptedError if preemption_notice() else PeerLostError
            raise lost(str(error)) from error
        if isinstance(error, SpecError):  # a mistake that only the worker's own device shows
            raise
        raise TrainingError(format_error(error)) from error


def watch_for_stalls(
    config: WorkerConfig, spec: RunSpec, worker: Worker
) -> AbstractContextManager[None]:
    """Within this context, a worker that hangs is ended, and its stacks are kept for the driver."""
    timeout_s = spec.train.stall_timeout_s
    return stall_watchdog(config.folder / STALLS, worker.rank, worker.world_size, timeout_s)


def preemption_notice() -> str | None:
    """A phrase on the node of this run that is about to be preempted, and when; None without.

    Ray's own `get_preemption_info` is a barrier of all workers. None is needed: a notice reaches
    every worker, and the loop has its own way to agree.
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
