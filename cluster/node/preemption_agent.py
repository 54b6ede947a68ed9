"""Tells Ray that the cloud is about to take this machine away.

    python -m cluster.node.preemption_agent aws|gcp|azure

The commands of cluster.yaml start it on every node, possibly before Ray, the head or the metadata
service answers. A second instance replaces the first. It logs one line per event.

Ray is told that the node is drained for preemption, and until when. The training loop then saves
after every step, and the autoscaler starts a replacement. Ray never uses a drained node again. So
if the machine is still there a minute after its deadline, Ray is stopped on it, and the autoscaler
returns it to the cloud.
"""

import logging
import os
import signal
import subprocess
import sys
import time

from cluster.node.cloud_notices import MetadataServiceError, Notice, NoticeReader, notice_reader
from cluster.node.host_program import HOST_FOLDER, log_to_stdout, replace_running_instance
from cluster.node.raylets import Raylet, local_raylets

POLL_S = 2.0
DRAIN_TIMEOUT_S = 20.0
GRACE_S = 60.0
"""How long after its deadline a machine may still be there before Ray is stopped on it."""

logger = logging.getLogger(__name__)


class PreemptionAgent:
    """Reacts to preemption notices; `poll_once` is to be called again and again."""

    def __init__(self, read_notice: NoticeReader) -> None:
        self._read_notice = read_notice
        self._unreachable = False
        self._last_line = ""
        self._notice: Notice | None = None
        self._drained: set[tuple[str, str]] = set()
        """(notice, node) pairs for which Ray has accepted the drain."""

    def poll_once(self) -> None:
        """Ask for a notice, and do what is due. Failures of the network and of Ray are logged."""
        try:
            notice = self._read_notice()
            if self._unreachable:
                logger.info("the metadata service answers again")
            self._unreachable = False
        except MetadataServiceError as error:
            if not self._unreachable:
                logger.info("the metadata service does not answer (%s); still asking", error)
            self._unreachable, notice = True, self._notice
        if notice is not None and (self._notice is None or notice.key != self._notice.key):
            deadline = time.strftime("%H:%M:%S UTC", time.gmtime(notice.deadline))
            logger.info("%s: this machine is going at %s", notice.description, deadline)
            self._notice = notice
        if self._notice is not None:
            self._act_on(self._notice)

    def _act_on(self, notice: Notice) -> None:
        raylets = list(local_raylets())
        if time.time() > notice.deadline + GRACE_S:
            self._stop_drained(raylets, notice)
            return
        if not raylets and not self._drained:
            self._log_once("there is no Ray on this machine yet")
        for raylet in raylets:
            if (notice.key, raylet.node_id) in self._drained:
                continue
            problem = drain_raylet(raylet, notice)
            if problem:
                self._log_once(f"Ray could not be told ({problem}); still trying")
            else:
                logger.info("Ray's node %s is drained", raylet.node_id[:8])
                self._drained.add((notice.key, raylet.node_id))

    def _stop_drained(self, raylets: list[Raylet], notice: Notice) -> None:
        for raylet in raylets:
            if (notice.key, raylet.node_id) in self._drained:
                node = raylet.node_id[:8]
                logger.info("this machine is still there; stopping Ray's node %s on it", node)
                os.kill(raylet.pid, signal.SIGTERM)
                self._drained.discard((notice.key, raylet.node_id))

    def _log_once(self, line: str) -> None:
        """Log a line unless it is the same as the last time."""
        if line != self._last_line:
            logger.info("%s", line)
        self._last_line = line


def drain_raylet(raylet: Raylet, notice: Notice) -> str | None:
    """Drain a node in a process of its own; returns the problem in one line, or None."""
    words = [raylet.gcs_address, str(notice.deadline), notice.description, raylet.node_id]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.node.drain", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DRAIN_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer from the head within {DRAIN_TIMEOUT_S:g} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def main(cloud: str) -> None:
    """Poll until this process is ended."""
    log_to_stdout()
    replace_running_instance((HOST_FOLDER / "agent.pid").expanduser())
    agent = PreemptionAgent(notice_reader(cloud))
    logger.info("watching for %s's notices", cloud)
    while True:
        agent.poll_once()
        time.sleep(POLL_S)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("aws", "gcp", "azure"):
        sys.exit("usage: python -m cluster.node.preemption_agent aws|gcp|azure")
    main(sys.argv[1])
