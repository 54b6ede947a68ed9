"""Hosts of provider `local`, which no cloud starts or ends: what must be done on them by SSH."""

import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.base.errors import ClusterError
from cluster.connection.ssh import SSH_FAILED, SshTarget, run_on_node
from cluster.definition.shell_commands import CLUSTER_ENV_VAR
from cluster.lifecycle.launcher_output import error_line

_HEAD_RUNNING_SCRIPT = (
    "pgrep -x gcs_server >/dev/null && test -e ~/ray_bootstrap_config.yaml && echo runs"
)
_STOP_SCRIPT = """
ray stop --force >/dev/null 2>&1
ours() {
  grep -lsz "^VARIABLE=NAME$" /proc/[0-9]*/environ | cut -d/ -f3
  pgrep -f "^ray::"  # workers overwrite their environment with the title of their process
}
kill -TERM $(ours) 2>/dev/null
for _ in $(seq 100); do test -n "$(ours)" || exit 0; sleep 0.1; done
kill -KILL $(ours) 2>/dev/null
for _ in $(seq 100); do test -n "$(ours)" || exit 0; sleep 0.1; done
echo "could not be stopped: processes $(ours)"
exit 1
"""
_STOP_TIMEOUT_S = 120


def head_is_running(head: SshTarget) -> bool:
    """Whether this host is a head that is set up and runs Ray. Raises ClusterError without SSH."""
    asked = run_on_node(head, _HEAD_RUNNING_SCRIPT)
    if asked.returncode == SSH_FAILED:
        raise ClusterError(f"head {head.address}: no SSH: {error_line(asked.stdout)}")
    return "runs" in asked.stdout.split()


def state_survives_head(config: Mapping[str, Any]) -> bool:
    """Whether a new head takes over the workers of the old one.

    Without persisted state they keep waiting for the old one.
    """
    commands = " ".join(config.get("head_start_ray_commands", []))
    return "RAY_gcs_storage" in commands or "RAY_REDIS_ADDRESS" in commands


def stop_hosts(targets: list[SshTarget], name: str) -> list[str]:
    """End all processes of cluster `name` on these hosts; a line for each host that failed."""
    script = _STOP_SCRIPT.replace("VARIABLE", CLUSTER_ENV_VAR).replace("NAME", name)
    command = f"bash --login -c -i {shlex.quote(script)}"

    def stop(target: SshTarget) -> str | None:
        done = run_on_node(target, command, _STOP_TIMEOUT_S)
        return f"{target.address} ({error_line(done.stdout)})" if done.returncode else None

    with ThreadPoolExecutor(16) as pool:
        return [line for line in pool.map(stop, targets) if line]
