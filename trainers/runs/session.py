"""What surrounds a run or sweep: its locked folder and log, Ray, Ctrl-C, the MLflow tracker."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.errors import SpecError
from cluster.base.terminal import redirect_output
from cluster.jobs.working_dir_package import build_package
from cluster.session.ray_session import ray_session
from trainers.checkpoints.user_code import user_modules
from trainers.run_folder import (
    LOG,
    WHOLE,
    display_path,
    locked,
    run_files,
    stop_requests,
    withdraw_stop,
)
from trainers.runs.ray_train import resource_shortage
from trainers.runs.visibility import require_visible_everywhere
from trainers.spec import RunSpec
from trainers.tracking.preflight import check_access, notices
from trainers.workload import load_workload

if TYPE_CHECKING:
    from rich.console import Console

STOP_POLL_S = 0.5
"""Seconds between two looks at the requests to stop."""


@contextlib.contextmanager
def run_session(
    folder: Path,
    spec: RunSpec,
    address: str | None,
    verbose: bool,
    shortage: Callable[[], str | None] | None = None,
) -> Iterator[tuple["Console", threading.Event]]:
    """Check MLflow, lock the folder, connect to Ray, check the cluster, and handle Ctrl-C.

    `shortage` says in a line what the cluster lacks; by default, for the workers of a run.
    Yields the console and the event that Ctrl-C sets, and `heliostat stop` from another process.
    """
    asked = str(spec.tracking.uri), spec.tracking.experiment
    unreachable = check_access(*asked)
    told = [unreachable] if unreachable else notices(*asked)
    with (
        folder_session(folder, spec, address, verbose) as (console, started_here),
        stop_on_signal() as stop,  # within: ray.init has a handler of its own
        interrupted_on_request(folder),
    ):
        for line in told:
            console.print(line, style="yellow", highlight=False, markup=False)
        missing = shortage() if shortage is not None else resource_shortage(spec.scale)
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
        ray_session(address, code_packer(spec), spec.session.keep_warm_s) as started_here,
    ):
        if not verbose:
            console.print(f"log: {display_path(log)}", style="dim")
        yield console, started_here


def code_packer(spec: RunSpec) -> Callable[[], bytes] | None:
    """Packs the working folder for a cluster's workers; None where the workload is one of ours.

    The workload's own modules are in the package even if git ignores them, as a module may be that
    a build has written.
    """
    if ":" not in spec.workload:
        return None
    folder = Path.cwd()

    def pack() -> bytes:
        modules = user_modules(load_workload(spec.workload)).values()
        needed = [file.relative_to(folder) for file in modules if file.is_relative_to(folder)]
        return build_package(folder, needed, run_files(spec.storage)).data

    return pack


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


@contextlib.contextmanager
def interrupted_on_request(folder: Path) -> Iterator[None]:
    """Interrupt this process, as Ctrl-C does, when it is asked to end the run in `folder`.

    A request from before is of a process that is no more, and is withdrawn.
    """
    withdraw_stop(folder)
    done, main = threading.Event(), threading.main_thread().ident
    assert main is not None

    def watch() -> None:
        while not done.wait(STOP_POLL_S):
            if WHOLE in stop_requests(folder):
                withdraw_stop(folder)
                signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True, name="stop-requests")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
