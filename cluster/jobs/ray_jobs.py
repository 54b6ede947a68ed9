"""Runs and sweeps as Ray jobs: sent once, found by name, started again when their driver is lost.

A job's name is its run's. Ray knows it by a submission id, which it gives to one job only: `NAME`
for the first start, `NAME~2` for the second. So whoever starts a lost job again, and however many
do at once, it is started once; and what each start printed stays apart. The newest start is the
job. What is needed to start it is in its metadata, which Ray keeps as long as the job is known.
"""

import json
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from cluster.base.errors import ClusterError, SpecError
from cluster.connection.job_server_client import (
    JobExistsError,
    NotFoundError,
    ServerBusyError,
    call_api,
)
from cluster.jobs.secret_scan import secret_in_text
from cluster.jobs.working_dir_package import Package

TERMINAL_STATUSES = ("SUCCEEDED", "STOPPED", "FAILED")
MAX_RESTARTS = 5
"""How often a job whose driver was lost is started again."""

BUSY_TIMEOUT_S = 60
"""How long a job server that is busy is asked again."""

PIN_INTERVAL_S = 300
"""How often Ray is asked to hold the package of a job that may have to be started again; it does so
for 600 s."""

STOP_WAIT_S = 900
"""How long a stopped driver may take to save before Ray kills it; Ray's own 3 s are too short."""

_LOST_DRIVER_ERRORS = (
    "JOB_SUPERVISOR_ACTOR_DIED",
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",  # also what a new head says of a supervisor that is gone
    "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
)
_STOP_SIGNALS = (2, 15)
"""Ctrl-C and SIGTERM: whoever sent that wanted the driver to end."""

_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

T = TypeVar("T")


@dataclass(frozen=True)
class Submission:
    """What is to be submitted, after its spec was found to be in order."""

    name: str
    words: tuple[str, ...]
    """The command on the cluster, without `heliostat`."""
    required_files: tuple[Path, ...] = ()
    """Files that go along even if git ignores them."""
    exclude_patterns: tuple[str, ...] = ()
    """What runs write into the working folder."""


@dataclass(frozen=True)
class Job:
    """The newest start of a job, as Ray has it."""

    name: str
    attempt: int
    """1 for the first start."""
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    words: tuple[str, ...]
    package: str
    """The URI of its working folder."""
    started_s: float
    """Unix time at which this start was asked for."""
    ended_s: float | None
    node: str | None
    """Id of the node that its driver is, or was, on."""
    exit_code: int | None
    error: str | None
    """Ray's kind of error, where it failed."""
    message: str

    @property
    def submission_id(self) -> str:
        return _submission_id(self.name, self.attempt)

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL_STATUSES

    @property
    def shell_exit_code(self) -> int:
        """The exit code for whoever waited for it: the job's own, where it has one."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return 130
        code = self.exit_code or 1
        return code if code > 0 else 128 - code


def list_jobs(url: str) -> list[Job]:
    """The newest start of each job of ours, oldest first."""
    newest: dict[str, Job] = {}
    for start in map(_parse_job, retry_while_busy(lambda: call_api(url, "GET", "/api/jobs/"))):
        if start and start.attempt > getattr(newest.get(start.name), "attempt", 0):
            newest[start.name] = start
    return sorted(newest.values(), key=lambda job: job.started_s)


def find_job(url: str, name: str) -> Job | None:
    """The job of this name."""
    return next((job for job in list_jobs(url) if job.name == name), None)


def get_job(url: str, name: str) -> Job:
    """The job of this name; SpecError that names others when there is none."""
    from cluster.base.config import did_you_mean

    jobs = list_jobs(url)
    for job in jobs:
        if job.name == name:
            return job
    hint = did_you_mean(name, [job.name for job in jobs])
    raise SpecError(f"no job {name!r} on {url}{hint}")


def check_submission(submission: Submission) -> None:
    """SpecError for a name that cannot be a job's, and for words that hold a secret."""
    if not _NAME_PATTERN.fullmatch(submission.name):
        raise SpecError(
            f"--name {submission.name}: must be letters, digits, dots, dashes and underscores"
        )
    for word in submission.words:
        if what := secret_in_text(word):
            raise SpecError(
                f"{word.partition('=')[0]}: {what}; commands are kept with the job for everybody "
                "to see, let the cluster have it in its environment"
            )


def submit(url: str, submission: Submission, package: Package) -> tuple[Job, bool]:
    """Start a job, unless one of its name is there; the job, and whether it was started now.

    A job that ended is started again where it is to be resumed. ClusterError when a job of this
    name is there that does something else.
    """
    there = find_job(url, submission.name)
    resumes = "--resume" in submission.words
    if there is None:
        return _start_attempt(url, submission.name, 1, submission.words, _upload(url, package))
    if resumes and there.ended:
        number = there.attempt + 1
        return _start_attempt(url, submission.name, number, submission.words, _upload(url, package))
    if not resumes and _without_restart_flag(there.words) != _without_restart_flag(
        submission.words
    ):
        raise SpecError(
            f"--name {submission.name}: a job of this name was started as\n"
            f"  heliostat {shlex.join(there.words)}"
        )
    return there, False


def restart_if_lost(url: str, job: Job, alive: frozenset[str]) -> tuple[Job, str] | None:
    """Start a job again whose driver was lost; its new start, and why. None if it needs none.

    `alive` are the ids of the cluster's living nodes. Others may do the same at the same time.
    """
    reason = lost_reason(job, alive)
    if reason is None or job.attempt > MAX_RESTARTS:
        return None
    words = job.words if {"--resume", "--or-resume"} & {*job.words} else (*job.words, "--or-resume")
    again, _ = _start_attempt(url, job.name, job.attempt + 1, words, job.package)
    return again, reason


def lost_reason(job: Job, alive: frozenset[str]) -> str | None:
    """Why a job's driver ended without having said so, in a phrase; None if it did not."""
    if job.status == "RUNNING" and job.node and alive and job.node not in alive:
        return "its driver's node is gone"  # a new head finds such jobs as they were
    if job.status != "FAILED":
        return None
    if job.error in _LOST_DRIVER_ERRORS:
        return "Ray lost its driver"
    number = -(job.exit_code or 0) if (job.exit_code or 0) < 0 else (job.exit_code or 0) - 128
    if number > 0 and number not in _STOP_SIGNALS:
        return f"its driver was killed by signal {number}"
    return None


def alive_node_ids(url: str) -> frozenset[str]:
    """Ids of the nodes that are alive; empty when that cannot be said."""
    try:
        answer = call_api(url, "GET", "/api/v0/nodes?limit=10000&detail=0")
        nodes = answer["data"]["result"]["result"]
    except (ClusterError, KeyError, TypeError):
        return frozenset()
    return frozenset(node["node_id"] for node in nodes if node["state"] == "ALIVE")


def pin_package(url: str, package: str) -> bool:
    """Have Ray keep a package for its next ten minutes, though nobody uses it; False if it is gone.

    Ray forgets a package with the last job that uses it, and so with a driver that is lost.
    """
    try:
        retry_while_busy(
            lambda: call_api(url, "GET", f"/api/packages/gcs/{package.removeprefix('gcs://')}")
        )
    except NotFoundError:
        return False
    return True


def stop(url: str, name: str, wait: Callable[[], None] = lambda: time.sleep(0.5)) -> Job:
    """Have a job save and end; returns when it has, or is found to have been lost."""
    job = get_job(url, name)
    if not job.ended:
        retry_while_busy(lambda: call_api(url, "POST", f"/api/jobs/{job.submission_id}/stop"))
    while not job.ended and not lost_reason(job, alive_node_ids(url)):
        wait()
        job = get_job(url, name)
    if job.status != "RUNNING" and lost_reason(job, frozenset()):
        # Without its record nobody starts it again; what it saved stays where it is.
        retry_while_busy(lambda: call_api(url, "DELETE", f"/api/jobs/{job.submission_id}"))
        return replace(job, status="STOPPED")
    return job


def retry_while_busy(request: Callable[[], T], timeout_s: float = BUSY_TIMEOUT_S) -> T:
    """What `ask` gives, asked again while the job server is busy; then its BusyError."""
    deadline, pause_s = time.monotonic() + timeout_s, 0.2
    while True:
        try:
            return request()
        except ServerBusyError:
            if time.monotonic() > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(5.0, pause_s * 1.5)


def _start_attempt(
    url: str, name: str, attempt: int, words: Sequence[str], package: str
) -> tuple[Job, bool]:
    """Start a job for the `attempt`th time, unless somebody else has."""
    request = {
        "submission_id": _submission_id(name, attempt),
        "entrypoint": f"exec heliostat {shlex.join(words)}",
        "runtime_env": {
            "working_dir": package,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        },
        "metadata": {
            "heliostat.name": name,
            "heliostat.attempt": str(attempt),
            "heliostat.words": json.dumps(list(words)),
            "heliostat.package": package,
        },
    }
    mine = True

    def ask() -> None:
        nonlocal mine
        try:
            call_api(url, "POST", "/api/jobs/", request)
        except JobExistsError:
            mine = False  # another's, or our own of a request whose answer was lost

    retry_while_busy(ask)
    job = retry_while_busy(
        lambda: _parse_job(call_api(url, "GET", f"/api/jobs/{_submission_id(name, attempt)}"))
    )
    if job is None:
        raise ClusterError(f"{url}: a job {name!r} is there that Heliostat did not start")
    return job, mine


def _upload(url: str, package: Package) -> str:
    if not pin_package(url, package.uri):
        path = f"/api/packages/gcs/{package.name}"
        retry_while_busy(lambda: call_api(url, "PUT", path, body=package.data, timeout_s=600))
    return package.uri


def _parse_job(answer: dict[str, Any]) -> Job | None:
    """A job of ours from Ray's description of it."""
    metadata = answer.get("metadata") or {}
    if "heliostat.words" not in metadata:
        return None
    ended = answer.get("end_time")
    return Job(
        name=metadata["heliostat.name"],
        attempt=int(metadata["heliostat.attempt"]),
        status=answer["status"],
        words=tuple(json.loads(metadata["heliostat.words"])),
        package=metadata["heliostat.package"],
        started_s=(answer.get("start_time") or 0) / 1000,
        ended_s=ended / 1000 if ended else None,
        node=answer.get("driver_node_id"),
        exit_code=answer.get("driver_exit_code"),
        error=answer.get("error_type"),
        message=answer.get("message") or "",
    )


def _submission_id(name: str, attempt: int) -> str:
    return name if attempt == 1 else f"{name}~{attempt}"


def _without_restart_flag(words: Sequence[str]) -> list[str]:
    """A command without what a restart adds to it."""
    return [word for word in words if word != "--or-resume"]
