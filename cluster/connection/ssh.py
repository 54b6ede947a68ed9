"""The way into a cluster: SSH to its head, and through it to the dashboard and to MLflow.

Both listen where nobody outside reaches them, so each verb that needs them opens a tunnel for as
long as it lasts.
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

DASHBOARD_PORT = 8265
MLFLOW_URI_FILE = "~/.heliostat/mlflow_uri"
"""Where the head says at which of its addresses MLflow listens."""

CONNECT_TIMEOUT_S = 20


@dataclass(frozen=True)
class SshTarget:
    """How a node is entered by SSH."""

    address: str
    user: str
    key: str | None
    proxy_command: str | None = None
    """A command that connects to the node where it cannot be reached directly."""

    def command(self, *options: str) -> list[str]:
        """An ssh command to the node, up to where the remote command would stand."""
        # A machine that is replaced has another key at the same address.
        settings = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        settings += [
            "BatchMode=yes",
            f"ConnectTimeout={CONNECT_TIMEOUT_S}",
            "ServerAliveInterval=15",
        ]
        if self.key:
            settings.append("IdentitiesOnly=yes")
        if self.proxy_command:
            settings.append(f"ProxyCommand={self.proxy_command}")
        key = ["-i", str(Path(self.key).expanduser())] if self.key else []
        pairs = [part for setting in settings for part in ("-o", setting)]
        return ["ssh", *key, *pairs, *options, f"{self.user}@{self.address}"]


@dataclass(frozen=True)
class ClusterUrls:
    """Where a cluster's pages are on this machine."""

    dashboard: str
    mlflow: str


def read_launcher_file(file: Path) -> dict[str, Any]:
    """A file for `ray up`. Raises SpecError unless it looks like one."""
    config = read_yaml(file)
    provider = config.get("provider")
    missing = [key for key in ("cluster_name", "provider", "auth") if key not in config]
    if missing:
        raise SpecError(f"{file}: not a cluster for `ray up`, has no {missing[0]!r}")
    if not isinstance(provider, Mapping) or not isinstance(provider.get("type"), str):
        raise SpecError("provider.type: is required")
    return config


def on_premises_targets(config: Mapping[str, Any]) -> dict[str, SshTarget]:
    """The doors of all hosts of provider `local` by private address, the head's first."""
    provider = config["provider"]
    auth = config["auth"]
    if "head_ip" not in provider:
        raise SpecError("provider.head_ip: is required")
    outside = provider.get("external_head_ip", provider["head_ip"])
    places = {provider["head_ip"]: outside, **{ip: ip for ip in provider.get("worker_ips", [])}}
    proxy = auth.get("ssh_proxy_command")
    key = auth.get("ssh_private_key")
    return {ip: SshTarget(str(to), auth["ssh_user"], key, proxy) for ip, to in places.items()}


def head_target(file: Path) -> SshTarget:
    """The door of the head, which in a cloud the provider is asked for.

    Raises ClusterError if the provider knows of none, or cannot be asked.
    """
    config = read_launcher_file(file)
    if config["provider"]["type"] == "local":
        return next(iter(on_premises_targets(config).values()))
    from ray.autoscaler import sdk

    noise = io.StringIO()  # Ray tells the terminal what it does
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            auth = sdk.bootstrap_config(read_yaml(file))["auth"]
            address = sdk.get_head_node_ip(str(file))
    except HeliostatError:
        raise
    except (Exception, SystemExit) as error:  # each provider has exceptions of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(f"{config['cluster_name']}: no head: {reason}") from error
    return SshTarget(
        address, auth["ssh_user"], auth["ssh_private_key"], auth.get("ssh_proxy_command")
    )


@contextlib.contextmanager
def tunnel(file: Path, dashboard_port: int = 0, mlflow_port: int = 0) -> Iterator[ClusterUrls]:
    """Open a way to the pages of the cluster of `file`, on free ports or on the given ones.

    Raises ClusterError if the head does not let us in or a given port is taken.
    """
    with tunnel_to(head_target(file), dashboard_port, mlflow_port) as urls:
        yield urls


@contextlib.contextmanager
def tunnel_to(
    target: SshTarget, dashboard_port: int = 0, mlflow_port: int = 0
) -> Iterator[ClusterUrls]:
    """As `tunnel`, for a head whose door is known."""
    asked = run_on_node(target, f"cat {MLFLOW_URI_FILE} 2>/dev/null || true")
    if asked.returncode == 255:
        raise ClusterError(f"ssh to {target.address}: {_last_line(asked.stdout)}")
    mlflow = asked.stdout.strip().removeprefix("http://") or "localhost:5000"
    ports = {
        f"localhost:{DASHBOARD_PORT}": dashboard_port or _free_port(),
        mlflow: mlflow_port or _free_port(),
    }
    forwards = [
        part for there, here in ports.items() for part in ("-L", f"127.0.0.1:{here}:{there}")
    ]
    with tempfile.TemporaryFile("w+") as errors:
        ssh = subprocess.Popen(
            # It ends with its input, and so with us, however we end.
            [*target.command("-o", "ExitOnForwardFailure=yes", *forwards), "cat >/dev/null"],
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            start_new_session=True,  # Ctrl-C is for us, who still need the tunnel to tell it
        )
        try:
            while not all(_is_listening(port) for port in ports.values()):
                if ssh.poll() is not None:
                    errors.seek(0)
                    raise ClusterError(f"ssh to {target.address}: {_last_line(errors.read())}")
                time.sleep(0.05)
            yield ClusterUrls(*(f"http://127.0.0.1:{port}" for port in ports.values()))
        finally:
            ssh.terminate()
            ssh.wait()


def run_on_node(
    target: SshTarget, script: str, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a line of bash on a node. An exit code of 255 is ssh's own: nobody let us in."""
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
        return subprocess.CompletedProcess(script, 255, f"no answer within {timeout_s:.0f} s")


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
    return (text.strip() or "ended without a word").splitlines()[-1]
