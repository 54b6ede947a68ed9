"""Checks of who gets in: open ports, Ray's token, local keys and files, the clouds' credentials."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.definition.launcher_config import LauncherConfig, shell_commands
from cluster.definition.shell_commands import SSH_INGRESS_PROGRAM

OPEN_NETWORKS = ("0.0.0.0/0", "::/0")


def check_open_ports(config: LauncherConfig) -> Iterator[str]:
    """Firewall rules and servers that let in everybody."""
    group = config["provider"].get("security_group", {})
    for number, rule in enumerate(group.get("IpPermissions", [])):
        for source in [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]:
            network = source.get("CidrIp") or source.get("CidrIpv6")
            if network in OPEN_NETWORKS:
                path = f"provider.security_group.IpPermissions.{number}"
                port = rule.get("FromPort", "all")
                yield f"{path}: port {port} is open to the world ({network})"
    if config["provider"]["type"] == "aws":
        yield from _check_aws_ssh(config)
    for path, command in shell_commands(config):
        for option, value in re.findall(r"(--(?:dashboard-)?host)[= ](\S+)", command):
            if value.strip("\"'") in ("0.0.0.0", "::"):
                yield f"{path}: {option} {value} listens to the world; loopback needs a tunnel"
        if "--disable-security-middleware" in command or "--allowed-hosts '*'" in command:
            yield f"{path}: MLflow takes requests for any host"


def _check_aws_ssh(config: LauncherConfig) -> Iterator[str]:
    """Ray lets SSH in from everywhere into each group that it makes, whatever the file says."""
    node_types = config["available_node_types"].values()
    if all("SecurityGroupIds" in node_type["node_config"] for node_type in node_types):
        return
    if not any(SSH_INGRESS_PROGRAM in command for command in config["head_setup_commands"]):
        yield (
            "head_setup_commands: Ray's launcher opens port 22 to the world; add "
            f"`python -m {SSH_INGRESS_PROGRAM} --group NAME --region REGION`"
        )


def check_token(config: LauncherConfig) -> Iterator[str]:
    """Whether Ray asks for the token, and each host gets it."""
    for path, command in shell_commands(config):
        if "ray start" in command and "RAY_AUTH_MODE=token" not in command:
            yield f"{path}: starts Ray without RAY_AUTH_MODE=token, so that anybody may run code"
    if not any(str(target).endswith(".ray/auth_token") for target in config["file_mounts"]):
        yield "file_mounts: lacks ~/.ray/auth_token, without which no node gets in"


def check_local_files(config: LauncherConfig) -> Iterator[str]:
    """SSH keys and sources of `file_mounts` that are missing or readable by others."""
    auth = config.get("auth", {})
    for key in ("ssh_private_key", "ssh_public_key"):
        path = Path(auth.get(key, "/")).expanduser()
        if not path.exists():
            yield f"auth.{key}: there is no {path}"
        elif key == "ssh_private_key" and path.is_file() and path.stat().st_mode & 0o077:
            yield f"auth.{key}: others may read {path}, so that ssh refuses it; chmod 600"
    for target, source in config.get("file_mounts", {}).items():
        made_by_up = str(source).endswith(".ray/auth_token")
        if not made_by_up and not Path(source).expanduser().exists():
            yield f"file_mounts.{target}: there is no {source}"


def check_credentials(config: LauncherConfig) -> Iterator[str]:
    """Whether this machine has credentials for the cloud."""
    provider = config["provider"]["type"]
    if provider == "aws":
        session = aws_session()
        if session is None:
            yield "provider: boto3 is not installed, which Ray needs for AWS: pip install boto3"
        elif session.get_credentials() is None:
            yield "provider: no credentials for AWS: `aws configure`, or AWS_PROFILE"
    elif provider == "gcp":
        file = os.environ.get(
            "GOOGLE_APPLICATION_CREDENTIALS",
            "~/.config/gcloud/application_default_credentials.json",
        )
        if not Path(file).expanduser().is_file():
            yield (
                "provider: no credentials for Google Cloud: `gcloud auth application-default "
                "login`, or GOOGLE_APPLICATION_CREDENTIALS"
            )
    elif provider == "azure" and not Path("~/.azure/azureProfile.json").expanduser().is_file():
        yield "provider: no credentials for Azure: `az login`"


def aws_session() -> Any:
    """A boto3 session with Ray's settings; None where boto3 is not installed."""
    try:
        import boto3
    except ImportError:
        return None
    return boto3.Session()
