"""What starts lost jobs again, on the head and outside of Ray: `python -m cluster.jobs.job_supervisor`.

A job's driver runs on the head, which no cloud takes back with a notice, and dies with the head's
Ray. The head's start commands start this beside Ray, so a head that comes back brings it along,
finds in Ray's persisted state which jobs had a driver, and starts them again; they go on from
their checkpoints. Whoever follows a job does the same where there is no keeper.
"""

import argparse
import math
import time

from cluster.base.errors import ClusterError
from cluster.connection.job_server_client import LOCAL_DASHBOARD_URL
from cluster.jobs.ray_jobs import (
    PIN_INTERVAL_S,
    Job,
    alive_node_ids,
    list_jobs,
    pin_package,
    restart_if_lost,
)

POLL_S = 2.0


def poll_once(url: str, pinned: dict[str, float]) -> list[str]:
    """Start again what was lost, and keep packages; a line for each job that was started.

    `held` is when each package was last asked to be kept (monotonic time), and changed here.
    """
    alive, lines = alive_node_ids(url), []
    for job in list_jobs(url):
        _pin(url, job, pinned)
        again = restart_if_lost(url, job, alive)
        if again is not None:
            started, reason = again
            lines.append(f"{job.name}: {reason}; started again as {started.submission_id}")
    return lines


def _pin(url: str, job: Job, pinned: dict[str, float]) -> None:
    now = time.monotonic()
    if job.ended:
        pinned.pop(job.package, None)
    elif now > pinned.get(job.package, -math.inf) + PIN_INTERVAL_S:
        pin_package(url, job.package)
        pinned[job.package] = now


def main() -> None:
    """Look every two seconds, for ever; a head that does not answer yet is asked again."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.jobs.job_supervisor", description=__doc__
    )
    parser.add_argument(
        "--url", default=LOCAL_DASHBOARD_URL, help="the dashboard's (default %(default)s)"
    )
    url = parser.parse_args().url
    held: dict[str, float] = {}
    while True:
        try:
            for line in poll_once(url, held):
                print(f"{time.strftime('%F %T')} {line}", flush=True)
        except ClusterError as error:
            print(f"{time.strftime('%F %T')} {error}", flush=True)
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
