"""The verbs for jobs on a cluster: `submit`, `jobs`, `logs`, and what `stop` does to a job."""

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.options import Subparsers, cluster_options

if TYPE_CHECKING:
    from cluster.jobs.job import Job, Submission

HEAD_LOST_TIMEOUT_S = 900
"""How long a followed job's cluster may be away: replacing a head takes minutes."""


def add_verbs(verbs: Subparsers) -> None:
    submit = verbs.add_parser(
        "submit",
        parents=[cluster_options()],
        help="run train, sweep, data, plan or scaling on a cluster, as a job",
        description="Send the working folder, without the files that git ignores, and start the "
        "command on the cluster. It goes on when this machine is switched off.",
    )
    submit.add_argument("--follow", action="store_true", help="print the job's log until it ends")
    submit.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="do not send these files; may be repeated",
    )
    submit.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="VERB SPEC ...",
        help="train, sweep, data, plan or scaling, with its own options",
    )
    submit.set_defaults(command=submit_command, verbs=verbs)
    jobs = verbs.add_parser("jobs", parents=[cluster_options()], help="list a cluster's jobs")
    jobs.set_defaults(command=jobs_command)
    logs = verbs.add_parser("logs", parents=[cluster_options()], help="print a job's log")
    logs.add_argument("name", help="the job's name, which is its run's")
    logs.add_argument("--follow", action="store_true", help="go on until the job ends")
    logs.set_defaults(command=logs_command)


@contextlib.contextmanager
def dashboard(args: argparse.Namespace) -> Iterator[str]:
    """The dashboard's URL for `cluster_options`, through a tunnel if a cluster's file is given."""
    from cluster.connection.job_server_client import dashboard_url

    if args.cluster is None:
        yield dashboard_url(args.address)
        return
    from cluster.connection.ssh import tunnel

    with tunnel(args.cluster) as urls:
        yield urls.dashboard


def submit_command(args: argparse.Namespace) -> int:
    from cluster.jobs.ray_jobs import submit
    from cluster.jobs.working_dir_package import build_package, format_mebibytes

    submission = _parse_submission(args)
    package = build_package(Path.cwd(), submission.required_files, submission.exclude_patterns)
    with dashboard(args) as url:
        job, new = submit(url, submission, package)
    if new:
        size = format_mebibytes(len(package.data))
        print(f"{job.name}: sent {len(package.files)} files ({size}), started", flush=True)
    else:
        print(f"{job.name}: is there already, {_state_text(job)}; nothing was started", flush=True)
    if args.follow:
        return _follow(args, job.name)
    for line in _next_commands(args, job.name, job):
        print(line)
    return 0 if new or not job.ended else job.shell_exit_code


def _parse_submission(args: argparse.Namespace) -> "Submission":
    """Parse and check the command after `submit`, with the parser of its verb."""
    from cluster.base.errors import SpecError
    from cluster.jobs.job import check_submission

    known = {name: verb for name, verb in args.verbs.choices.items() if verb.get_default("plan")}
    if not args.words or args.words[0] not in known:
        got = args.words[0] if args.words else "nothing"
        raise SpecError(f"submit: takes {' or '.join(known)}, then its spec (got {got})")
    inner = known[args.words[0]].parse_args(args.words[1:])
    if inner.address:
        raise SpecError("--address: must be given before the verb")
    inner.exclude = tuple(args.exclude)
    submission: Submission = inner.plan(inner, tuple(args.words))
    check_submission(submission)
    return submission


def jobs_command(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from cluster.jobs.ray_jobs import list_jobs

    with dashboard(args) as url:
        jobs = list_jobs(url)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "state", "started", "took", "restarts", "command"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        started = time.strftime("%m-%d %H:%M", time.localtime(job.started_s))
        took = _format_duration(max(0.0, (job.ended_s or time.time()) - job.started_s))
        row = (started, took, str(job.attempt - 1), " ".join(job.argv))
        table.add_row(job.name, _state_text(job), *row)
    Console(highlight=False).print(table if jobs else "no jobs")
    return 0


def logs_command(args: argparse.Namespace) -> int:
    if args.follow:
        return _follow(args, args.name)
    from cluster.jobs.log_follower import read_log
    from cluster.jobs.ray_jobs import get_job

    with dashboard(args) as url:
        print(read_log(url, get_job(url, args.name)), end="")
    return 0


def stop_job(args: argparse.Namespace) -> int:
    """Have the job `args.name` of the cluster of `cluster_options` save and end."""
    from cluster.jobs.ray_jobs import get_job, stop

    with dashboard(args) as url:
        before = get_job(url, args.name)
        if not before.ended:
            print(f"{args.name}: saving", flush=True)
        job = stop(url, args.name)
    if before.ended and before.status == job.status:
        print(f"{job.name}: had ended, {_state_text(job)}")
    else:
        print(f"{job.name}: {_state_text(job)}")
    for line in _next_commands(args, job.name, job):
        print(line)
    return 0


def _follow(args: argparse.Namespace, name: str) -> int:
    """Print a job's log until it ends; returns its exit code. Ctrl-C leaves the job running."""
    from cluster.connection.job_server_client import ServerBusyError
    from cluster.jobs.log_follower import LogFollower
    from cluster.jobs.ray_jobs import get_job

    follower = LogFollower(name, sys.stdout, lambda line: print(line, file=sys.stderr, flush=True))
    lost_s = None
    while True:
        try:
            with dashboard(args) as url:
                get_job(url, name)
                lost_s = None  # the cluster answers again
                job = follower.follow(url)
            break
        except ServerBusyError as error:
            lost_s = lost_s or time.monotonic()
            if time.monotonic() > lost_s + HEAD_LOST_TIMEOUT_S:
                raise
            print(f"{error}; trying again", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(f"\ndetached; {name} goes on", flush=True)
            for line in _next_commands(args, name):
                print(line)
            return 130
    if job.status != "SUCCEEDED":
        print(f"{name}: {_state_text(job)}", file=sys.stderr)
        for line in _next_commands(args, name, job):
            print(line, file=sys.stderr)
    return job.shell_exit_code


def _state_text(job: "Job") -> str:
    state = job.status.lower()
    if job.status != "FAILED":
        return state
    if job.exit_code:
        return f"{state} with exit code {job.shell_exit_code}"
    message = job.message.strip()
    return f"{state}: {message.splitlines()[0] if message else job.error_type}"


def _next_commands(args: argparse.Namespace, name: str, job: "Job | None" = None) -> list[str]:
    """The commands that the user may want next; without `job` it is taken to be running."""
    target = f" --cluster {shlex.quote(str(args.cluster))}" if args.cluster else ""
    target = f" --address {shlex.quote(args.address)}" if args.address else target
    if job is None or not job.ended:
        return [
            f"  follow it: heliostat logs {name} --follow{target}",
            f"  stop it:   heliostat stop {name}{target}",
        ]
    if job.status == "SUCCEEDED":
        return [f"  its log: heliostat logs {name}{target}"]
    verb = shlex.join(word for word in job.argv[:2] if not word.startswith("-"))
    return [f"  resume it: heliostat submit{target} {verb} --resume {name}"]


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
