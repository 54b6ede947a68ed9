"""From a spec to Ray Train and back: one run, its folder, its workers, its end."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.config import apply_overrides, flatten, read_yaml
from cluster.base.errors import HeliostatError, SpecError
from cluster.base.terminal import redirect_output
from cluster.connection.ray_connection import base_folder, ray_session
from cluster.jobs.secret_scan import secret_in_text
from trainers.checkpoints.checkpoints import Checkpoints, find_checkpoint
from trainers.checkpoints.export import export_model
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import count_samples
from trainers.outcome import Outcome
from trainers.planning.forecast import Forecast, ForecastHistory, describe_outcome, forecast_keys
from trainers.run_folder import (
    CHECKPOINTS,
    ENVIRONMENT,
    LOG,
    MODEL,
    SPEC,
    TRACKING,
    create_run_folder,
    display_path,
    find_run_folder,
    git_tags,
    locked,
    unique_name,
)
from trainers.runs.metering import DriverMeter
from trainers.runs.ray_train import (
    ProgressCallback,
    WorkerConfig,
    resource_shortage,
    run_workers,
    scaling_config,
)
from trainers.runs.visibility import require_visible_everywhere
from trainers.spec import RunSpec, find_spec, resolve
from trainers.tracking.descriptions import DESCRIPTION_TAG, run_description
from trainers.tracking.operation_log import now_ms
from trainers.tracking.preflight import check_access
from trainers.tracking.tracker import (
    TrackedRun,
    default_tracking_uri,
    start_tracker,
    wait_until_sent,
)
from trainers.workload import Workload

if TYPE_CHECKING:
    from argparse import Namespace

    from rich.console import Console


def resolved_data(spec: RunSpec) -> dict[str, Any]:
    """The spec as plain data with every default filled in, the same from any working folder."""
    full = spec.model_dump(mode="json")
    if full["sweep"] is None:
        del full["sweep"]
    full["storage"] = str(base_folder() / spec.storage)
    full["tracking"]["uri"] = spec.tracking.uri or default_tracking_uri()
    for path, value in flatten(full).items():
        if isinstance(value, str) and (what := secret_in_text(value)):
            raise SpecError(f"{path}: {what}; specs are kept and sent to MLflow, give it elsewhere")
    return full


def tracked_run(
    key: str, spec_data: Mapping[str, Any], parent: str | None = None, kind: str = "train"
) -> TrackedRun:
    """A run as MLflow is to show it: the spec's fields as parameters by dotted path."""
    params = {k: v for k, v in flatten(spec_data).items() if not k.startswith("sweep.")}
    tags = {"heliostat.kind": kind, **git_tags(Path.cwd())}
    return TrackedRun(key, params, tags, parent)


@dataclass(frozen=True)
class Run:
    """One training run and its folder on disk."""

    spec_data: Mapping[str, Any]
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
        return count_samples(self.dataset, "train")

    @property
    def total_steps(self) -> int:
        return self.spec.train.total_steps(self.samples)


def new_run(name: str, overrides: list[str], run_name: str | None, source: str | None) -> Run:
    """A new run of the spec `name`, in a folder of its own.

    With `source`, the name of a run or trial, it starts from a copy of that one's newest
    checkpoint and goes on at that step.
    """
    stem, data = find_spec(name)
    spec, _ = resolve(apply_overrides(data, overrides), RunSpec)
    data = resolved_data(spec)
    spec, workload = resolve(data, RunSpec)
    storage = Path(spec.storage)
    checkpoint = find_checkpoint(source, storage) if source else None
    dataset = prepare_dataset(workload, storage, spec.datasets)
    folder = create_run_folder(storage, run_name or unique_name(stem), data)
    if checkpoint is not None:
        Checkpoints(folder / CHECKPOINTS, spec.checkpoint).import_from(checkpoint)
    return Run(data, spec, workload, dataset, folder)


def resumed_run(name: str, storage: Path, overrides: list[str]) -> Run:
    """An earlier run, to go on with. Only what does not change the result may be overridden."""
    folder = find_run_folder(name, storage)
    for assignment in overrides:
        section = assignment.partition(".")[0]
        if section not in ("scale", "checkpoint", "budget", "cost"):
            raise SpecError(
                f"--set {assignment}: cannot change in a resumed run; start a new one with --from"
            )
    data = apply_overrides(read_yaml(folder / SPEC), overrides)
    spec, workload = resolve(data, RunSpec)
    return Run(
        data, spec, workload, prepare_dataset(workload, Path(spec.storage), spec.datasets), folder
    )


def run_to_end(
    run: Run, on_progress: ProgressCallback, stop: threading.Event
) -> tuple[Outcome, dict[str, Any]]:
    """Do a run, tracked from its start to its end, in the Ray that is connected.

    Returns what became of it, and what MLflow has of it (`Tracker.read`); instead of that
    `unsent`, one line, when MLflow cannot be reached. With these `account`, the lines of what the
    run has cost so far, and `reason`, the limit of its budget at which it was stopped.
    """
    tracker = start_tracking(run.folder, run.spec, run.spec_data)
    metering: DriverMeter | None = None
    expected = _latest_forecast(run)
    if expected is not None:
        tracker.log_note.remote(run.key, "forecast", str(expected))
    wall_s = 0.0
    try:
        if (run.folder / MODEL).exists():  # exported after the last step: nothing is left to do
            outcome = Outcome(run.total_steps, run.total_steps, {}, 0.0)
        else:
            metering = DriverMeter(run.folder, run.spec, tracker)
            job = WorkerConfig(run.spec_data, run.dataset, run.folder, run.key)
            began = time.monotonic()
            outcome = run_workers(job, tracker, metering.wrap_progress(on_progress, stop), stop)
            wall_s = time.monotonic() - began
    except BaseException as error:
        failed = isinstance(error, HeliostatError)
        tags = {"heliostat.reason": str(error) if failed else "interrupted"}
        tags[DESCRIPTION_TAG] = (
            f"**{'Failed' if failed else 'Interrupted'}**: {error}".removesuffix(": ")
        )
        tags |= metering.finish()[1] if metering else {}
        tracker.finish.remote(run.key, "FAILED" if failed else "KILLED", tags)
        wait_until_sent(tracker, timeout_s=10)
        raise
    became: dict[str, Any] = {}
    tags = {}
    if metering is not None:
        account, tags = metering.finish()
        became = {"account": metering.summary_lines(account), "reason": metering.limit_reached}
    if outcome.complete:
        _export_if_missing(run)
        if expected is not None and wall_s:
            became["forecast"] = _record_forecast_outcome(run, tracker, expected, outcome, wall_s)
        tracker.log_model.remote(run.key, str(run.folder / MODEL))
    else:
        tags["heliostat.reason"] = became.get("reason") or "stopped"
    tags[DESCRIPTION_TAG] = run_description(outcome, became)
    tracker.finish.remote(run.key, "FINISHED" if outcome.complete else "KILLED", tags)
    return outcome, {**end_tracking(tracker, run.key), **became}


def _latest_forecast(run: Run) -> Forecast | None:
    """What `heliostat plan` forecast for this run; None also where it goes on with an earlier one.

    In the Ray that is connected: what `scale.accelerator: auto` means depends on it.
    """
    if Checkpoints(run.folder / CHECKPOINTS, run.spec.checkpoint).latest() is not None:
        return None
    keys = forecast_keys(run.spec_data, with_gpus=bool(scaling_config(run.spec.scale).use_gpu))
    return ForecastHistory(Path(run.spec.storage)).latest_for(keys)


def _record_forecast_outcome(
    run: Run, tracker: Any, expected: Forecast, outcome: Outcome, wall_s: float
) -> str:
    """Keep what became of the forecast, for the next ones and with MLflow; in one line."""
    ForecastHistory(Path(run.spec.storage)).record_actual(run.key, expected, wall_s)
    text = describe_outcome(expected, wall_s)
    found = {
        "forecast/wall_s": expected.wall_s.middle,
        "forecast/low_s": expected.wall_s.low,
        "forecast/high_s": expected.wall_s.high,
        "forecast/actual_s": wall_s,
    }
    rows = [(name, value, outcome.step, now_ms()) for name, value in found.items()]
    tracker.log.remote(run.key, rows, outcome.step)
    tracker.log_note.remote(run.key, "forecast", text)
    return text


def _export_if_missing(run: Run) -> None:
    """Export the model on this machine, where the worker that did could not see the folder."""
    if not (run.folder / MODEL).exists():
        newest = Checkpoints(run.folder / CHECKPOINTS, run.spec.checkpoint).latest()
        assert newest is not None  # the last step is always saved
        export_model(run.folder / MODEL, run.spec, run.workload, newest)


def start_tracking(
    folder: Path, spec: RunSpec, spec_data: Mapping[str, Any], kind: str = "train"
) -> Any:
    """The tracker of the run or sweep in `folder`, told of it and of what it was made with."""
    key, tracking = folder.name, spec.tracking
    tracker = start_tracker(folder / TRACKING, str(tracking.uri), tracking.experiment, key)
    tracker.start.remote(tracked_run(key, spec_data, kind=kind))
    for name in (SPEC, ENVIRONMENT):
        tracker.log_artifact.remote(key, str(folder / name))
    return tracker


def end_tracking(tracker: Any, key: str) -> dict[str, Any]:
    """Wait until MLflow has everything; what it has, or why it has not (`unsent`)."""
    import ray

    unsent = wait_until_sent(tracker, timeout_s=60)
    return {"unsent": unsent} if unsent else ray.get(tracker.read.remote(key))


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts at once.

    SIGTERM does what Ctrl-C does at that moment, also while Ray Tune handles it. It is also what
    ends a submitted job, in whose processes Ray has blocked Ctrl-C.
    """
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    interrupt = signal.signal(signal.SIGINT, handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    terminate = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)


@contextlib.contextmanager
def run_session(
    folder: Path, spec: RunSpec, address: str | None, verbose: bool
) -> Iterator[tuple["Console", threading.Event]]:
    """Everything around a run or sweep: its folder held, Ray connected, the terminal quiet.

    Yields the console and the event that Ctrl-C sets.
    """
    away = check_access(str(spec.tracking.uri), spec.tracking.experiment)
    with (
        folder_session(folder, spec, address, verbose) as (console, started_here),
        stop_on_signal() as stop,  # within: ray.init has a handler of its own
    ):
        if away:
            console.print(away, style="yellow", highlight=False)
        missing = resource_shortage(spec.scale)
        if missing and started_here:
            raise SpecError(missing)
        require_visible_everywhere(folder, spec)
        if missing:
            console.print(f"{missing}; waiting for it to grow", style="yellow")
        yield console, stop


@contextlib.contextmanager
def folder_session(
    folder: Path, spec: RunSpec, address: str | None, verbose: bool
) -> Iterator[tuple["Console", bool]]:
    """A folder held, Ray connected, what others print in the folder's log.

    Yields the console, and whether the Ray was started here.
    """
    storage = Path(spec.storage)
    code = Path.cwd() if ":" in spec.workload else None
    # The user's folder travels to the workers; what runs write into it need not.
    exclude = (".git", ".venv", "mlflow.db", "mlartifacts", storage.name, "__pycache__")
    log = folder / LOG
    with (
        locked(folder),
        redirect_output(log, verbose) as console,
        ray_session(address, code, exclude) as started_here,
    ):
        if not verbose:
            console.print(f"log: {display_path(log)}", style="dim")
        yield console, started_here


def storage_for_spec(name: str | None) -> Path:
    """Where the runs of the spec `name` are kept; the default place when there is no name."""
    return base_folder() / (find_spec(name)[1].get("storage", "runs") if name else "runs")


def find_started(args: "Namespace") -> Path | None:
    """The storage in which the run or sweep of `--or-resume` is, if it has been begun."""
    if not (args.or_resume and args.spec and args.name) or args.resume:
        return None
    data = apply_overrides(find_spec(args.spec)[1], args.set)
    storage = base_folder() / str(data.get("storage", "runs"))
    return storage if (storage / args.name / SPEC).is_file() else None
