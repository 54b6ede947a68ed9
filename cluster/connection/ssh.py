"""SSH to the nodes of a cluster, and tunnels to its dashboard and to MLflow.

Neither is reachable from outside the cluster, so each command that needs them opens a tunnel for
as long as it runs.
"""

import contextlib
import io
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.config import read_yaml
from cluster.base.errors import ClusterError, HeliostatError, SpecError
from cluster.connection.ray_internals import find_head

DASHBOARD_PORT = 8265
MLFLOW_URI_FILE = "~/.heliostat/mlflow_uri"
"""The file on the head with the address at which MLflow listens there."""

CONNECT_TIMEOUT_S = 20
SSH_FAILED = 255
"""The exit code with which ssh itself fails; every other one is the remote command's."""


@dataclass(frozen=True)
class SshTarget:
    """How to reach a node by SSH."""

    address: str
    user: str
    key: str | None
    proxy_command: str | None = None
    """A command that connects to a node that cannot be reached directly."""

    def command(self, *options: str) -> list[str]:
        """The ssh command to the node, to which the remote command is to be appended."""
        # A machine that is replaced has another host key at the same address.
        settings = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        settings += ["BatchMode=yes", f"ConnectTimeout={CONNECT_TIMEOUT_S}"]
        settings += ["ServerAliveInterval=15"]
        if self.key:
            settings.append("IdentitiesOnly=yes")
        if self.proxy_command:
            settings.append(f"ProxyCommand={self.proxy_command}")
        key = ["-i", str(Path(self.key).expanduser())] if self.key else []
        flags = [part for setting in settings for part in ("-o", setting)]
        return ["ssh", *key, *flags, *options, f"{self.user}@{self.address}"]


@dataclass(frozen=True)
class ClusterUrls:
    """URLs on this machine that lead to a cluster's web pages."""

    dashboard: str
    mlflow: str


def read_launcher_file(file: Path) -> dict[str, Any]:
    """Read a file for `ray up`. Raises SpecError if required keys are missing."""
    config = read_yaml(file)
    provider = config.get("provider")
    missing = [key for key in ("cluster_name", "provider", "auth") if key not in config]
    if missing:
        raise SpecError(f"{file}: not a cluster for `ray up`, has no {missing[0]!r}")
    if not isinstance(provider, Mapping) or not isinstance(provider.get("type"), str):
        raise SpecError("provider.type: is required")
    return config


def on_premises_targets(config: Mapping[str, Any]) -> dict[str, SshTarget]:
    """Private address -> SSH target of every host of provider `local`, the head first."""
    provider = config["provider"]
    auth = config["auth"]
    if "head_ip" not in provider:
        raise SpecError("provider.head_ip: is required")
    head = provider["head_ip"]
    workers = provider.get("worker_ips", [])
    reached_at = {head: provider.get("external_head_ip", head), **{ip: ip for ip in workers}}
    proxy_command = auth.get("ssh_proxy_command")
    key = auth.get("ssh_private_key")
    return {
        ip: SshTarget(str(address), auth["ssh_user"], key, proxy_command)
        for ip, address in reached_at.items()
    }


def head_target(file: Path) -> SshTarget:
    """The SSH target of the cluster's head, for which a cloud's API is asked.

    Raises ClusterError if there is no head, or the cloud does not answer.
    """
    config = read_launcher_file(file)
    if config["provider"]["type"] == "local":
        return next(iter(on_premises_targets(config).values()))
    noise = io.StringIO()  # Ray prints its progress
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            address, auth = find_head(file, read_yaml(file))
    except HeliostatError:
        raise
    except (Exception, SystemExit) as error:  # each provider raises exceptions of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(f"{config['cluster_name']}: no head: {reason}") from error
    key, proxy_command = auth["ssh_private_key"], auth.get("ssh_proxy_command")
    return SshTarget(address, auth["ssh_user"], key, proxy_command)


@contextlib.contextmanager
def tunnel(file: Path, dashboard_port: int = 0, mlflow_port: int = 0) -> Iterator[ClusterUrls]:
    """Forward local ports to the web pages of the cluster of `file`; 0 stands for a free port.

    Raises ClusterError if SSH to the head fails or a given port is taken.
    """
    with tunnel_to(head_target(file), dashboard_port, mlflow_port) as urls:
        yield urls


@contextlib.contextmanager
def tunnel_to(
    target: SshTarget, dashboard_port: int = 0, mlflow_port: int = 0
) -> Iterator[ClusterUrls]:
    """As `tunnel`, for a head whose SSH target is known."""
    asked = run_on_node(target, f"cat {MLFLOW_URI_FILE} 2>/dev/null || true")
    if asked.returncode == SSH_FAILED:
        raise ClusterError(f"ssh to {target.address}: {_last_line(asked.stdout)}")
    mlflow = asked.stdout.strip().removeprefix("http://") or "localhost:5000"
    local_ports = {
        f"localhost:{DASHBOARD_PORT}": dashboard_port or _free_port(),
        mlflow: mlflow_port or _free_port(),
    }
    forwards = [
        part
        for remote, port in local_ports.items()
        for part in ("-L", f"127.0.0.1:{port}:{remote}")
    ]
    with tempfile.TemporaryFile("w+") as errors:
        ssh = subprocess.Popen(
            # `cat` ends with its input, and thus with this process, however that ends.
            [*target.command("-o", "ExitOnForwardFailure=yes", *forwards), "cat >/dev/null"],
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            start_new_session=True,  # Ctrl-C must not end the tunnel before we have used it
        )
        try:
            while not all(_is_listening(port) for port in local_ports.values()):
                if ssh.poll() is not None:
                    errors.seek(0)
                    raise ClusterError(f"ssh to {target.address}: {_last_line(errors.read())}")
                time.sleep(0.05)
            yield ClusterUrls(*(f"http://127.0.0.1:{port}" for port in local_ports.values()))
        finally:
            ssh.terminate()
            ssh.wait()


def run_on_node(
    target: SshTarget, script: str, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a line of bash on a node. Exit code `SSH_FAILED` means that there was no connection."""
    try:
        return subprocess.run(
            [*target.command(), script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            script, SSH_FAILED, f"no answer within {timeout_s:.0f} s"
        )


def _is_listening(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(text: str) -> str:
    return (text.strip() or "ended without a message").splitlines()[-1]
