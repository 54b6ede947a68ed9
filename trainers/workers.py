"""The workers of a run under Ray Train: how many, on what, and what each of them does."""

import os
import pickle
import secrets
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.errors import HeliostatError, TrainingError
from cluster.session import missing_resources
from trainers.checkpoint import Checkpoints
from trainers.export import export_model
from trainers.folder import CHECKPOINTS, MODEL
from trainers.loop import Outcome, train
from trainers.parallel import Worker
from trainers.reporter import SilentReporter, TrackerReporter
from trainers.spec import RunSpec, ScaleSpec, resolve
from trainers.spool import Row

POLL_S = 0.2

Watcher = Callable[[int, list[Row]], None]
"""Told the steps done and the metrics that are new, a few times a second."""


class LostWorkerError(Exception):
    """A worker lost sight of another one; the group is worth starting again."""


@dataclass(frozen=True)
class Job:
    """What Ray Train's workers are told."""

    data: Mapping[str, Any]
    dataset: Path
    folder: Path
    key: str
    threads: int | None = None
    """Threads of each worker on a CPU; its share of the machine's cores when None."""


def run_workers(job: Job, tracker: Any, watch: Watcher, stop: threading.Event) -> Outcome:
    """Train with Ray Train until the last step, or until `stop` is set and the state saved.

    Blocks; `watch` is called from this thread. Lost workers are replaced. Raises TrainingError
    with one line that says why training failed.
    """
    import ray
    from ray.train import FailureConfig, RunConfig

    spec, _ = resolve(job.data, RunSpec)
    # How soon Ray Train notices that workers are done or dead; its default is 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    trainer = _trainer_class()(
        _worker,
        # Ray's controller takes these apart too; as bytes they don't make it import torch.
        train_loop_config={"job": pickle.dumps(job), "tracker": tracker},
        scaling_config=scaling(spec.scale),
        run_config=RunConfig(
            name=secrets.token_hex(4),
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(max_failures=spec.scale.max_restarts),
        ),
    )
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
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            if stop.is_set() and not asked:
                ray.get(tracker.request_stop.remote(job.key))
                asked = True
            watch(*ray.get(tracker.watch.remote(job.key)))
        watch(*ray.get(tracker.watch.remote(job.key)))
    except SystemExit:  # Ray Tune ends the trial that this run is
        tracker.request_stop.remote(job.key)
        thread.join()
        raise
    if errors:
        raise TrainingError(_reason(errors[0])) from errors[0]
    return outcome[0]


def scaling(scale: ScaleSpec) -> Any:
    """The spec's workers as Ray Train's own configuration."""
    import ray
    from ray.train import ScalingConfig

    gpus = ray.cluster_resources().get("GPU", 0) > 0
    use_gpu = gpus if scale.accelerator == "auto" else scale.accelerator != "cpu"
    return ScalingConfig(
        num_workers=scale.workers,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": scale.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        accelerator_type=None if scale.accelerator in ("auto", "cpu", "gpu") else scale.accelerator,
    )


def shortage(scale: ScaleSpec) -> str | None:
    """What the cluster lacks today for the spec's workers, in one line, or None."""
    config = scaling(scale)
    fewest = scale.workers if isinstance(scale.workers, int) else scale.workers[0]
    missing = missing_resources(fewest, dict(config.resources_per_worker))
    return f"scale.workers: {missing}" if missing else None


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """What each of Ray Train's workers does; returns the fields of an `Outcome`."""
    import ray.train
    import ray.train.torch
    import torch

    job: Job = pickle.loads(config["job"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    cores = (os.cpu_count() or 1) // context.get_local_world_size()
    torch.set_num_threads(job.threads or max(1, cores))
    worker = Worker(rank, world, ray.train.torch.get_device())
    try:
        spec, workload = resolve(job.data, RunSpec)
        reporter = TrackerReporter(config["tracker"], job.key) if rank == 0 else SilentReporter()
        outcome = train(spec, workload, job.dataset, job.folder, reporter, worker)
        newest = Checkpoints(job.folder / CHECKPOINTS, keep=1).newest()
        if rank == 0 and outcome.complete and newest is not None:
            export_model(job.folder / MODEL, spec, workload, newest)
        return asdict(outcome)
    except Exception as error:
        if _lost_peer(error):
            raise LostWorkerError(str(error)) from error
        raise TrainingError(explain(error)) from error


def _lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another worker went away."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def explain(error: Exception) -> str:
    """One line: what happened, and where in the code."""
    text = str(error).strip().splitlines()
    what = text[0] if text else ""
    if isinstance(error, HeliostatError):
        return what
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {what} ({frame.filename}:{frame.lineno})"


def _reason(error: BaseException) -> str:
    """Why Ray Train gave up, in one line."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        failure = getattr(failure, "_base_exc", failure)
        if isinstance(failure, TrainingError):
            return str(failure)
    if failures:
        rank, failure = next(iter(failures.items()))
        return f"worker {rank} was lost too often: {type(failure).__name__}"
    return f"{type(error).__name__}: {error}".splitlines()[0]


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
            if any(isinstance(failure, TrainingError) for failure in bases):
                return FailureDecision.RAISE
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
