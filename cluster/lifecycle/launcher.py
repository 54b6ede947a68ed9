"""A cluster from its file to its end: Ray's own launcher, with cures for what it does not do.

- On premises (provider `local`), autoscaler v2 never counts the head and never finds a second
  worker (Ray 2.60): v1 is asked for.
- The launcher's notes say that a head is set up which has been replaced by another machine: they
  are thrown away when the head does not run. When it does, the lines that start it start what is
  missing, and nothing twice.
- `ray down` stops the head alone: all hosts are told.
- The token is made first, and a file that would not carry it is refused.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.base.errors import ClusterError, SpecError
from cluster.base.files import cache_folder
from cluster.connection.auth_token import ensure_token
from cluster.connection.ssh import (
    SshTarget,
    head_target,
    on_premises_targets,
    read_launcher_file,
    run_on_node,
    tunnel,
)
from cluster.definition.shell_commands import CLUSTER_ENV_VAR
from cluster.lifecycle.status import NodeStatus, list_nodes

LogLine = Callable[[str], object]

UP_TIMEOUT_S = 1800
"""For machines that are rented, booted and set up by package managers."""

START_ATTEMPTS = 3
STARTUP_TIMEOUT_MESSAGE = "timed out during startup"

HEAD_RUNNING_SCRIPT = (
    "pgrep -x gcs_server >/dev/null && test -e ~/ray_bootstrap_config.yaml && echo runs"
)
STOP_SCRIPT = """
ray stop --force >/dev/null 2>&1
ours() {
  grep -lsz "^MARK=NAME$" /proc/[0-9]*/environ | cut -d/ -f3
  pgrep -f "^ray::"  # these have written their title over their environment
}
kill -TERM $(ours) 2>/dev/null
for _ in $(seq 100); do test -n "$(ours)" || exit 0; sleep 0.1; done
kill -KILL $(ours) 2>/dev/null
for _ in $(seq 100); do test -n "$(ours)" || exit 0; sleep 0.1; done
echo "could not be stopped: processes $(ours)"
exit 1
"""

ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ERROR_WORD = re.compile(
    r"error|fail|denied|timed out|timeout|not found|no such|unable|cannot|could not|invalid|"
    r"exceed|insufficient|unauthorized|refused|unreachable|abort",
    re.IGNORECASE,
)

EXCEPTION_LINE = re.compile(r"[\w.]*(Error|ERROR|Exception|Failure)\b: ")
UNINFORMATIVE_LINE = re.compile(
    r'^File "|^raise |Failed to setup head node|SSH command failed|update-failed|Full traceback|'
    r"Exception details|commands failed|command_runner.py|Permanently added|ERR updater|"
    r"originates from a subprocess|subprocess-exited|did not run successfully|PANIC commands"
)


def up(file: Path, log_line: LogLine, timeout_s: float = UP_TIMEOUT_S) -> list[NodeStatus]:
    """Start the cluster of `file`, or what is missing of it, and wait for its minimum nodes.

    What runs on a cluster that is up goes on, where the file's commands start nothing twice, as
    those of rendered files don't. Raises ClusterError, with the log's path, if a node is not in
    after `limit_s`.
    """
    start = time.monotonic()
    config = read_launcher_file(file)
    name = config["cluster_name"]
    _require_token_mount(config)
    ensure_token()
    log = launcher_log(name, "up")
    arguments = ["up", "-y", "--disable-usage-stats", str(file)]
    if config["provider"]["type"] == "local":
        head, *workers = on_premises_targets(config).values()
        if not _head_is_running(head):
            _delete_launcher_state(name)
            if not _state_survives_head(config):
                _stop_hosts(workers, name)
    log_line(f"{name}: starting (log: {log})")
    _ray_up(arguments, log, config)
    nodes = _wait_for_nodes(file, config, log, start + timeout_s)
    kinds = ", ".join(node.address for node in nodes)
    log_line(f"{name}: {len(nodes)} nodes in after {time.monotonic() - start:.0f} s: {kinds}")
    return nodes


def down(file: Path, log_line: LogLine) -> None:
    """End the cluster of `file`: no process on own hosts, no instance in a cloud.

    Raises ClusterError if hosts were not reached, after all others have been told.
    """
    config = read_launcher_file(file)
    name = config["cluster_name"]
    if config["provider"]["type"] != "local":
        log = launcher_log(name, "down")
        log_line(f"{name}: ending (log: {log})")
        _run_launcher(["down", "-y", str(file)], log, config)
        log_line(f"{name}: down")
        return
    doors = on_premises_targets(config)
    head, *workers = doors.values()
    # The head first: its autoscaler would start the others again.
    missed = [*_stop_hosts([head], name), *_stop_hosts(workers, name)]
    _delete_launcher_state(name)
    if missed:
        raise ClusterError(f"{name}: not told to stop: " + "; ".join(missed))
    log_line(f"{name}: down, {len(doors)} hosts are empty")


def attach(file: Path) -> int:
    """A shell on the head, in this terminal. Returns its exit code.

    Not by `ray attach`, which takes the exit code of the last thing typed for a failure of its own.
    Raises ClusterError if the head does not let us in.
    """
    door = head_target(file)
    shell = "exec bash --login -c 'exec \"$SHELL\"'"  # it reads ~/.profile, and then ~/.bashrc
    code = subprocess.run([*door.command("-t"), shell], check=False).returncode
    if code == 255:  # ssh's own; it has said why
        raise ClusterError(f"ssh to {door.address}: the connection failed")
    return code


def launcher_log(name: str, verb: str) -> Path:
    """Where what Ray's launcher prints goes; the newest call's alone."""
    return cache_folder() / f"{name}.{verb}.log"


def minimum_node_count(config: Mapping[str, Any]) -> int:
    """How many nodes there are when nothing is asked of the cluster, with the head."""
    if config["provider"]["type"] == "local":
        hosts = len(config["provider"].get("worker_ips", []))
        return 1 + min(int(config.get("min_workers", hosts)), hosts)
    kinds = config.get("available_node_types", {})
    head = config.get("head_node_type")
    return 1 + sum(int(kind.get("min_workers", 0)) for name, kind in kinds.items() if name != head)


def error_line(output: str) -> str:
    """The line of a launcher's output that says best why it failed."""
    plain = [line.strip(" \t\r│╰─>") for line in ANSI_ESCAPE.sub("", output).splitlines()]
    lines = [line for line in plain if line and not UNINFORMATIVE_LINE.search(line)]
    raised = [line for line in lines if EXCEPTION_LINE.match(line)]
    telling = [line for line in lines if ERROR_WORD.search(line)]
    return (raised or telling or lines or ["ended without a word"])[-1][:300]


def _require_token_mount(config: Mapping[str, Any]) -> None:
    """Ray's launcher carries no token; without one on each node none of them gets in."""
    mounted = any(str(path).endswith(".ray/auth_token") for path in config.get("file_mounts", {}))
    commands = str(config)
    if not mounted:
        raise SpecError("file_mounts: needs `~/.ray/auth_token: ~/.ray/auth_token`")
    if "RAY_AUTH_MODE=token" not in commands:
        raise SpecError("head_start_ray_commands: must export RAY_AUTH_MODE=token")


def _head_is_running(door: SshTarget) -> bool:
    """Whether this very machine is a head that is set up. Raises ClusterError without SSH."""
    asked = run_on_node(door, HEAD_RUNNING_SCRIPT)
    if asked.returncode == 255:
        raise ClusterError(f"head {door.address}: no SSH: {error_line(asked.stdout)}")
    return "runs" in asked.stdout.split()


def _state_survives_head(config: Mapping[str, Any]) -> bool:
    """Whether a new head knows the workers of the old one. If not, they wait for it in vain."""
    commands = " ".join(config.get("head_start_ray_commands", []))
    return "RAY_gcs_storage" in commands or "RAY_REDIS_ADDRESS" in commands


def _delete_launcher_state(name: str) -> None:
    """Throw away what Ray's launcher has noted about a cluster on own hosts."""
    from ray.autoscaler._private.local.config import get_state_path

    Path(get_state_path(name)).unlink(missing_ok=True)


def _launcher_command() -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts"]


def _run_launcher(arguments: list[str], log: Path, config: Mapping[str, Any]) -> None:
    """Run a verb of Ray's launcher with its output in `log`."""
    v2 = "0" if config["provider"]["type"] == "local" else "1"
    environment = {**os.environ, "RAY_UP_enable_autoscaler_v2": v2, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        code = subprocess.run(
            [*_launcher_command(), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,
        ).returncode
    if code:
        raise ClusterError(
            f"ray {arguments[0]} failed: {error_line(log.read_text(errors='replace'))} (log: {log})"
        )


def _ray_up(arguments: list[str], log: Path, config: Mapping[str, Any]) -> None:
    """`ray up`, again where Ray gave up on a head that is merely slow: it waits for 15 to 30 s."""
    for left in reversed(range(START_ATTEMPTS)):
        try:
            _run_launcher(arguments, log, config)
            return
        except ClusterError:
            if not left or STARTUP_TIMEOUT_MESSAGE not in log.read_text(errors="replace"):
                raise


def _wait_for_nodes(
    file: Path, config: Mapping[str, Any], log: Path, deadline: float
) -> list[NodeStatus]:
    wanted = minimum_node_count(config)
    nodes: list[NodeStatus] = []
    trouble = ""
    with tunnel(file) as urls:
        while len(nodes) < wanted:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{config['cluster_name']}: {len(nodes)} of {wanted} nodes are in"
                    f"{_missing_hosts(config, nodes)}{trouble}; `ray monitor {file}` shows what the head "
                    f"tries (log: {log})"
                )
            try:
                nodes = list_nodes(urls.dashboard)
            except ClusterError as error:
                trouble = f"; {error}"  # the dashboard starts after the head
            time.sleep(0.3)
    return nodes


def _missing_hosts(config: Mapping[str, Any], nodes: list[NodeStatus]) -> str:
    hosts = set(config["provider"].get("worker_ips", [])) - {node.address for node in nodes}
    return f", not {', '.join(sorted(hosts))}" if hosts else ""


def _stop_hosts(targets: list[SshTarget], name: str) -> list[str]:
    """End all that the cluster runs on these hosts; a line per host where that failed."""
    script = STOP_SCRIPT.replace("MARK", CLUSTER_ENV_VAR).replace("NAME", name)
    command = f"bash --login -c -i {shlex.quote(script)}"

    def stop(door: SshTarget) -> str | None:
        done = run_on_node(door, command, timeout_s=120)
        return f"{door.address} ({error_line(done.stdout)})" if done.returncode else None

    with ThreadPoolExecutor(16) as pool:
        return [line for line in pool.map(stop, targets) if line]
