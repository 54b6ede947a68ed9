"""On the head of hosts of one's own: sets up a host that comes back as an empty machine.

Ray's autoscaler starts Ray again on a host that was lost, and nothing else: a machine that was
replaced has neither the token nor the set-up, and is never joined (Ray 2.60). So a host that was
in and is silent is visited, and given what it lacks; the autoscaler's next attempt succeeds.
"""

import contextlib
import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.connection.ssh import Door, doors_on_premises, on_node

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")
"""What Ray's launcher puts on a head: the cluster's file, as JSON."""

AGENT_PORT = 52365
"""Where Ray's agent listens on every node, unless it is told otherwise."""

TOKEN = "~/.ray/auth_token"
EVERY_S = 3.0
SET_UP_LIMIT_S = 1800


def main() -> int:
    """Runs until it is ended with the rest of the cluster."""
    config = json.loads(BOOTSTRAP.expanduser().read_text())
    _, *workers = doors_on_premises(config).values()
    host = Furnisher(config)
    with ThreadPoolExecutor(16) as pool:
        while True:
            for line in pool.map(host.visit, workers):
                if line:
                    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)
            time.sleep(EVERY_S)


class Furnisher:
    """Which hosts were in, and which of them are owed a set-up."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the cluster's file as Ray's launcher has prepared it for the head."""
        self._config = config
        self._known: set[str] = set()
        self._owed: set[str] = set()

    def visit(self, door: Door) -> str | None:
        """Set up the host if it was in and has lost everything. Returns what was done, in a line.

        A host that was never in is being set up by the autoscaler.
        """
        host = door.address
        if _runs_ray(host):
            self._known.add(host)
            return None
        if host not in self._known:
            return None
        if on_node(door, f"test -s {TOKEN}").returncode == 1:
            self._owed.add(host)
        if host not in self._owed:
            return None
        trouble = self._set_up(door)
        if trouble is None:
            self._owed.discard(host)
        return f"{host}: {trouble or 'came back empty, set up again'}"

    def _set_up(self, door: Door) -> str | None:
        """What Ray's launcher does with a new host. Returns what went wrong."""
        for target, source in self._config["file_mounts"].items():
            try:
                self._copy(door, source, target)
            except subprocess.CalledProcessError as error:
                return f"cannot copy {target} to it: {error.stderr.strip()[-300:]}"
        for command in self._config["worker_setup_commands"]:
            shell = f"bash --login -c -i {shlex.quote(command)}"
            done = on_node(door, shell, SET_UP_LIMIT_S)
            if done.returncode:
                return f"set-up failed: {command}: {done.stdout.strip()[-300:]}"
        return None

    def _copy(self, door: Door, source: str, target: str) -> None:
        ssh, *options, there = door.command()
        here = Path(source).expanduser()
        slash = "/" if here.is_dir() else ""
        folder = target if slash else str(Path(target).parent)
        ends = [f"{here}{slash}", f"{there}:{target}{slash}"]
        excluded = [f"--exclude={pattern}" for pattern in self._config.get("rsync_exclude", [])]
        for command in (
            [ssh, *options, there, f"mkdir -p {folder}"],
            ["rsync", "-az", *excluded, "--rsh", shlex.join([ssh, *options]), *ends],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)


def _runs_ray(host: str) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, AGENT_PORT), timeout=2).close()
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
