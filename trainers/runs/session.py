"""What surrounds a run or sweep: its locked folder and log, Ray, Ctrl-C, the MLflow tracker."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.config import flatten
from cluster.base.errors import SpecError
from cluster.base.terminal import redirect_output
from cluster.connection.ray_connection import ray_session
from trainers.run_folder import ENVIRONMENT, LOG, SPEC, TRACKING, display_path, git_tags, locked
from trainers.runs.ray_train import resource_shortage
from trainers.runs.visibility import require_visible_everywhere
from trainers.spec import RunSpec
from trainers.tracking.preflight import check_access
from trainers.tracking.tracker import TrackedRun, start_tracker, wait_until_sent

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def run_session(
    folder: Path, spec: RunSpec, address: str | None, verbose: bool
) -> Iterator[tuple["Console", threading.Event]]:
    """Check MLflow, lock the folder, connect to Ray, check the cluster, and handle Ctrl-C.

    Yields the console and the event that Ctrl-C sets.
    """
    unreachable = check_access(str(spec.tracking.uri), spec.tracking.experiment)
    with (
        folder_session(folder, spec, address, verbose) as (console, started_here),
        stop_on_signal() as stop,  # within: ray.init has a handler of its own
    ):
        if unreachable:
            console.print(unreachable, style="yellow", highlight=False)
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
    """Lock the folder, connect to Ray, and redirect the output of libraries to the folder's log.

    Yields the console, and whether Ray was started by this process.
    """
    log = folder / LOG
    with (
        locked(folder),
        redirect_output(log, verbose) as console,
        ray_session(address, *shipped_code(spec)) as started_here,
    ):
        if not verbose:
            console.print(f"log: {display_path(log)}", style="dim")
        yield console, started_here


def shipped_code(spec: RunSpec) -> tuple[Path | None, tuple[str, ...]]:
    """The folder of the user's code that Ray copies to the workers, and what it leaves out.

    None where the workload is one of ours.
    """
    code = Path.cwd() if ":" in spec.workload else None
    storage = Path(spec.storage).name  # the files that runs write are not code
    return code, (".git", ".venv", "mlflow.db", "mlartifacts", storage, "__pycache__")


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets; the second Ctrl-C raises KeyboardInterrupt.

    SIGTERM acts as Ctrl-C does at that moment, also while Ray Tune handles Ctrl-C. SIGTERM also
    ends a submitted job, in whose processes Ray has blocked SIGINT.
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


def start_tracking(
    folder: Path, spec: RunSpec, spec_data: Mapping[str, Any], kind: str = "train"
) -> Any:
    """Start the tracker of the run or sweep in `folder`; log its spec and its environment."""
    key, tracking = folder.name, spec.tracking
    tracker = start_tracker(folder / TRACKING, str(tracking.uri), tracking.experiment, key)
    tracker.start.remote(tracked_run(key, spec_data, kind=kind))
    for name in (SPEC, ENVIRONMENT):
        tracker.log_artifact.remote(key, str(folder / name))
    return tracker


def tracked_run(
    key: str, spec_data: Mapping[str, Any], parent: str | None = None, kind: str = "train"
) -> TrackedRun:
    """The run as MLflow shows it: the spec's fields are parameters, named by dotted path."""
    params = {k: v for k, v in flatten(spec_data).items() if not k.startswith("sweep.")}
    tags = {"heliostat.kind": kind, **git_tags(Path.cwd())}
    return TrackedRun(key, params, tags, parent)


def end_tracking(tracker: Any, key: str) -> dict[str, Any]:
    """Wait until MLflow has everything; return the run's entry there (`Tracker.read`).

    If MLflow cannot be reached, return {"unsent": LINE} instead.
    """
    import ray

    unsent = wait_until_sent(tracker, timeout_s=60)
    return {"unsent": unsent} if unsent else ray.get(tracker.read.remote(key))
