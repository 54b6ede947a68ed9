"""The hosts' shell commands, run by bash with fake programs that log how they were called."""

import copy
import hashlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import read_yaml, validate
from cluster.definition import shell_commands
from cluster.definition.commented_yaml import ShellCommand
from cluster.definition.spec import SHIPPED_SPEC, ClusterSpec, Provider

RAY = """#!/bin/bash
told=$(env | grep -E '^(RAY_|MLFLOW_|AUTOSCALER_|HELIOSTAT_)' | sort | tr '\\n' ' ')
echo "ray $* $told" >> ~/said
[ "$1" = start ] || exit 0
touch ~/runs.raylet; [ "$2" = --head ] && touch ~/runs.gcs_server; exit ${RAY_FAILS:-0}
"""
PGREP = """#!/bin/bash
for name in ${4//|/ }; do [ -e ~/runs.$name ] && exit 0; done; exit 1
"""
NOTE = """#!/bin/bash
echo "$(basename $0) $* $(env | grep -E '^(MLFLOW_|HELIOSTAT_)' | sort | tr '\\n' ' ')" >> ~/said
"""
PYTHON = NOTE.replace(
    "\n", '\n[ "$2" = cluster.session.forked ] && [ "$3" = ray ] && exec ray "${@:4}"\n', 1
)
MLFLOW = NOTE.replace("\n", "\necho $$ > ~/server.pid\n", 1) + "exec sleep 120\n"


class Host:
    """A home folder in which commands run as Ray's launcher would run them on a host."""

    def __init__(self, home: Path) -> None:
        self.home = home
        programs = home / "venv" / "bin"
        programs.mkdir(parents=True)
        for name, text in {"ray": RAY, "pgrep": PGREP, "mlflow": MLFLOW, "python": PYTHON}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("secret\n")
        (home / "ray_bootstrap_config.yaml").write_text('{"provider": {"head_ip": "127.0.0.1"}}')
        self.environment = {
            "HOME": str(home),
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RAY_HEAD_IP": "127.0.0.1",
        }

    def run(self, lines: list[ShellCommand], **environment: str) -> int:
        """The exit code of the first command that fails, or 0."""
        for line in lines:
            done = subprocess.run(
                ["bash", "-c", f"({line})"],
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert "syntax error" not in done.stderr
            if done.returncode:
                return done.returncode
        return 0

    def said(self, word: str) -> list[str]:
        """The log lines of the fake programs that contain this word."""
        path = self.home / "said"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if word in line]


@pytest.fixture
def host(tmp_path: Path) -> Any:
    host = Host(tmp_path)
    yield host
    if (tmp_path / "server.pid").exists():
        os.kill(int((tmp_path / "server.pid").read_text()), signal.SIGKILL)


def spec(**changes: Any) -> ClusterSpec:
    data = copy.deepcopy(read_yaml(SHIPPED_SPEC))
    for section, change in changes.items():
        data[section] = {**data[section], **change} if isinstance(change, dict) else change
    data["kuberay"] = None
    return validate(ClusterSpec, data)


PROVIDERS: tuple[Provider, ...] = ("aws", "gcp", "azure", "local")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_running_programs_are_neither_started_twice_nor_stopped(
    host: Host, provider: Provider, wait_until: Callable[..., None]
) -> None:
    """As when another `up`, or a new head, runs the commands on live nodes."""
    head = shell_commands.head_start_commands(spec(metrics=True), provider)
    (host.home / ".heliostat").mkdir()
    for _ in range(2):
        assert host.run(head) == 0
        assert host.run(shell_commands.worker_start_commands(spec(), provider)) == 0
    wait_until(lambda: host.said("mlflow server") and host.said("cluster.node.prometheus_server"))
    assert len(host.said("ray start")) == 1
    assert host.said("ray stop") == []
    second = str(head[1]).rstrip().removesuffix("&")  # in the foreground: it ends at once
    assert host.run([ShellCommand([second])]) == 1
    assert len(host.said("mlflow server")) == 1


def test_the_rest_of_a_dead_head_is_stopped_first(host: Host) -> None:
    (host.home / ".heliostat").mkdir()
    (host.home / "runs.raylet").touch()
    assert host.run(shell_commands.head_start_commands(spec(), "aws")[:1]) == 0
    assert [line.split()[1] for line in host.said("ray ")] == ["stop", "start"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ray_asks_for_the_token_and_jobs_get_mlflows_address(
    host: Host, provider: Provider
) -> None:
    assert host.run(shell_commands.head_start_commands(spec(), provider)[:1]) == 0
    (host.home / "runs.raylet").unlink()
    assert host.run(shell_commands.worker_start_commands(spec(), provider)[:1]) == 0
    head, worker = host.said("ray start")
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_health_check_timeout_ms=2500" in head
    for line in (head, worker):
        assert "RAY_AUTH_MODE=token" in line
        assert "HELIOSTAT_CLUSTER=heliostat" in line
        assert "0.0.0.0" not in line
    assert "MLFLOW_TRACKING_URI=http://127.0.0.1:5000" in worker
    if provider == "local":
        assert "MLFLOW_TRACKING_URI=http://127.0.0.1:5000" in head
        assert "AUTOSCALER_HEARTBEAT_TIMEOUT_S=10" in head


def test_a_failed_start_is_hidden_on_own_hosts_and_reported_on_rented_ones(host: Host) -> None:
    """Ray's autoscaler never tries an own host again after a failed start."""
    assert host.run(shell_commands.worker_start_commands(spec(), "local"), RAY_FAILS="1") == 0
    (host.home / "runs.raylet").unlink()
    assert host.run(shell_commands.worker_start_commands(spec(), "aws")[:1], RAY_FAILS="1") == 1


def test_state_survives_the_head_on_a_disk_or_in_redis(host: Host) -> None:
    folder = host.home / "disk" / "state"
    assert host.run(shell_commands.head_start_commands(spec(state=str(folder)), "aws")[:1]) == 0
    assert folder.is_dir()
    line = host.said("ray start")[0]
    assert f"RAY_gcs_storage=rocksdb RAY_gcs_storage_path={folder}" in line
    worker = str(shell_commands.worker_start_commands(spec(state=str(folder)), "aws")[0])
    assert "RAY_gcs_rpc_server_reconnect_timeout_s=600" in worker
    redis = str(shell_commands.head_start_commands(spec(state="redis://db:6379"), "aws")[0])
    assert "RAY_REDIS_ADDRESS=db:6379 RAY_external_storage_namespace=heliostat" in redis
    assert "mkdir" not in redis


def test_mlflows_password_is_derived_from_the_token(
    host: Host, wait_until: Callable[..., None]
) -> None:
    (host.home / ".heliostat").mkdir()
    head = shell_commands.head_start_commands(spec(mlflow={"auth": True}), "local")
    assert host.run(head[:2]) == 0
    password = shell_commands.mlflow_password("secret")
    assert password == hashlib.sha256(b"mlflow:secret").hexdigest()[:32]
    assert f"MLFLOW_TRACKING_PASSWORD={password}" in host.said("ray start")[0]
    wait_until(lambda: host.said("mlflow server"))
    server = host.said("mlflow server")[0]
    assert f"MLFLOW_AUTH_ADMIN_PASSWORD={password}" in server
    assert "--app-name basic-auth" in server
    assert "--host 127.0.0.1" in server
    settings = (host.home / ".heliostat" / "mlflow" / "auth.ini").read_text()
    assert "default_permission = NO_PERMISSIONS\n" in settings
    assert password not in settings


def test_a_host_is_set_up_once(host: Host) -> None:
    lines = shell_commands.setup_commands(spec(setup="installed"), "local")
    (host.home / ".ray" / "auth_token").chmod(0o644)
    (host.home / ".bashrc").write_text("echo mine\n")
    for _ in range(2):
        assert host.run(lines) == 0
    shell = (host.home / ".bashrc").read_text()
    assert shell.count("RAY_AUTH_MODE=token") == 1
    assert shell.endswith("echo mine\n")
    assert (host.home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    install = " ".join(map(str, shell_commands.setup_commands(spec(), "aws")))
    assert "pip install -q -c ~/heliostat/constraints.txt ~/heliostat boto3" in install
    assert shell_commands.head_setup_commands(spec(), "gcp") == []
    assert "cluster.lifecycle.aws_ssh_ingress" in str(
        shell_commands.head_setup_commands(spec(), "aws")[0]
    )
