"""The verbs of the cluster, and what all verbs share. Imports nothing heavy."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from cluster.jobs.ray_jobs import Job, Submission

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def run_options(named: bool = True) -> argparse.ArgumentParser:
    """The options of every verb that runs a spec on Ray, as a parent parser.

    `named` verbs make something that is kept by its name.
    """
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change a field of the spec, e.g. optimizer.lr=3e-4; may be repeated",
    )
    options.add_argument(
        "--address", help="Ray cluster to use; RAY_ADDRESS when not given, else this machine"
    )
    if named:
        options.add_argument("--name", help="name of the run; made from the spec's when not given")
    options.add_argument(
        "--or-resume",
        action="store_true",
        # A job whose driver was lost is started again with it, whatever its verb.
        help="go on with the run of that --name if there is one, instead of refusing the name"
        if named
        else argparse.SUPPRESS,
    )
    options.add_argument(
        "--verbose", action="store_true", help="show everything that Ray and its workers print"
    )
    return options


def cluster_options() -> argparse.ArgumentParser:
    """The options of every verb that asks a running cluster, as a parent parser."""
    options = argparse.ArgumentParser(add_help=False)
    where = options.add_mutually_exclusive_group()
    where.add_argument(
        "--cluster", type=Path, metavar="FILE", help="cluster.yaml; reached through SSH"
    )
    where.add_argument(
        "--address",
        metavar="URL",
        help="the dashboard's; RAY_ADDRESS when not given, else http://127.0.0.1:8265",
    )
    return options


def add_verbs(verbs: Subparsers) -> None:
    cluster = verbs.add_parser(
        "cluster",
        help="the files of clusters: render, check",
        description="Render and check the files from which clusters are started.",
    )
    add_file_verbs(cluster.add_subparsers(title="verbs", metavar="VERB", required=True))
    add_job_verbs(verbs)


def add_file_verbs(verbs: Subparsers) -> None:
    """What is done about the files of clusters, before there is one."""
    render = verbs.add_parser(
        "render",
        help="print the file for a provider",
        description="Print the file of a cluster for a provider, rendered from its spec.",
    )
    render.add_argument(
        "--provider", required=True, choices=("aws", "gcp", "azure", "local", "kuberay")
    )
    render.add_argument(
        "--spec", type=Path, metavar="FILE", help="the cluster's spec; the shipped one if not given"
    )
    render.add_argument(
        "--job", action="store_true", help="with kuberay: a RayJob instead of a RayCluster"
    )
    render.set_defaults(command=render_command)
    check = verbs.add_parser(
        "check",
        help="what is wrong with a file, before it costs anything",
        description="Tell in a line each what is wrong with FILE, and what the cluster would cost.",
    )
    check.add_argument("file", type=Path, metavar="FILE")
    check.set_defaults(command=check_command)


def render_command(args: argparse.Namespace) -> int:
    from cluster.base.errors import SpecError
    from cluster.definition.launcher_file import render
    from cluster.definition.spec import SHIPPED_SPEC, read_cluster_spec

    if args.job and args.provider != "kuberay":
        raise SpecError("--job: is for --provider kuberay; elsewhere use `heliostat submit`")
    print(render(read_cluster_spec(args.spec or SHIPPED_SPEC), args.provider, args.job), end="")
    return 0


def check_command(args: argparse.Namespace) -> int:
    from cluster.definition.check import check_file

    report = check_file(args.file)
    for line in (*report.findings, *report.prices):
        print(line)
    return 2 if report.findings else 0


def add_job_verbs(verbs: Subparsers) -> None:
    submit = verbs.add_parser(
        "submit",
        parents=[cluster_options()],
        help="run train, sweep, data, plan or scaling on a cluster, as a job",
        description="Send the working folder, without what git ignores, and start the command "
        "there; it goes on when this machine is switched off.",
    )
    submit.add_argument("--follow", action="store_true", help="show what it prints until it ends")
    submit.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave these files here"
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
    logs = verbs.add_parser("logs", parents=[cluster_options()], help="show what a job printed")
    logs.add_argument("name", help="the job's name, which is its run's")
    logs.add_argument("--follow", action="store_true", help="go on until it ends")
    logs.set_defaults(command=logs_command)
    stop = verbs.add_parser("stop", parents=[cluster_options()], help="have a job save and end")
    stop.add_argument("name", help="the job's name, which is its run's")
    stop.set_defaults(command=stop_command)


@contextlib.contextmanager
def dashboard(args: argparse.Namespace) -> Iterator[str]:
    """The URL of the dashboard of the cluster that `where_options` name, as long as needed."""
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

    planned = _parse_submission(args)
    package = build_package(
        Path.cwd(), planned.required_files, (*planned.exclude_patterns, *args.exclude)
    )
    with dashboard(args) as url:
        job, new = submit(url, planned, package)
    if new:
        size = format_mebibytes(len(package.data))
        print(f"{job.name}: sent {len(package.files)} files ({size}), started", flush=True)
    else:
        print(f"{job.name}: is there already, {_state_text(job)}; nothing was started", flush=True)
    if args.follow:
        return _follow(args, job.name)
    for line in _next_commands(args, job):
        print(line)
    return 0 if new or not job.ended else job.shell_exit_code


def _parse_submission(args: argparse.Namespace) -> "Submission":
    """What the words after `submit` ask for, parsed and checked by the verb that they name."""
    from cluster.base.errors import SpecError
    from cluster.jobs.ray_jobs import check_submission

    known = {name: verb for name, verb in args.verbs.choices.items() if verb.get_default("plan")}
    if not args.words or args.words[0] not in known:
        got = args.words[0] if args.words else "nothing"
        raise SpecError(f"submit: takes {' or '.join(known)}, then its spec (got {got})")
    inner = known[args.words[0]].parse_args(args.words[1:])
    if inner.address:
        raise SpecError("--address: which cluster is said before the verb")
    planned: Submission = inner.plan(inner, tuple(args.words))
    check_submission(planned)
    return planned


def jobs_command(args: argparse.Namespace) -> int:
    import time

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
        took = _format_duration((job.ended_s or time.time()) - job.started_s)
        row = (started, took, str(job.attempt - 1), " ".join(job.words))
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


def stop_command(args: argparse.Namespace) -> int:
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
    for line in _next_commands(args, job):
        print(line)
    return 0


def _follow(args: argparse.Namespace, name: str) -> int:
    """Show what a job prints until it ends; its exit code. Ctrl-C leaves it running."""
    import sys
    import time

    from cluster.connection.job_server_client import ServerBusyError
    from cluster.jobs.log_follower import LogFollower
    from cluster.jobs.ray_jobs import get_job

    follower = LogFollower(name, sys.stdout, lambda line: print(line, file=sys.stderr, flush=True))
    lost_s = None
    while True:
        try:
            with dashboard(args) as url:
                job = get_job(url, name)
                lost_s = None
                job = follower.follow(url)
            break
        except ServerBusyError as error:  # a head that is being replaced takes minutes
            lost_s = lost_s or time.monotonic()
            if time.monotonic() > lost_s + HEAD_LOST_TIMEOUT_S:
                raise
            print(f"{error}; trying again", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(f"\ndetached; {name} goes on", flush=True)
            for line in _next_commands(args, None, name):
                print(line)
            return 130
    if job.status != "SUCCEEDED":
        print(f"{name}: {_state_text(job)}", file=sys.stderr)
        for line in _next_commands(args, job):
            print(line, file=sys.stderr)
    return job.shell_exit_code


HEAD_LOST_TIMEOUT_S = 900
"""How long a cluster that is followed may be away."""


def _state_text(job: "Job") -> str:
    state = job.status.lower()
    if job.status != "FAILED":
        return state
    if job.exit_code:
        return f"{state} with exit code {job.shell_exit_code}"
    return f"{state}: {job.message.strip().splitlines()[0] if job.message.strip() else job.error}"


def _next_commands(args: argparse.Namespace, job: "Job | None", name: str = "") -> list[str]:
    """How to go on with a job, as commands."""
    import shlex

    where = f" --cluster {shlex.quote(str(args.cluster))}" if args.cluster else ""
    where = f" --address {shlex.quote(args.address)}" if args.address else where
    name = job.name if job else name
    if job is None or not job.ended:
        return [
            f"  follow it: heliostat logs {name} --follow{where}",
            f"  stop it:   heliostat stop {name}{where}",
        ]
    if job.status == "SUCCEEDED":
        return [f"  its log: heliostat logs {name}{where}"]
    verb = shlex.join(word for word in job.words[:2] if not word.startswith("-"))
    return [f"  go on with it: heliostat submit{where} {verb} --resume {name}"]


def _format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
