"""The agent of a node: hears the cloud's notice that the machine is taken away, and tells Ray.

    python -m cluster.node.preemption_agent aws|gcp|azure

It is started on every node by the commands of cluster.yaml and needs nothing to be there yet:
neither Ray, nor the head, nor the metadata service. Whoever starts a second one replaces the
first. It prints one line per event.

What Ray is told ("drained for preemption until then") reaches the training loop, which saves after
every step from then on, and the autoscaler, which starts a replacement. Ray leaves a drained node
alone for ever. So where the machine is still there a minute after its time, Ray is stopped on it
and the autoscaler gives it back.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.node.cloud_notices import MetadataServiceError, Notice, NoticeReader, notice_reader

POLL_S = 2.0
DRAIN_TIMEOUT_S = 20.0
GRACE_S = 60.0
"""How long after its deadline a machine may still be there before Ray is stopped on it."""
NODE_IP_VAR = "HELIOSTAT_NODE_IP"
"""The address of the one Ray node that is meant, where several are on one machine."""
PID_FILE = Path("~/.heliostat/agent.pid")


@dataclass(frozen=True)
class Raylet:
    """A Ray node on this machine, as its process tells."""

    pid: int
    node_id: str
    ip: str
    gcs_address: str
    """The address of the cluster's GCS."""


def local_raylets(proc: Path = Path("/proc")) -> Iterator[Raylet]:
    """The Ray nodes on this machine; of them the one at HELIOSTAT_NODE_IP, where that is set."""
    wanted = os.environ.get(NODE_IP_VAR)
    for folder in proc.glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if Path(words[0]).name != "raylet":
            continue
        said = dict(
            word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word
        )
        if wanted in (None, said["node_ip_address"]):
            yield Raylet(
                int(folder.name), said["node_id"], said["node_ip_address"], said["gcs-address"]
            )


class PreemptionAgent:
    """What is done about notices; `step` is called again and again."""

    def __init__(self, read_notice: NoticeReader) -> None:
        self._read_notice = read_notice
        self._unreachable = False
        self._last_line = ""
        self._notice: Notice | None = None
        self._drained: set[tuple[str, str]] = set()
        """Which nodes have been told of which notice."""

    def poll_once(self) -> None:
        """Look once, and do what is due. Raises nothing but what a mistake of ours raises."""
        try:
            notice = self._read_notice()
            if self._unreachable:
                log_event("the metadata service answers again")
            self._unreachable = False
        except MetadataServiceError as error:
            if not self._unreachable:
                log_event(f"the metadata service does not answer ({error}); asking on")
            self._unreachable, notice = True, self._notice
        if notice is not None and (self._notice is None or notice.key != self._notice.key):
            log_event(
                f"{notice.description}: this machine is going at {_format_clock(notice.deadline)}"
            )
            self._notice = notice
        if self._notice is not None:
            self._act_on(self._notice)

    def _act_on(self, notice: Notice) -> None:
        here = list(local_raylets())
        if time.time() > notice.deadline + GRACE_S:
            for raylet in here:
                if (notice.key, raylet.node_id) in self._drained:
                    log_event(
                        f"this machine is still there; stopping Ray's node {raylet.node_id[:8]} on it"
                    )
                    os.kill(raylet.pid, signal.SIGTERM)
                    self._drained.discard((notice.key, raylet.node_id))
            return
        untold = [raylet for raylet in here if (notice.key, raylet.node_id) not in self._drained]
        if not here and not self._drained:
            self._log_once("there is no Ray on this machine yet")
        for raylet in untold:
            problem = drain_raylet(raylet, notice)
            if problem:
                self._log_once(f"Ray could not be told ({problem}); trying on")
            else:
                log_event(f"Ray's node {raylet.node_id[:8]} is drained")
                self._drained.add((notice.key, raylet.node_id))

    def _log_once(self, line: str) -> None:
        if line != self._last_line:
            log_event(line)
        self._last_line = line


def drain_raylet(raylet: Raylet, notice: Notice) -> str | None:
    """Drain a node; returns what went wrong in one line, or None."""
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


def replace_running_instance(pid_file: Path, timeout_s: float = 10.0) -> int:
    """End the program that holds the file `place`, and hold it; returns the descriptor.

    The newest one has the newest code and settings. Raises TimeoutError if the old one stays.
    """
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(file, 20, 0).decode().strip()
            if holder.isdigit() and int(holder) != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(holder), signal.SIGTERM)
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {holder} does not let go of {pid_file}") from None
            time.sleep(0.1)
    os.ftruncate(file, 0)
    os.pwrite(file, str(os.getpid()).encode(), 0)
    return file


def log_event(line: str) -> None:
    """One event, with its time."""
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}", flush=True)


def _format_clock(when: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(when))


def main(cloud: str) -> None:
    """Watch for ever."""
    replace_running_instance(PID_FILE.expanduser())
    agent = PreemptionAgent(notice_reader(cloud))
    log_event(f"watching for {cloud}'s notices")
    while True:
        agent.poll_once()
        time.sleep(POLL_S)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("aws", "gcp", "azure"):
        sys.exit("usage: python -m cluster.node.preemption_agent aws|gcp|azure")
    main(sys.argv[1])
