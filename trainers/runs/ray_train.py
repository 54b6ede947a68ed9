"""The workers of a run under Ray Train: how many, on what, and what each of them does."""

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

from cluster.base.errors import HeliostatError, SpecError, TrainingError
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
from trainers.runs.metering import POWER_TRACE_ENV_VAR, WorkerMeter
from trainers.runs.stalls import StallWatch, last_stall
from trainers.runs.visibility import can_see_run, require_run_visible
from trainers.spec import RunSpec, ScaleSpec, resolve
from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.reporter import TrackerReporter
from trainers.worker import Worker
from trainers.workload import Workload

POLL_S = 0.2

ProgressCallback = Callable[[int, list[MetricPoint], list[str]], None]
"""Told the steps done, and the metrics and lines for the user that are new, often."""


class PeerLostError(Exception):
    """A worker lost sight of another one; the group is worth starting again."""


class PeerPreemptedError(Exception):
    """A worker lost sight of another one whose machine was announced to go."""


@dataclass(frozen=True)
class WorkerConfig:
    """What Ray Train's workers are told."""

    spec_data: Mapping[str, Any]
    dataset: Path
    folder: Path
    key: str
    started: float = field(default_factory=time.time)
    """When the command was given (Unix time)."""
    power_trace: str | None = field(default_factory=lambda: os.environ.get(POWER_TRACE_ENV_VAR))
    """A recorded trace of power in place of what the workers' devices say."""
    threads: int | None = None
    """Threads of each worker on a CPU; its share of the machine's cores when None."""


def run_workers(
    config: WorkerConfig, tracker: Any, on_progress: ProgressCallback, stop: threading.Event
) -> Outcome:
    """Train with Ray Train until the last step, or until `stop` is set and the state saved.

    Blocks; `watch` is called from this thread. Lost workers are replaced. Raises TrainingError
    with one line that says why training failed, or the SpecError that a worker came upon.
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
    asked = False
    hung = StallWatch(config.folder / STALLS)
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            if stop.is_set() and not asked:
                ray.get(tracker.request_stop.remote(config.key))
                asked = True
            steps, rows, lines = ray.get(tracker.poll.remote(config.key))
            stall = hung.poll()
            on_progress(steps, rows, [*lines, str(stall)] if stall else lines)
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
        hung.remove_empty()


def ray_trainer(
    train_loop: Callable[[dict[str, Any]], Any], job: WorkerConfig, config: dict[str, Any]
) -> Any:
    """Ray's trainer that has every worker of `job` do `work`; its `fit` blocks.

    `work` is given `config` with the pickled job under `job`; the result's `return_value` is
    the first worker's.
    """
    from ray.train import FailureConfig, RunConfig

    spec, _ = resolve(job.spec_data, RunSpec)
    # How soon Ray Train notices that workers are done or dead, or that a node is to go; its
    # defaults are 2 s and 5 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    return _trainer_class()(
        train_loop,
        # Ray's controller takes these apart too; as bytes they don't make it import user code.
        train_loop_config={**config, "job": pickle.dumps(job)},
        scaling_config=scaling_config(spec.scale),
        run_config=RunConfig(
            name=secrets.token_hex(4),
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(max_failures=spec.scale.max_restarts),
        ),
    )


def scaling_config(scale: ScaleSpec) -> Any:
    """The spec's workers as Ray Train's own configuration: one accelerator each, or none."""
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
    """What the cluster lacks today for the spec's workers, in one line, or None."""
    config = scaling_config(scale)
    fewest = scale.workers if isinstance(scale.workers, int) else scale.workers[0]
    missing = missing_resources(fewest, dict(config.resources_per_worker))
    return f"scale.workers: {missing}" if missing else None


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What each of Ray Train's workers does; returns the fields of an `Outcome`."""
    import ray.train

    job: WorkerConfig = pickle.loads(config["job"])
    local_rank = ray.train.get_context().get_local_rank()
    with worker_context(job) as (spec, workload, worker):
        require_run_visible(job.folder, spec)
        dataset = local_dataset(job.dataset, spec)
        reporter: Reporter = NullReporter()
        if worker.rank == 0:
            reporter = TrackerReporter(
                config["tracker"], job.key, preemption_notice=preemption_notice
            )
        with (
            WorkerMeter(config["tracker"], job.key, worker.hardware, local_rank, job.power_trace),
            watch_for_stalls(job, spec, worker),
        ):
            outcome = train(spec, workload, dataset, job.folder, reporter, worker, job.started)
        newest = Checkpoints(job.folder / CHECKPOINTS).latest() if worker.rank == 0 else None
        if outcome.complete and newest is not None and can_see_run(job.folder):
            export_model(job.folder / MODEL, spec, workload, newest)
        return asdict(outcome)


@contextlib.contextmanager
def worker_context(job: WorkerConfig) -> Iterator[tuple[RunSpec, Workload, Worker]]:
    """This process as one of the workers under Ray Train, on its device.

    What goes wrong within is raised as what tells the driver whether to try again.
    """
    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    local_world = context.get_local_world_size()
    cores = (os.cpu_count() or 1) // local_world
    torch.set_num_threads(job.threads or max(1, cores))
    try:
        spec, workload = resolve(job.spec_data, RunSpec)
        index = ray.train.torch.get_device().index or 0
        hardware = local_device(spec.scale.accelerator, index)
        hardware.select()
        yield spec, workload, Worker(rank, world, hardware, local_world)
    except Exception as error:
        if _is_peer_loss(error):
            lost = PeerPreemptedError if preemption_notice() else PeerLostError
            raise lost(str(error)) from error
        if isinstance(error, SpecError):  # what only a worker's own device can tell
            raise
        raise TrainingError(format_error(error)) from error


def watch_for_stalls(
    job: WorkerConfig, spec: RunSpec, worker: Worker
) -> AbstractContextManager[None]:
    """Within it, a worker that hangs is ended, and what it hung in is kept for the driver."""
    timeout_s = spec.train.stall_timeout_s
    return stall_watchdog(job.folder / STALLS, worker.rank, worker.world_size, timeout_s)


def preemption_notice() -> str | None:
    """Which node of this run's is about to be taken away, and when, in a phrase.

    What `ray.train.get_preemption_info` tells, without its barrier: a notice reaches every
    worker, and the loop has its own way to agree.
    """
    import ray
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = ", ".join(addresses.get(node, node) for node in info.preempted_node_ids)
    when = "soon"
    if info.deadline_ms is not None:
        when = time.strftime("at %H:%M:%S %Z", time.localtime(info.deadline_ms / 1000))
    return f"node {nodes} is going {when}"


def _is_peer_loss(error: Exception) -> bool:
    """Whether a collective failed because another worker went away."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def format_error(error: Exception) -> str:
    """One line: what happened, and where in the code."""
    text = str(error).strip().splitlines()
    what = text[0] if text else ""
    if isinstance(error, HeliostatError):
        return what
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {what} ({frame.filename}:{frame.lineno})"


def failure_reason(error: BaseException, folder: Path) -> HeliostatError:
    """Why Ray Train gave up on the run in `folder`, in one line."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        failure = getattr(failure, "_base_exc", failure)
        if isinstance(failure, HeliostatError):
            return failure
    stall = last_stall(folder / STALLS, failures)
    if stall:
        return TrainingError(f"{stall}; it was lost too often (scale.max_restarts)")
    if failures:
        rank, failure = next(iter(failures.items()))
        return TrainingError(f"worker {rank} was lost too often: {type(failure).__name__}")
    return TrainingError(f"{type(error).__name__}: {error}".splitlines()[0])


def _trainer_class() -> Any:
    """Ray's TorchTrainer, which does not try again what failed for a reason of its own.

    Ray restarts the workers after an exception in the user's code as it does after a lost
    machine; a mistake would be shown only after the last attempt.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

    class Policy(DefaultFailurePolicy):  # type: ignore[misc]
        def make_decision(self, training_failed_error: Any) -> Any:
            failures = getattr(training_failed_error, "worker_failures", {}).values()
            bases = [getattr(failure, "_base_exc", failure) for failure in failures]
            if any(isinstance(failure, HeliostatError) for failure in bases):
                return FailureDecision.RAISE
            if any(isinstance(failure, PeerPreemptedError) for failure in bases):
                return FailureDecision.RETRY  # not counted, as the death that caused it
            return super().make_decision(training_failed_error)

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
            policy = Policy(self.run_config.failure_config)
            return super()._initialize_and_run_controller(**{**kwargs, "failure_policy": policy})

        def _create_default_callbacks(self) -> list[Any]:
            # Ray's data sets are not used; their manager would be one more process to start.
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if not isinstance(each, DatasetsCallback)]

    return Trainer
