"""Sets up an on-premises host again that comes back as an empty machine. Runs on the head.

    python -m cluster.node.host_reprovisioner

Ray's autoscaler only starts Ray again on a host that was lost. A machine that was replaced has
neither the token nor the software, and never joins (Ray 2.60). So this program looks at each host
that had joined and no longer runs Ray, and sets it up if it is empty; then the autoscaler's next
attempt succeeds.
"""

import contextlib
import json
import logging
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.connection.ray_internals import DASHBOARD_AGENT_PORT, HEAD_CLUSTER_FILE
from cluster.connection.ssh import SshTarget, on_premises_targets, run_on_node
from cluster.node.host_program import log_to_stdout

TOKEN_FILE = "~/.ray/auth_token"
POLL_S = 3.0
SETUP_TIMEOUT_S = 1800

logger = logging.getLogger(__name__)


class HostReprovisioner:
    """Remembers which hosts have joined, and which of them must be set up again."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the cluster's file, as Ray's launcher prepared it for the head."""
        self._config = config
        self._joined: set[str] = set()
        self._empty: set[str] = set()

    def reprovision_if_empty(self, target: SshTarget) -> str | None:
        """Set up a host that had joined and is now empty; returns a line about it, or None.

        A host that has never joined is set up by the autoscaler.
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
        problem = self._run_setup(target)
        if problem is None:
            self._empty.discard(host)
        return f"{host}: {problem or 'came back empty, set up again'}"

    def _run_setup(self, target: SshTarget) -> str | None:
        """Do what Ray's launcher does with a new host. Returns the problem, or None."""
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

    def _copy(self, ssh_target: SshTarget, source: str, path: str) -> None:
        """Copy a file or folder of this machine to `path` on a host."""
        ssh, *options, host = ssh_target.command()
        local = Path(source).expanduser()
        slash = "/" if local.is_dir() else ""
        folder = path if slash else str(Path(path).parent)
        ends = [f"{local}{slash}", f"{host}:{path}{slash}"]
        excluded = [f"--exclude={pattern}" for pattern in self._config.get("rsync_exclude", [])]
        for command in (
            [ssh, *options, host, f"mkdir -p {folder}"],
            ["rsync", "-az", *excluded, "--rsh", shlex.join([ssh, *options]), *ends],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)


def _ray_is_running(host: str) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((host, DASHBOARD_AGENT_PORT), timeout=2).close()
        return True
    return False


def main() -> None:
    """Poll until this process is ended, with the rest of the cluster."""
    log_to_stdout()
    config = json.loads(HEAD_CLUSTER_FILE.expanduser().read_text())
    _, *workers = on_premises_targets(config).values()
    reprovisioner = HostReprovisioner(config)
    with ThreadPoolExecutor(16) as pool:
        while True:
            for line in pool.map(reprovisioner.reprovision_if_empty, workers):
                if line:
                    logger.info("%s", line)
            time.sleep(POLL_S)


if __name__ == "__main__":
    main()
