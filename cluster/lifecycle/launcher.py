"""Start, end and enter a cluster, with Ray's own launcher and workarounds for its gaps.

- On premises (provider `local`), autoscaler v2 never counts the head and never finds a second
  worker (Ray 2.60), so v1 is used there.
- The launcher keeps a record that a head is set up, even after another machine has replaced it.
  The record is deleted if the head does not run. If it runs, the commands that start it start
  only what is missing.
- `ray down` stops the head alone, so all other hosts are stopped here.
- The authentication token is created first, and a file that would not copy it to the nodes is
  refused.
"""

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.base.errors import ClusterError, SpecError
from cluster.base.files import cache_folder
from cluster.connection.auth_token import ensure_token
from cluster.connection.ray_internals import (
    LAUNCHER_V2_ENV_VAR,
    STARTUP_TIMEOUT_MESSAGE,
    launcher_command,
    launcher_state_file,
)
from cluster.connection.ssh import (
    SSH_FAILED,
    head_target,
    on_premises_targets,
    read_launcher_file,
    tunnel,
)
from cluster.definition.launcher_config import missing_programs, mounted_from
from cluster.definition.shell_commands import REMOTE_PROJECT
from cluster.lifecycle.launcher_output import error_line
from cluster.lifecycle.on_premises import head_is_running, state_survives_head, stop_hosts
from cluster.lifecycle.status import NodeStatus, list_nodes

LogLine = Callable[[str], object]

UP_TIMEOUT_S = 1800
"""Enough for machines that are rented, booted and set up by package managers."""

START_ATTEMPTS = 3


def up(file: Path, log_line: LogLine, timeout_s: float = UP_TIMEOUT_S) -> list[NodeStatus]:
    """Start the cluster of `file`, or its missing nodes, and wait for its minimum nodes.

    Running jobs of a cluster that is up go on, provided that the file's commands start nothing
    twice, as those of rendered files do not. Raises ClusterError, with the path of the log, if
    a node has not joined after `timeout_s`.
    """
    start = time.monotonic()
    config = read_launcher_file(file)
    name = config["cluster_name"]
    _require_token_mount(config)
    _require_known_programs(config)
    ensure_token()
    log = launcher_log(name, "up")
    arguments = ["up", "-y", "--disable-usage-stats", str(file)]
    if config["provider"]["type"] == "local":
        head, *workers = on_premises_targets(config).values()
        if not head_is_running(head):
            launcher_state_file(name).unlink(missing_ok=True)
            if not state_survives_head(config):
                stop_hosts(workers, name)
    log_line(f"{name}: starting (log: {log})")
    _ray_up(arguments, log, config)
    nodes = _wait_for_nodes(file, config, log, start + timeout_s)
    addresses = ", ".join(node.address for node in nodes)
    log_line(f"{name}: {len(nodes)} nodes in after {time.monotonic() - start:.0f} s: {addresses}")
    return nodes


def down(file: Path, log_line: LogLine) -> None:
    """End the cluster of `file`: its processes on own hosts, its instances in a cloud.

    Raises ClusterError if hosts could not be reached, after all others have been stopped.
    """
    config = read_launcher_file(file)
    name = config["cluster_name"]
    if config["provider"]["type"] != "local":
        log = launcher_log(name, "down")
        log_line(f"{name}: ending (log: {log})")
        _run_launcher(["down", "-y", str(file)], log, config)
        log_line(f"{name}: down")
        return
    targets = on_premises_targets(config)
    head, *workers = targets.values()
    # The head first, because its autoscaler would start the others again.
    failed = [*stop_hosts([head], name), *stop_hosts(workers, name)]
    launcher_state_file(name).unlink(missing_ok=True)
    if failed:
        raise ClusterError(f"{name}: could not stop: " + "; ".join(failed))
    log_line(f"{name}: down, {len(targets)} hosts are empty")


def attach(file: Path) -> int:
    """Open a shell on the head, in this terminal. Returns its exit code.

    `ray attach` would report the exit code of the last command typed as a failure of its own.
    Raises ClusterError if the connection fails.
    """
    target = head_target(file)
    shell = "exec bash --login -c 'exec \"$SHELL\"'"  # it reads ~/.profile, and then ~/.bashrc
    code = subprocess.run([*target.command("-t"), shell], check=False).returncode
    if code == SSH_FAILED:  # ssh has printed why
        raise ClusterError(f"ssh to {target.address}: the connection failed")
    return code


def launcher_log(name: str, verb: str) -> Path:
    """The file with the output of the latest launcher call for this cluster and verb."""
    return cache_folder() / f"{name}.{verb}.log"


def minimum_node_count(config: Mapping[str, Any]) -> int:
    """The number of nodes of an idle cluster, with the head."""
    if config["provider"]["type"] == "local":
        hosts = len(config["provider"].get("worker_ips", []))
        return 1 + min(int(config.get("min_workers", hosts)), hosts)
    types = config.get("available_node_types", {})
    head = config.get("head_node_type")
    return 1 + sum(int(each.get("min_workers", 0)) for name, each in types.items() if name != head)


def _require_token_mount(config: Mapping[str, Any]) -> None:
    """Raise SpecError unless the file copies the token, without which no node can join.

    Ray's launcher does not copy it by itself.
    """
    mounted = any(str(path).endswith(".ray/auth_token") for path in config.get("file_mounts", {}))
    if not mounted:
        raise SpecError("file_mounts: needs `~/.ray/auth_token: ~/.ray/auth_token`")
    if "RAY_AUTH_MODE=token" not in str(config):
        raise SpecError("head_start_ray_commands: must export RAY_AUTH_MODE=token")


def _require_known_programs(config: Mapping[str, Any]) -> None:
    """Raise SpecError if the file copies this checkout, but starts programs that it lacks."""
    if mounted_from(config, REMOTE_PROJECT) is None:  # the hosts may have another version
        return
    for path, module in missing_programs(config):
        raise SpecError(
            f"{path}: there is no module {module} in this version; render the file again with "
            "`heliostat cluster render`"
        )


def _ray_up(arguments: list[str], log: Path, config: Mapping[str, Any]) -> None:
    """Run `ray up`, again if Ray gave up on a slow head, for which it waits 15 to 30 s only."""
    for attempts_left in reversed(range(START_ATTEMPTS)):
        try:
            _run_launcher(arguments, log, config)
            return
        except ClusterError:
            timed_out = STARTUP_TIMEOUT_MESSAGE in log.read_text(errors="replace")
            if not attempts_left or not timed_out:
                raise


def _run_launcher(arguments: list[str], log: Path, config: Mapping[str, Any]) -> None:
    """Run a verb of Ray's launcher with its output in `log`."""
    v2 = "0" if config["provider"]["type"] == "local" else "1"
    environment = {**os.environ, LAUNCHER_V2_ENV_VAR: v2, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        code = subprocess.run(
            [*launcher_command(), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        ).returncode
    if code:
        reason = error_line(log.read_text(errors="replace"))
        raise ClusterError(f"ray {arguments[0]} failed: {reason} (log: {log})")


def _wait_for_nodes(
    file: Path, config: Mapping[str, Any], log: Path, deadline: float
) -> list[NodeStatus]:
    minimum = minimum_node_count(config)
    nodes: list[NodeStatus] = []
    last_error = ""
    with tunnel(file) as urls:
        while len(nodes) < minimum:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{config['cluster_name']}: {len(nodes)} of {minimum} nodes are in"
                    f"{_missing_hosts(config, nodes)}{last_error}; `ray monitor {file}` shows what "
                    f"the head tries (log: {log})"
                )
            try:
                nodes = list_nodes(urls.dashboard)
            except ClusterError as error:
                last_error = f"; {error}"  # the dashboard starts after the head
            time.sleep(0.3)
    return nodes


def _missing_hosts(config: Mapping[str, Any], nodes: list[NodeStatus]) -> str:
    hosts = set(config["provider"].get("worker_ips", [])) - {node.address for node in nodes}
    return f", not {', '.join(sorted(hosts))}" if hosts else ""
