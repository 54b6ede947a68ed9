"""The verb `stop`: ends a run, a sweep, one of its trials, or a job on a cluster."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from cluster.cli.options import Subparsers, cluster_options

POLL_S = 0.5
"""Seconds between two looks at what was asked to end."""


def add_verbs(verbs: Subparsers) -> None:
    stop = verbs.add_parser(
        "stop",
        parents=[cluster_options()],
        help="have a run, a sweep, a trial or a job save and end",
        description="Have a run or sweep save and end, as Ctrl-C does, or a job on a cluster. "
        "SWEEP/0007 ends one trial of a sweep, at its next evaluation; the others go on.",
    )
    stop.add_argument(
        "name",
        metavar="RUN|SWEEP|SWEEP/TRIAL|JOB",
        help="its name, or its folder; a job has its run's name",
    )
    stop.set_defaults(command=stop_command)


def stop_command(args: argparse.Namespace) -> int:
    from cluster.base.errors import HeliostatError, SpecError
    from cluster.cli.jobs import stop_job

    elsewhere = args.cluster or args.address
    if elsewhere and "/" in args.name:
        raise SpecError(f"{args.name}: a trial is stopped on the machine with its sweep's folder")
    here = None if elsewhere else _find_here(args.name)
    reachable = elsewhere or "RAY_ADDRESS" in os.environ or _dashboard_answers()
    if here is None:
        if not reachable:
            raise SpecError(f"{args.name}: no run, sweep or job of this name here")
        return stop_job(args)
    folder, trial = here
    if is_worked_on(folder):
        return stop_trial(folder, trial) if trial is not None else stop_all(folder)
    if trial is None and reachable:
        try:
            return stop_job(args)  # it may run on another machine of a cluster
        except HeliostatError:
            pass
    raise SpecError(f"{args.name}: is not running")


def _dashboard_answers() -> bool:
    """Whether a Ray dashboard runs on this machine. Asking for a job waits a minute for one."""
    from cluster.base.errors import ClusterError
    from cluster.connection.job_server_client import (
        LOCAL_DASHBOARD_URL,
        ServerBusyError,
        call_api,
    )

    try:
        call_api(LOCAL_DASHBOARD_URL, "GET", "/api/version", timeout_s=2)
    except ServerBusyError:
        return False
    except ClusterError:  # it wants a token
        return True
    return True


def _find_here(name: str) -> tuple[Path, int | None] | None:
    """The folder of the run or sweep of this name, and the number of the trial that it names."""
    from cluster.base.errors import SpecError
    from trainers.cli.track import tracked_folder
    from trainers.run_folder import TRIALS, folder_kind

    try:
        return tracked_folder(name), None
    except SpecError:
        head, _, number = name.rstrip("/").rpartition("/")
        if not head or not number.isdecimal():
            return None
    try:
        folder = tracked_folder(head.removesuffix(f"/{TRIALS}"))
    except SpecError:
        return None
    return (folder, int(number)) if folder_kind(folder) == "sweep" else None


def is_worked_on(folder: Path) -> bool:
    """Whether a process works on the run or sweep in `folder`."""
    from cluster.base.errors import SpecError
    from trainers.run_folder import locked

    try:
        with locked(folder):
            return False
    except SpecError:
        return True


def stop_all(folder: Path, wait: Callable[[], None] = lambda: time.sleep(POLL_S)) -> int:
    """End the run or sweep in `folder`; returns when its process has saved and ended."""
    from trainers.run_folder import display_path, folder_kind, request_stop

    request_stop(folder)
    print(f"{folder.name}: saving", flush=True)
    while is_worked_on(folder):
        wait()
    print(f"{folder.name}: stopped")
    print(f"  resume it: heliostat {folder_kind(folder)} --resume {display_path(folder)}")
    return 0


def stop_trial(
    folder: Path, number: int, wait: Callable[[], None] = lambda: time.sleep(POLL_S)
) -> int:
    """End a trial of the sweep in `folder` at its next evaluation; returns when it has ended."""
    from cluster.base.errors import SpecError
    from trainers.run_folder import TRIALS, request_stop
    from tuning.trials.journal import Journal
    from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, last_result

    name, trial = f"{folder.name}/{number:04d}", folder / TRIALS / f"{number:04d}"
    journal = Journal(folder / JOURNAL_FILE)
    if number not in journal.parameters and number not in journal.repeats:
        raise SpecError(f"{name}: no such trial has begun")
    if any((trial / file).exists() for file in (ENDED_FILE, FAILED_FILE)):
        print(f"{name}: had ended")
        return 0
    request_stop(folder, f"{number:04d}")
    print(f"{name}: ends at its next evaluation", flush=True)
    while not any((trial / file).exists() for file in (ENDED_FILE, FAILED_FILE)):
        if not is_worked_on(folder):
            print(f"{folder.name}: the sweep has ended before")
            return 0
        wait()
    last = last_result(trial)
    print(f"{name}: ended after {last.get('epoch', 0):.1f} epochs" if last else f"{name}: failed")
    return 0
