"""Starts lost jobs again. Runs on the head, beside Ray: `python -m cluster.jobs.job_supervisor`.

A job's driver runs on the head, which no cloud preempts, and is lost with the head's Ray. The
head's start commands start this program too. So after the head has come back, it reads from Ray's
persisted state which jobs had a driver, and starts them again; they resume from their checkpoints.
A client that follows a job (`log_follower`) does the same on clusters without this program.
"""

import argparse
import logging
import math
import sys
import time

from cluster.base.errors import ClusterError
from cluster.connection.job_server_client import LOCAL_DASHBOARD_URL
from cluster.jobs.job import Job, lost_reason
from cluster.jobs.ray_jobs import (
    PIN_INTERVAL_S,
    alive_node_ids,
    list_jobs,
    pin_package,
    start_attempt,
)

MAX_RESTARTS = 5
"""How often a job whose driver was lost is started again."""

POLL_S = 2.0

logger = logging.getLogger(__name__)


def poll_once(url: str, pinned: dict[str, float]) -> list[str]:
    """Start lost jobs again and pin the packages of all others; a line for each restart.

    `pinned` maps each package to the monotonic time at which it was last pinned, and is updated.
    """
    alive, lines = alive_node_ids(url), []
    for job in list_jobs(url):
        _pin(url, job, pinned)
        restarted = restart_if_lost(url, job, alive)
        if restarted is not None:
            attempt, reason = restarted
            lines.append(f"{job.name}: {reason}; started again as {attempt.submission_id}")
    return lines


def restart_if_lost(url: str, job: Job, alive: frozenset[str]) -> tuple[Job, str] | None:
    """Start a job again if its driver was lost; the new attempt and the reason, otherwise None.

    `alive` are the ids of the cluster's living nodes. Other processes may do the same at the
    same time.
    """
    reason = lost_reason(job, alive)
    if reason is None or job.attempt > MAX_RESTARTS:
        return None
    resumes = {"--resume", "--or-resume"} & {*job.argv}
    argv = job.argv if resumes else (*job.argv, "--or-resume")
    restarted, _ = start_attempt(url, job.name, job.attempt + 1, argv, job.package)
    return restarted, reason


def _pin(url: str, job: Job, pinned: dict[str, float]) -> None:
    now = time.monotonic()
    if job.ended:
        pinned.pop(job.package, None)
    elif now > pinned.get(job.package, -math.inf) + PIN_INTERVAL_S:
        pin_package(url, job.package)
        pinned[job.package] = now


def main() -> None:
    """Poll until this process is ended; a head that does not answer yet is asked again."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.jobs.job_supervisor", description=__doc__
    )
    parser.add_argument(
        "--url", default=LOCAL_DASHBOARD_URL, help="the dashboard's URL (default %(default)s)"
    )
    url = parser.parse_args().url
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stdout,
        format="%(asctime)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )
    pinned: dict[str, float] = {}
    while True:
        try:
            for line in poll_once(url, pinned):
                logger.info("%s", line)
        except ClusterError as error:
            logger.info("%s", error)
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
