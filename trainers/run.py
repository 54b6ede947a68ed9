"""From a spec to Ray Train and back: one run, its folder, its workers, its end."""

import contextlib
import json
import os
import pickle
import platform
import secrets
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from cluster.config import flatten, override, read_yaml, write_yaml
from cluster.errors import SpecError, TrainingError
from cluster.files import write_atomic
from cluster.session import missing_resources, ray_session
from cluster.terminal import quiet
from trainers.checkpoint import Checkpoints
from trainers.data import prepare, rows
from trainers.export import export_model
from trainers.loop import Outcome, train
from trainers.parallel import Worker
from trainers.spec import RunSpec, ScaleSpec, find_spec, resolve
from trainers.track import (
    Row,
    SilentReporter,
    TrackedRun,
    TrackerReporter,
    default_uri,
    drain,
    start_tracker,
)
from trainers.workloads.base import Workload

if TYPE_CHECKING:
    from rich.console import Console

SPEC, ENVIRONMENT, MODEL = "spec.yaml", "environment.json", "model"
POLL_S = 0.2

Watcher = Callable[[int, list[Row]], None]
"""Told the steps done and the metrics that are new, a few times a second."""


class LostWorkerError(Exception):
    """A worker lost sight of another one; the group is worth starting again."""


def settled(spec: RunSpec) -> dict[str, Any]:
    """The spec as plain data with every default filled in, the same from any working folder."""
    full = spec.model_dump(mode="json")
    if full["sweep"] is None:
        del full["sweep"]
    full["storage"] = str(Path(spec.storage).absolute())
    full["tracking"]["uri"] = spec.tracking.uri or default_uri()
    return full


def create_folder(storage: Path, name: str, data: Mapping[str, Any]) -> Path:
    """The folder of a new run or sweep, with its spec and its environment in it."""
    folder = storage / name
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SpecError(f"--name {name}: {folder} is there already") from None
    except OSError as error:
        raise SpecError(f"storage: cannot make {folder}: {error.strerror}") from None
    write_yaml(data, folder / SPEC)
    write_atomic(folder / ENVIRONMENT, json.dumps(environment(), indent=1))
    return folder


def unique_name(stem: str) -> str:
    """A name that says what and when, and that two starts in one second do not share."""
    return f"{stem}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def find_folder(name: str, storage: Path) -> Path:
    """The folder of an earlier run or sweep, by its name under `storage` or by its path."""
    for folder in (storage / name, Path(name)):
        if (folder / SPEC).is_file():
            return folder.absolute()
    raise SpecError(f"--resume {name}: no such run in {storage}")


def find_checkpoint(name: str, storage: Path) -> Path:
    """The newest whole checkpoint of a run, a trial or a folder of checkpoints."""
    for folder in (storage / name, Path(name)):
        for checkpoints in (folder / "checkpoints", folder):
            found = Checkpoints(checkpoints, keep=1).newest()
            if found is not None:
                return found
    raise SpecError(f"--from {name}: no checkpoint there")


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that no second process goes on with the same run."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise SpecError(f"{folder.name}: another process is working on this run") from None


def environment() -> dict[str, Any]:
    """What a run was made with: versions of Python, the system and every package."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]},
    }


def git_tags(folder: Path) -> dict[str, str]:
    """The commit of the working folder under MLflow's own tag, if it is in a git checkout."""
    command = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run(
            [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*command, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"mlflow.source.git.commit": commit, "heliostat.git.changed": str(bool(changed)).lower()}


def tracked_run(
    key: str, data: Mapping[str, Any], parent: str | None = None, kind: str = "train"
) -> TrackedRun:
    """A run as MLflow is to show it: the spec's fields as parameters by dotted path."""
    params = {k: v for k, v in flatten(data).items() if not k.startswith("sweep.")}
    tags = {"heliostat.kind": kind, **git_tags(Path.cwd())}
    return TrackedRun(key, params, tags, parent)


@dataclass(frozen=True)
class Run:
    """One training run and its folder on disk."""

    data: Mapping[str, Any]
    """The whole spec as plain data."""
    spec: RunSpec
    workload: Workload
    dataset: Path
    folder: Path

    @property
    def key(self) -> str:
        """Its name, also with the tracker."""
        return self.folder.name

    @property
    def samples(self) -> int:
        """Samples in the training split."""
        return rows(self.dataset, "train")

    @property
    def total_steps(self) -> int:
        return self.spec.train.total_steps(self.samples)


def new_run(name: str, overrides: list[str], run_name: str | None, source: str | None) -> Run:
    """A new run of the spec `name`, in a folder of its own.

    With `source`, the name of a run or trial, it starts from a copy of that one's newest
    checkpoint and goes on at that step.
    """
    stem, data = find_spec(name)
    spec, _ = resolve(override(data, overrides), RunSpec)
    data = settled(spec)
    spec, workload = resolve(data, RunSpec)
    storage = Path(spec.storage)
    checkpoint = find_checkpoint(source, storage) if source else None
    dataset = prepare(workload, storage)
    folder = create_folder(storage, run_name or unique_name(stem), data)
    if checkpoint is not None:
        shutil.copytree(checkpoint, folder / "checkpoints" / checkpoint.name)
    return Run(data, spec, workload, dataset, folder)


def resumed_run(name: str, storage: Path, overrides: list[str]) -> Run:
    """An earlier run, to go on with. Only what does not change the result may be overridden."""
    folder = find_folder(name, storage)
    for assignment in overrides:
        section = assignment.partition(".")[0]
        if section not in ("scale", "checkpoint"):
            raise SpecError(
                f"--set {assignment}: cannot change in a resumed run; start a new one with --from"
            )
    data = override(read_yaml(folder / SPEC), overrides)
    spec, workload = resolve(data, RunSpec)
    return Run(data, spec, workload, prepare(workload, Path(spec.storage)), folder)


def execute(run: Run, watch: Watcher, stop: threading.Event) -> tuple[Outcome, dict[str, Any]]:
    """Do a run, tracked from its start to its end, in the Ray that is connected.

    Returns what became of it, and what MLflow has of it (`Tracker.read`); instead of that
    `unsent`, one line, when MLflow cannot be reached.
    """
    import ray

    tracking = run.spec.tracking
    tracker = start_tracker(run.folder / "track", str(tracking.uri), tracking.experiment, run.key)
    tracker.start.remote(tracked_run(run.key, run.data))
    for name in (SPEC, ENVIRONMENT):
        tracker.artifact.remote(run.key, str(run.folder / name))
    try:
        job = Job(run.data, run.dataset, run.folder, run.key)
        outcome = run_workers(job, tracker, watch, stop)
    except BaseException as error:
        failed = isinstance(error, TrainingError)
        tags = {"heliostat.reason": str(error) if failed else "interrupted"}
        tracker.finish.remote(run.key, "FAILED" if failed else "KILLED", tags)
        drain(tracker, timeout_s=10)
        raise
    if outcome.complete:
        tracker.model.remote(run.key, str(run.folder / MODEL))
        tracker.finish.remote(run.key, "FINISHED")
    else:
        tracker.finish.remote(run.key, "KILLED", {"heliostat.reason": "stopped"})
    unsent = drain(tracker, timeout_s=60)
    return outcome, {"unsent": unsent} if unsent else ray.get(tracker.read.remote(run.key))


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
        # Plain data: Ray's controller unpickles it too, and need not import torch for that.
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
            outcome.append(trainer.fit().return_value)
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


def _worker(config: dict[str, Any]) -> Outcome:
    """What each of Ray Train's workers does."""
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
        newest = Checkpoints(job.folder / "checkpoints", keep=1).newest()
        if rank == 0 and outcome.complete and newest is not None:
            export_model(job.folder / MODEL, spec, workload, newest)
        return outcome
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
    if isinstance(error, TrainingError):
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

    return Trainer


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second one interrupts at once."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def at_work(
    folder: Path, spec: RunSpec, address: str | None, verbose: bool
) -> Iterator[tuple["Console", threading.Event]]:
    """Everything around a run or sweep: its folder held, Ray connected, the terminal quiet.

    Yields the console and the event that Ctrl-C sets.
    """
    storage = Path(spec.storage)
    code = Path.cwd() if ":" in spec.workload else None
    # The user's folder travels to the workers; what runs write into it need not.
    exclude = (".git", ".venv", "mlflow.db", "mlartifacts", storage.name, "__pycache__")
    log = folder / "ray.log"
    with (
        exclusive(folder),
        quiet(log, verbose) as console,
        stop_on_signal() as stop,
        ray_session(address, code, exclude) as started_here,
    ):
        if not verbose:
            console.print(f"log: {short_path(log)}", style="dim")
        missing = shortage(spec.scale)
        if missing and started_here:
            raise SpecError(missing)
        if missing:
            console.print(f"{missing}; waiting for it to grow", style="yellow")
        yield console, stop


def short_path(path: Path) -> str:
    """A path as the user would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def storage_of(name: str | None) -> Path:
    """Where the runs of the spec `name` are kept; the default place when there is no name."""
    return Path(find_spec(name)[1].get("storage", "runs") if name else "runs")
