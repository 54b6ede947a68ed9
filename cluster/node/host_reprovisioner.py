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

from cluster.connection.ssh import SshTarget, on_premises_targets, run_on_node

AUTOSCALER_FILE = Path("~/ray_bootstrap_config.yaml")
"""What Ray's launcher puts on a head: the cluster's file, as JSON."""

AGENT_PORT = 52365
"""Where Ray's agent listens on every node, unless it is told otherwise."""

TOKEN_FILE = "~/.ray/auth_token"
POLL_S = 3.0
SETUP_TIMEOUT_S = 1800


def main() -> int:
    """Runs until it is ended with the rest of the cluster."""
    config = json.loads(AUTOSCALER_FILE.expanduser().read_text())
    _, *workers = on_premises_targets(config).values()
    host = HostReprovisioner(config)
    with ThreadPoolExecutor(16) as pool:
        while True:
            for line in pool.map(host.reprovision_if_empty, workers):
                if line:
                    print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)
            time.sleep(POLL_S)


class HostReprovisioner:
    """Which hosts were in, and which of them are owed a set-up."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the cluster's file as Ray's launcher has prepared it for the head."""
        self._config = config
        self._joined: set[str] = set()
        self._empty: set[str] = set()

    def reprovision_if_empty(self, target: SshTarget) -> str | None:
        """Set up the host if it was in and has lost everything. Returns what was done, in a line.

        A host that was never in is being set up by the autoscaler.
        """
        host = target.address
        if _ray_is_running(host):
            self._joined.add(host)
            return None
        if host not in self._joined:
            return None
        if run_on_node(target, f"test -s {TOKEN_FILE}").returncode == 1:
            self._empty.add(host)
        if host not in self._empty:
            return None
        trouble = self._run_setup(target)
        if trouble is None:
            self._empty.discard(host)
        return f"{host}: {trouble or 'came back empty, set up again'}"

    def _run_setup(self, target: SshTarget) -> str | None:
        """What Ray's launcher does with a new host. Returns what went wrong."""
        for path, source in self._config["file_mounts"].items():
            try:
                self._copy(target, source, path)
            except subprocess.CalledProcessError as error:
                return f"cannot copy {path} to it: {error.stderr.strip()[-300:]}"
        for command in self._config["worker_setup_commands"]:
            shell = f"bash --login -c -i {shlex.quote(command)}"
            done = run_on_node(target, shell, SETUP_TIMEOUT_S)
            if done.returncode:
                return f"set-up failed: {command}: {done.stdout.strip()[-300:]}"
        return None

    def _copy(self, ssh_target: SshTarget, source: str, target: str) -> None:
        ssh, *options, there = ssh_target.command()
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


def _ray_is_running(host: str) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, AGENT_PORT), timeout=2).close()
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
