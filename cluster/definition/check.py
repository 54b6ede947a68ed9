"""What is wrong with a file for Ray's launcher, found before any money is spent.

One line per finding, which begins with the place in the file. Nothing is started, and no cloud is
asked anything but AWS, where there are credentials for it: whether the region has the instances.
"""

import contextlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.base.config import did_you_mean, read_yaml
from cluster.base.errors import SpecError
from cluster.base.labels import INSTANCE, MARKET, ON_DEMAND, PROVIDER, REGION, SPOT
from cluster.cost.catalog import instances, ray_resource
from cluster.definition.hourly_cost import PricedNodeType, hourly_cost_lines, priced_node_types

MIN_DISK_GB = 40
"""For the system, an environment with CUDA's libraries, what Ray spills, and a few checkpoints."""
OPEN_NETWORKS = ("0.0.0.0/0", "::/0")
PLACEHOLDERS = re.compile(
    r"ami-0{17}|203\.0\.113\.\d+|192\.0\.2\.\d+|198\.51\.100\.\d+|my-project|my-bucket|"
    r"registry\.example\.com"
)
"""Values of the rendered files that are nobody's, by the standards for examples."""

_CONSTRAINTS = re.compile(r"pip install[^;&|]*? (?:-c|--constraint)[ =](\S+)")

LauncherConfig = Mapping[str, Any]
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@dataclass(frozen=True)
class CheckReport:
    findings: list[str]
    prices: list[str]


def check_file(path: Path) -> CheckReport:
    """All findings of a file, and what its cluster costs an hour.

    Raises SpecError if it cannot be read or is none of the launcher's.
    """
    if path.is_file() and re.search(r"(?m)^apiVersion:", path.read_text(errors="replace")):
        raise SpecError(f"{path}: for Kubernetes: ask `kubectl apply --dry-run=server -f {path}`")
    config = read_yaml(path)
    if not isinstance(config.get("provider"), Mapping) or "type" not in config["provider"]:
        raise SpecError(f"{path}: not a file for Ray's launcher, it has no provider.type")
    wrong = list(_schema(config))
    if wrong:  # the rest relies on its shape
        return CheckReport(wrong, [])
    prepared = _prepared(config)
    looks: list[Callable[[LauncherConfig], Iterator[str]]] = [
        _placeholders,
        _instances,
        _labels,
        _places,
        _disks,
        _versions,
        _open_doors,
        _files,
        _credentials,
    ]
    return CheckReport(
        [line for look in looks for line in look(prepared)], hourly_cost_lines(prepared)
    )


def _prepared(config: LauncherConfig) -> dict[str, Any]:
    """With the launcher's own defaults, which is what would be run."""
    from ray.autoscaler._private.util import prepare_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    prepared: dict[str, Any] = prepare_config(dict(config))
    # Ray puts the common commands before those of head and workers, which would tell them thrice.
    for key in ("head_setup_commands", "worker_setup_commands"):
        prepared[key] = prepared[key][len(prepared["setup_commands"]) :]
    return prepared


def _schema(config: LauncherConfig) -> Iterator[str]:
    """The first thing that Ray's own schema and rules do not let pass."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import validate_config

    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
            prepared = _prepared(config)
        head = prepared.get("head_node_type")
        validate_config(prepared)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.absolute_path) or "the file"
        yield f"{place}: {error.message.splitlines()[0][:200]}"
        return
    except (SystemExit, ValueError, RuntimeError, KeyError, AssertionError, OSError) as error:
        said = (str(error) or noise.getvalue()).strip().splitlines() or ["no reason given"]
        yield f"provider: Ray refuses the file: {said[-1][:200]}"
        return
    for title, kind in prepared["available_node_types"].items():
        if title != head and kind["min_workers"] > kind["max_workers"]:
            yield (
                f"available_node_types.{title}.min_workers: must be at most max_workers "
                f"(got {kind['min_workers']} of {kind['max_workers']})"
            )


def _placeholders(config: LauncherConfig) -> Iterator[str]:
    for place, value in _leaves(config):
        found = PLACEHOLDERS.search(_without_comments(value))
        if found:
            yield f"{place}: still the example's {found[0]}"


def _instances(config: LauncherConfig) -> Iterator[str]:
    """Types that do not exist, and resources that they do not have."""
    kind = config["provider"]["type"]
    for offer in priced_node_types(config):
        if offer.catalog_entry is None:
            names = [it.name for it in instances() if it.provider == kind]
            near = did_you_mean(offer.instance, names)
            near = near if "mean" in near else f" (it has {len(names)} of {kind})"
            yield f"{offer.path}: {offer.instance!r} is not in the catalogue{near}"
            continue
        yield from _resources(config, offer)


def _resources(config: LauncherConfig, offer: PricedNodeType) -> Iterator[str]:
    known = offer.catalog_entry
    assert known is not None
    asked = config["available_node_types"][offer.name].get("resources", {})
    place = f"available_node_types.{offer.name}.resources"
    if asked.get("CPU", 0) > known.vcpus:
        yield f"{place}.CPU: {asked['CPU']}, but {known.name} has {known.vcpus:g}"
    device = ray_resource(known.ray_accelerator_type) if known.accelerators else "GPU"
    had = known.accelerators
    if asked and asked.get(device, 0) != had and (asked.get("CPU") or asked.get(device)):
        yield f"{place}.{device}: {asked.get(device, 0)}, but {known.name} has {had}"
    memory = asked.get("memory", 0) + asked.get("object_store_memory", 0)
    if memory > known.memory_bytes:
        yield (
            f"{place}.memory: {memory / 2**30:.1f} GiB, but {known.name} has "
            f"{known.memory_bytes / 2**30:.1f}"
        )


def _labels(config: LauncherConfig) -> Iterator[str]:
    """What nodes would say of themselves, and be billed by, against what is asked for."""
    provider = config["provider"]
    region = provider.get("region") or provider.get("location")
    for offer in priced_node_types(config):
        labels = config["available_node_types"][offer.name].get("labels", {})
        asked = {
            PROVIDER: provider["type"],
            REGION: region,
            INSTANCE: offer.instance,
            MARKET: SPOT if offer.spot else ON_DEMAND,
        }
        for label, value in asked.items():
            said = labels.get(label, value)
            if said != value:
                place = f"available_node_types.{offer.name}.labels.{label}"
                yield f"{place}: {said}, but {value} is asked for"


def _places(config: LauncherConfig) -> Iterator[str]:
    """Zones outside their region, and types that a region does not have."""
    provider = config["provider"]
    zones = str(provider.get("availability_zone", "")).split(",")
    if provider["type"] in ("aws", "gcp"):
        for zone in zones:
            if zone.strip() and not zone.strip().startswith(provider["region"]):
                yield f"provider.availability_zone: {zone.strip()} is not in {provider['region']}"
    if provider["type"] == "aws":
        yield from _aws_region(config)


def _aws_region(config: LauncherConfig) -> Iterator[str]:
    session = _aws_session()
    if session is None:
        return
    region = config["provider"]["region"]
    if not any(region in session.get_available_regions("ec2", it) for it in _PARTITIONS):
        yield f"provider.region: AWS has no region {region!r}"
        return
    wanted = {offer.instance: offer.path for offer in priced_node_types(config) if offer.instance}
    if session.get_credentials() is None:
        return
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = session.client("ec2", region_name=region).describe_instance_type_offerings(
            LocationType="region",
            Filters=[{"Name": "instance-type", "Values": sorted(wanted)}],
        )
    except (BotoCoreError, ClientError) as error:
        yield f"provider: AWS does not answer: {str(error).splitlines()[0]}"
        return
    there = {each["InstanceType"] for each in answer["InstanceTypeOfferings"]}
    for name in sorted(wanted.keys() - there):
        yield f"{wanted[name]}: {region} has no {name}"


_PARTITIONS = ("aws", "aws-us-gov", "aws-cn")


def _disks(config: LauncherConfig) -> Iterator[str]:
    if config["provider"]["type"] == "local":
        return
    for title, kind in config["available_node_types"].items():
        place, size = _disk(kind["node_config"])
        where = f"available_node_types.{title}.node_config.{place}"
        if size is None:
            yield f"{where}: none given, the image's own is small; at least {MIN_DISK_GB} GB"
        elif size < MIN_DISK_GB:
            yield f"{where}: {size} GB, needs at least {MIN_DISK_GB}"


def _disk(node: LauncherConfig) -> tuple[str, int | None]:
    """Where the size of the first disk stands, and what it is."""
    if "azure_arm_parameters" in node:
        size = node["azure_arm_parameters"].get("osDiskSize")
        return "azure_arm_parameters.osDiskSize", size
    if "machineType" in node:
        for disk in node.get("disks", [])[:1]:
            return "disks.0.initializeParams.diskSizeGb", disk["initializeParams"].get("diskSizeGb")
        return "disks", None
    for disk in node.get("BlockDeviceMappings", [])[:1]:
        return "BlockDeviceMappings.0.Ebs.VolumeSize", disk.get("Ebs", {}).get("VolumeSize")
    return "BlockDeviceMappings", None


def _versions(config: LauncherConfig) -> Iterator[str]:
    """What the commands would install, against what is installed here."""
    for place, command in _commands(config):
        if "dev0" in command or "nightly" in command:
            yield f"{place}: installs a nightly build of Ray, one of the launcher's defaults"
        for name, wanted in re.findall(r"\b([A-Za-z][\w.-]*)(?:\[[\w,]+\])?==([\w.+]+)", command):
            yield from _differs(place, name, wanted)
        for file in re.findall(_CONSTRAINTS, command):
            local = _local_path(config, file)
            if local is None or not local.is_file():
                yield f"{place}: {file} is not among file_mounts"
                continue
            for line in local.read_text(encoding="utf-8").splitlines():
                name, equals, wanted = line.partition("#")[0].strip().partition("==")
                if equals:
                    yield from _differs(f"{place}: {local}", name, wanted)


def _differs(place: str, name: str, wanted: str) -> Iterator[str]:
    """Packages that are not installed here cannot differ."""
    with contextlib.suppress(PackageNotFoundError):
        here = version(name)
        if here.partition("+")[0] != wanted.partition("+")[0]:
            yield f"{place}: {name} {wanted} there, but {here} here"


def _local_path(config: LauncherConfig, remote: str) -> Path | None:
    """Where a file on the hosts comes from, by file_mounts."""
    for there, here in config.get("file_mounts", {}).items():
        if remote == there or remote.startswith(f"{there}/"):
            return Path(here).expanduser() / remote[len(there) :].lstrip("/")
    return None


def _open_doors(config: LauncherConfig) -> Iterator[str]:
    group = config["provider"].get("security_group", {})
    for number, rule in enumerate(group.get("IpPermissions", [])):
        ranges = [*rule.get("IpRanges", []), *rule.get("Ipv6Ranges", [])]
        for each in ranges:
            network = each.get("CidrIp") or each.get("CidrIpv6")
            if network in OPEN_NETWORKS:
                place = f"provider.security_group.IpPermissions.{number}"
                port = rule.get("FromPort", "all")
                yield f"{place}: port {port} is open to the world ({network})"
    if config["provider"]["type"] == "aws":
        yield from _ssh_of_launcher(config)
    said = dict(_commands(config))
    for place, command in said.items():
        for option, value in re.findall(r"(--(?:dashboard-)?host)[= ](\S+)", command):
            if value.strip("\"'") in ("0.0.0.0", "::"):
                yield f"{place}: {option} {value} listens to the world; loopback needs a tunnel"
        if "--disable-security-middleware" in command or "--allowed-hosts '*'" in command:
            yield f"{place}: MLflow takes requests for any host"
        if "ray start" in command and "RAY_AUTH_MODE=token" not in command:
            yield f"{place}: starts Ray without RAY_AUTH_MODE=token, so that anybody may run code"
    if not any(str(path).endswith(".ray/auth_token") for path in config["file_mounts"]):
        yield "file_mounts: lacks ~/.ray/auth_token, without which no node gets in"


def _ssh_of_launcher(config: LauncherConfig) -> Iterator[str]:
    """Ray lets SSH in from everywhere into each group that it makes, whatever the file says."""
    types = config["available_node_types"].values()
    if all("SecurityGroupIds" in kind["node_config"] for kind in types):
        return
    if not any(
        "cluster.lifecycle.aws_ssh_ingress" in command for command in config["head_setup_commands"]
    ):
        yield (
            "head_setup_commands: Ray's launcher opens port 22 to the world; add "
            "`python -m cluster.lifecycle.aws_ssh_ingress --group NAME --region REGION`"
        )


def _files(config: LauncherConfig) -> Iterator[str]:
    auth = config.get("auth", {})
    for key in ("ssh_private_key", "ssh_public_key"):
        path = Path(auth.get(key, "/")).expanduser()
        if not path.exists():
            yield f"auth.{key}: there is no {path}"
        elif key == "ssh_private_key" and path.is_file() and path.stat().st_mode & 0o077:
            yield f"auth.{key}: others may read {path}, so that ssh refuses it; chmod 600"
    for there, here in config.get("file_mounts", {}).items():
        made = str(here).endswith(".ray/auth_token")  # by `heliostat up`
        if not made and not Path(here).expanduser().exists():
            yield f"file_mounts.{there}: there is no {here}"


def _credentials(config: LauncherConfig) -> Iterator[str]:
    kind = config["provider"]["type"]
    if kind == "aws":
        session = _aws_session()
        if session is None:
            yield "provider: boto3 is not installed, which Ray needs for AWS: pip install boto3"
        elif session.get_credentials() is None:
            yield "provider: no credentials for AWS: `aws configure`, or AWS_PROFILE"
    elif kind == "gcp":
        places = (Path("~/.config/gcloud/application_default_credentials.json"),)
        if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
            places = (Path(os.environ["GOOGLE_APPLICATION_CREDENTIALS"]),)
        if not any(place.expanduser().is_file() for place in places):
            yield (
                "provider: no credentials for Google Cloud: `gcloud auth application-default "
                "login`, or GOOGLE_APPLICATION_CREDENTIALS"
            )
    elif kind == "azure" and not Path("~/.azure/azureProfile.json").expanduser().is_file():
        yield "provider: no credentials for Azure: `az login`"


def _aws_session() -> Any:
    """boto3's, as Ray would use it; None where it is not installed."""
    try:
        import boto3
    except ImportError:
        return None
    return boto3.Session()


def _commands(config: LauncherConfig) -> Iterator[tuple[str, str]]:
    """Every shell command with its place, without comments."""
    for key in _COMMANDS:
        for number, command in enumerate(config.get(key, [])):
            yield f"{key}.{number}", _without_comments(command)


def _without_comments(command: str) -> str:
    return re.sub(r"(?m)^\s*#.*$", "", command)


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{place}.{number}")
    elif isinstance(value, str):
        yield place, value
