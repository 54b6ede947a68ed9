"""A job: what is submitted, what Ray knows of it, and when its driver counts as lost.

A job has the name of its run. Ray knows it by a submission id, which can be used once: `NAME` for
the first attempt, `NAME~2` for the second. So however many clients restart a lost job at the same
time, each attempt is started once, and the attempts have separate logs. The latest attempt is the
job. All that is needed to start it again is in its metadata, which Ray keeps as long as the job.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.errors import SpecError
from cluster.connection.ray_internals import LOST_DRIVER_ERRORS
from cluster.jobs.secret_scan import secret_in_text

TERMINAL_STATUSES = ("SUCCEEDED", "STOPPED", "FAILED")

_STOP_SIGNALS = (2, 15)
"""SIGINT (Ctrl-C) and SIGTERM: somebody wanted the driver to end."""

_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Submission:
    """A command to be submitted, whose spec has been checked."""

    name: str
    argv: tuple[str, ...]
    """The command on the cluster, without `heliostat`."""
    required_files: tuple[Path, ...] = ()
    """Files that are packaged even if git ignores them."""
    exclude_patterns: tuple[str, ...] = ()
    """Patterns of what runs write into the working folder, and of what the user leaves out."""


@dataclass(frozen=True)
class Job:
    """The latest attempt of a job, as Ray reports it."""

    name: str
    attempt: int
    """Counted from 1."""
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    argv: tuple[str, ...]
    package: str
    """The URI of its working folder."""
    started_s: float
    """Unix time at which this attempt was submitted."""
    ended_s: float | None
    node_id: str | None
    """The node on which its driver runs or ran."""
    exit_code: int | None
    error_type: str | None
    """Ray's kind of error, if it failed."""
    message: str

    @property
    def submission_id(self) -> str:
        """Ray's id of this attempt."""
        return submission_id(self.name, self.attempt)

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL_STATUSES

    @property
    def shell_exit_code(self) -> int:
        """The exit code of a command that waited for the job: the driver's, if there is one."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return 130
        code = self.exit_code or 1
        return code if code > 0 else 128 - code


def submission_id(name: str, attempt: int) -> str:
    """Ray's id for an attempt of a job."""
    return name if attempt == 1 else f"{name}~{attempt}"


def check_submission(submission: Submission) -> None:
    """Raise SpecError for a name that no job can have, and for an argument with a secret."""
    if not _NAME_PATTERN.fullmatch(submission.name):
        raise SpecError(
            f"--name {submission.name}: must be letters, digits, dots, dashes and underscores"
        )
    for argument in submission.argv:
        if kind := secret_in_text(argument):
            raise SpecError(
                f"{argument.partition('=')[0]}: {kind}; commands are stored with the job, where "
                "everybody can read them; set it in the cluster's environment"
            )


def job_metadata(name: str, attempt: int, argv: tuple[str, ...], package: str) -> dict[str, str]:
    """The metadata from which `parse_job` and a restart know the job."""
    return {
        "heliostat.name": name,
        "heliostat.attempt": str(attempt),
        "heliostat.words": json.dumps(list(argv)),
        "heliostat.package": package,
    }


def parse_job(answer: dict[str, Any]) -> Job | None:
    """A job from the job server's description; None if Heliostat did not start it."""
    metadata = answer.get("metadata") or {}
    if "heliostat.words" not in metadata:
        return None
    ended = answer.get("end_time")
    return Job(
        name=metadata["heliostat.name"],
        attempt=int(metadata["heliostat.attempt"]),
        status=answer["status"],
        argv=tuple(json.loads(metadata["heliostat.words"])),
        package=metadata["heliostat.package"],
        started_s=(answer.get("start_time") or 0) / 1000,
        ended_s=ended / 1000 if ended else None,
        node_id=answer.get("driver_node_id"),
        exit_code=answer.get("driver_exit_code"),
        error_type=answer.get("error_type"),
        message=answer.get("message") or "",
    )


def lost_reason(job: Job, alive: frozenset[str]) -> str | None:
    """Why the driver of a job ended without reporting it, in a phrase; None if it is not lost.

    `alive` are the ids of the living nodes; empty means unknown.
    """
    if job.status == "RUNNING" and job.node_id and alive and job.node_id not in alive:
        return "its driver's node is gone"  # a new head still lists such jobs as running
    if job.status != "FAILED":
        return None
    if job.error_type in LOST_DRIVER_ERRORS:
        return "Ray lost its driver"
    code = job.exit_code or 0
    signal = -code if code < 0 else code - 128
    if signal > 0 and signal not in _STOP_SIGNALS:
        return f"its driver was killed by signal {signal}"
    return None
