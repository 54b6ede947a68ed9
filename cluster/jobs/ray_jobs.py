"""Jobs on a cluster: submit each once, find one by its name, stop it."""

import shlex
import time
from collections.abc import Callable
from dataclasses import replace

from cluster.base.errors import ClusterError, SpecError
from cluster.connection.job_server_client import (
    JobExistsError,
    NotFoundError,
    call_api,
    retry_while_busy,
)
from cluster.connection.ray_internals import JOB_STOP_WAIT_ENV_VAR
from cluster.jobs.job import Job, Submission, job_metadata, lost_reason, parse_job, submission_id
from cluster.jobs.working_dir_package import Package

PIN_INTERVAL_S = 300
"""Seconds between two requests to Ray to keep the package of a job that may be started again; each
keeps it for 600 s."""

STOP_WAIT_S = 900
"""How long a stopped driver may take to save before Ray kills it; Ray's default of 3 s is too
short."""


def list_jobs(url: str) -> list[Job]:
    """The latest attempt of each of Heliostat's jobs, the oldest job first."""
    latest: dict[str, Job] = {}
    answers = retry_while_busy(lambda: call_api(url, "GET", "/api/jobs/"))
    for job in map(parse_job, answers):
        if job and job.attempt > getattr(latest.get(job.name), "attempt", 0):
            latest[job.name] = job
    return sorted(latest.values(), key=lambda job: job.started_s)


def find_job(url: str, name: str) -> Job | None:
    """The job of this name, or None."""
    return next((job for job in list_jobs(url) if job.name == name), None)


def get_job(url: str, name: str) -> Job:
    """The job of this name. Raises SpecError, with a similar name, if there is none."""
    from cluster.base.config import did_you_mean

    jobs = list_jobs(url)
    for job in jobs:
        if job.name == name:
            return job
    hint = did_you_mean(name, [job.name for job in jobs])
    raise SpecError(f"no job {name!r} on {url}{hint}")


def submit(url: str, submission: Submission, package: Package) -> tuple[Job, bool]:
    """Start a job unless one of its name exists; the job, and whether it was started now.

    A job that has ended is started again if the submission resumes it. Raises SpecError if the
    existing job runs another command.
    """
    existing = find_job(url, submission.name)
    resumes = "--resume" in submission.argv
    if existing is None:
        return start_attempt(url, submission.name, 1, submission.argv, _upload(url, package))
    if resumes and existing.ended:
        attempt = existing.attempt + 1
        return start_attempt(url, submission.name, attempt, submission.argv, _upload(url, package))
    commands = {_without_restart_flag(existing.argv), _without_restart_flag(submission.argv)}
    if not resumes and len(commands) > 1:
        raise SpecError(
            f"--name {submission.name}: a job of this name was started as\n"
            f"  heliostat {shlex.join(existing.argv)}"
        )
    return existing, False


def alive_node_ids(url: str) -> frozenset[str]:
    """Ids of the living nodes; empty if the cluster does not answer."""
    try:
        answer = call_api(url, "GET", "/api/v0/nodes?limit=10000&detail=0")
        nodes = answer["data"]["result"]["result"]
    except (ClusterError, KeyError, TypeError):
        return frozenset()
    return frozenset(node["node_id"] for node in nodes if node["state"] == "ALIVE")


def pin_package(url: str, package: str) -> bool:
    """Have Ray keep a package for ten more minutes, even if no job uses it; False if it is gone.

    Ray deletes a package with the last job that uses it, and so when a driver is lost.
    """
    path = f"/api/packages/gcs/{package.removeprefix('gcs://')}"
    try:
        retry_while_busy(lambda: call_api(url, "GET", path))
    except NotFoundError:
        return False
    return True


def stop(url: str, name: str, wait: Callable[[], None] = lambda: time.sleep(0.5)) -> Job:
    """Have a job save and end; returns when it has ended or its driver is lost.

    `wait` is called between two looks at the job.
    """
    job = get_job(url, name)
    if not job.ended:
        retry_while_busy(lambda: call_api(url, "POST", f"/api/jobs/{job.submission_id}/stop"))
    while not job.ended and not lost_reason(job, alive_node_ids(url)):
        wait()
        job = get_job(url, name)
    if job.status != "RUNNING" and lost_reason(job, frozenset()):
        # Without its record nobody starts the job again; its checkpoints stay.
        retry_while_busy(lambda: call_api(url, "DELETE", f"/api/jobs/{job.submission_id}"))
        return replace(job, status="STOPPED")
    return job


def start_attempt(
    url: str, name: str, attempt: int, argv: tuple[str, ...], package: str
) -> tuple[Job, bool]:
    """Start an attempt unless another process has; the job, and whether it was started here."""
    job_id = submission_id(name, attempt)
    request = {
        "submission_id": job_id,
        "entrypoint": f"exec heliostat {shlex.join(argv)}",
        "runtime_env": {
            "working_dir": package,
            "env_vars": {JOB_STOP_WAIT_ENV_VAR: str(STOP_WAIT_S)},
        },
        "metadata": job_metadata(name, attempt, argv, package),
    }
    started_here = True

    def post() -> None:
        nonlocal started_here
        try:
            call_api(url, "POST", "/api/jobs/", request)
        except JobExistsError:
            # Another process was first, or the answer to our own first request was lost.
            started_here = False

    retry_while_busy(post)
    job = retry_while_busy(lambda: parse_job(call_api(url, "GET", f"/api/jobs/{job_id}")))
    if job is None:
        raise ClusterError(f"{url}: there is a job {name!r} that Heliostat did not start")
    return job, started_here


def _upload(url: str, package: Package) -> str:
    if not pin_package(url, package.uri):
        path = f"/api/packages/gcs/{package.name}"
        retry_while_busy(lambda: call_api(url, "PUT", path, body=package.data, timeout_s=600))
    return package.uri


def _without_restart_flag(argv: tuple[str, ...]) -> tuple[str, ...]:
    """A command without the flag that a restart adds to it."""
    return tuple(word for word in argv if word != "--or-resume")
