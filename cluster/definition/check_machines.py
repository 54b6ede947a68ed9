"""Checks of a launcher file's machines: instances, resources, labels, zones and disks."""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.base.config import did_you_mean
from cluster.base.labels import INSTANCE, MARKET, ON_DEMAND, PROVIDER, REGION, SPOT
from cluster.cost.catalog import instances, is_in_region, ray_resource
from cluster.definition.check_access import aws_session
from cluster.definition.hourly_cost import PricedNodeType, priced_node_types
from cluster.definition.launcher_config import LauncherConfig

MIN_DISK_GB = 40
"""Holds the system, an environment with CUDA's libraries, what Ray spills and a few checkpoints."""
_AWS_PARTITIONS = ("aws", "aws-us-gov", "aws-cn")


def check_instances(config: LauncherConfig) -> Iterator[str]:
    """Instance types that do not exist, and resources that an instance does not have."""
    provider = config["provider"]["type"]
    for node_type in priced_node_types(config):
        if node_type.catalog_entry is None:
            names = [it.name for it in instances() if it.provider == provider]
            near = did_you_mean(node_type.instance, names)
            near = near if "mean" in near else f" (it has {len(names)} of {provider})"
            yield f"{node_type.path}: {node_type.instance!r} is not in the catalogue{near}"
            continue
        yield from _check_resources(config, node_type)


def _check_resources(config: LauncherConfig, node_type: PricedNodeType) -> Iterator[str]:
    instance = node_type.catalog_entry
    assert instance is not None
    asked = config["available_node_types"][node_type.name].get("resources", {})
    path = f"available_node_types.{node_type.name}.resources"
    if asked.get("CPU", 0) > instance.vcpus:
        yield f"{path}.CPU: {asked['CPU']}, but {instance.name} has {instance.vcpus:g}"
    device = ray_resource(instance.ray_accelerator_type) if instance.accelerators else "GPU"
    count = instance.accelerators
    if asked and asked.get(device, 0) != count and (asked.get("CPU") or asked.get(device)):
        yield f"{path}.{device}: {asked.get(device, 0)}, but {instance.name} has {count}"
    memory = asked.get("memory", 0) + asked.get("object_store_memory", 0)
    if memory > instance.memory_bytes:
        yield (
            f"{path}.memory: {memory / 2**30:.1f} GiB, but {instance.name} has "
            f"{instance.memory_bytes / 2**30:.1f}"
        )


def check_labels(config: LauncherConfig) -> Iterator[str]:
    """Labels that contradict the file: nodes are priced by their labels."""
    provider = config["provider"]
    region = provider.get("region") or provider.get("location")
    for node_type in priced_node_types(config):
        labels = config["available_node_types"][node_type.name].get("labels", {})
        asked = {
            PROVIDER: provider["type"],
            REGION: region,
            INSTANCE: node_type.instance,
            MARKET: SPOT if node_type.spot else ON_DEMAND,
        }
        for label, value in asked.items():
            labelled = labels.get(label, value)
            if labelled != value:
                path = f"available_node_types.{node_type.name}.labels.{label}"
                yield f"{path}: {labelled}, but {value} is asked for"


def check_zones(config: LauncherConfig) -> Iterator[str]:
    """Zones outside their region, and instance types that a region of AWS does not have."""
    provider = config["provider"]
    if provider["type"] in ("aws", "gcp"):
        for zone in str(provider.get("availability_zone", "")).split(","):
            if zone.strip() and not is_in_region(zone.strip(), provider["region"]):
                yield f"provider.availability_zone: {zone.strip()} is not in {provider['region']}"
    if provider["type"] == "aws":
        yield from _check_aws_region(config)


def _check_aws_region(config: LauncherConfig) -> Iterator[str]:
    session = aws_session()
    if session is None:
        return
    region = config["provider"]["region"]
    if not any(region in session.get_available_regions("ec2", it) for it in _AWS_PARTITIONS):
        yield f"provider.region: AWS has no region {region!r}"
        return
    if session.get_credentials() is None:
        return
    paths = {it.instance: it.path for it in priced_node_types(config) if it.instance}
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        answer = session.client("ec2", region_name=region).describe_instance_type_offerings(
            LocationType="region",
            Filters=[{"Name": "instance-type", "Values": sorted(paths)}],
        )
    except (BotoCoreError, ClientError) as error:
        yield f"provider: AWS does not answer: {str(error).splitlines()[0]}"
        return
    offered = {each["InstanceType"] for each in answer["InstanceTypeOfferings"]}
    for name in sorted(paths.keys() - offered):
        yield f"{paths[name]}: {region} has no {name}"


def check_disks(config: LauncherConfig) -> Iterator[str]:
    """First disks that are too small."""
    if config["provider"]["type"] == "local":
        return
    for name, node_type in config["available_node_types"].items():
        key, size_gb = _first_disk(node_type["node_config"])
        path = f"available_node_types.{name}.node_config.{key}"
        if size_gb is None:
            yield f"{path}: none given, the image's own is small; at least {MIN_DISK_GB} GB"
        elif size_gb < MIN_DISK_GB:
            yield f"{path}: {size_gb} GB, needs at least {MIN_DISK_GB}"


def _first_disk(node: Mapping[str, Any]) -> tuple[str, int | None]:
    """The dotted path of the first disk's size within `node_config`, and the size."""
    if "azure_arm_parameters" in node:
        size_gb = node["azure_arm_parameters"].get("osDiskSize")
        return "azure_arm_parameters.osDiskSize", size_gb
    if "machineType" in node:
        for disk in node.get("disks", [])[:1]:
            return "disks.0.initializeParams.diskSizeGb", disk["initializeParams"].get("diskSizeGb")
        return "disks", None
    for disk in node.get("BlockDeviceMappings", [])[:1]:
        return "BlockDeviceMappings.0.Ebs.VolumeSize", disk.get("Ebs", {}).get("VolumeSize")
    return "BlockDeviceMappings", None
