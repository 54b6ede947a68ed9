"""From the spec of a cluster to the file of Ray's launcher, for a cloud or hosts of one's own.

`render` gives text; every line that a user has to edit is marked EDIT.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from cluster.base.errors import SpecError
from cluster.base.labels import (
    FALLBACK_FOR,
    INSTANCE,
    MARKET,
    ON_DEMAND,
    PROVIDER,
    REGION,
    SPOT,
    USD_PER_HOUR,
)
from cluster.cost.catalog import Instance, find_instance
from cluster.definition import kuberay, shell_commands
from cluster.definition.commented_yaml import Noted, emit
from cluster.definition.spec import Cloud, ClusterSpec, NodeType, Provider

_EXCLUDED = [".git/**", ".venv/**", "runs/**", "mlartifacts/**", "mlflow.db", "**/__pycache__/**"]

_HEADING = """{what}, for `heliostat up FILE` or Ray's own `ray up FILE`.
Rendered by `heliostat cluster render --provider {provider}` from cluster/definition/launch/heliostat.yaml.
Lines marked EDIT are yours to change, here or there; then ask `heliostat cluster check FILE`.

All of Ray asks for the token of ~/.ray/auth_token, which `heliostat up` makes. The dashboard is
on the head's loopback and MLflow on its private address: `heliostat ui --cluster FILE` opens
tunnels to both."""


def render(spec: ClusterSpec, provider: Provider, job: bool = False) -> str:
    """The file for `provider`, on Kubernetes for one `job` if asked.

    Raises SpecError if the spec lacks what it needs.
    """
    if getattr(spec, provider) is None:
        raise SpecError(f"{provider}: this section is needed for provider {provider}")
    if provider == "kuberay":
        return kuberay.text(spec, job)
    what = {
        "aws": "A cluster on AWS",
        "gcp": "A cluster on Google Cloud",
        "azure": "A cluster on Azure",
        "local": "A cluster of hosts that you reach by SSH",
    }[provider]
    return emit(launcher(spec, provider), _HEADING.format(what=what, provider=provider))


def launcher(spec: ClusterSpec, provider: Provider) -> dict[str, Any]:
    """What the file for Ray's launcher says; `cluster.definition.commented_yaml.plain` makes plain data of it."""
    sections = {"aws": _aws, "gcp": _gcp, "azure": _azure, "local": _local}[provider](spec)
    mounts = {shell_commands.TOKEN: shell_commands.TOKEN}
    if spec.setup == "install":
        mounts = {shell_commands.PROJECT: "."} | mounts
    auth: dict[str, Any] = {"ssh_user": Noted(spec.ssh.user, "EDIT" if provider == "local" else "")}
    if spec.ssh.key is not None:
        auth["ssh_private_key"] = spec.ssh.key
        if provider == "azure":
            auth["ssh_public_key"] = f"{spec.ssh.key}.pub"
    return {
        "cluster_name": spec.name,
        **sections["sizes"],
        "idle_timeout_minutes": spec.idle_minutes,
        "provider": sections["provider"],
        "auth": auth,
        **sections["nodes"],
        "metadata": {"heliostat": _metadata(spec)},
        "file_mounts": mounts,
        "rsync_exclude": _EXCLUDED if spec.setup == "install" else [],
        "initialization_commands": [],
        "setup_commands": shell_commands.setup(spec, provider),
        "head_setup_commands": shell_commands.head_setup(spec, provider),
        "worker_setup_commands": [],
        "head_start_ray_commands": shell_commands.head_start(spec, provider),
        "worker_start_ray_commands": shell_commands.worker_start(spec, provider),
    }


def _metadata(spec: ClusterSpec) -> dict[str, Any]:
    """What our own verbs and the head's programs read here; Ray leaves it alone."""
    return {"mlflow_port": spec.mlflow.port, "mlflow_auth": spec.mlflow.auth}


def instance_of(
    kind: NodeType, cloud: Cloud, region: str, place: str
) -> tuple[str, Instance | None]:
    """The name of a node's instance and what the catalogue knows of it.

    Raises SpecError if the spec names none for this cloud.
    """
    name = kind.instance.get(cloud)
    if name is None:
        raise SpecError(f"{place}.instance.{cloud}: is required for provider {cloud}")
    return name, find_instance(cloud, name, region)


def resources_of(kind: NodeType, known: Instance | None, place: str) -> dict[str, int]:
    """What Ray hands out on a node: as the spec says, else as the catalogue has it."""
    if known is None and kind.cpus is None:
        raise SpecError(f"{place}.cpus: is required, since its instance is not in the catalogue")
    cpus = kind.cpus if kind.cpus is not None else int(known.vcpus if known else 0)
    gpus = kind.gpus if kind.gpus is not None else (known.accelerators if known else 0)
    resource = "GPU"
    if known is not None and known.accelerators:
        from cluster.cost.catalog import ray_resource

        resource = ray_resource(known.ray_accelerator_type)
    return {"CPU": cpus} | ({resource: gpus} if gpus else {})


def labels_of(
    cloud: Cloud, region: str, kind: NodeType, name: str, known: Instance | None, spot: bool
) -> dict[str, str]:
    """Ray labels by which `status`, budgets and people know what a node is and costs."""
    market = SPOT if spot else ON_DEMAND
    labels = {PROVIDER: cloud, REGION: region, INSTANCE: name, MARKET: market}
    usd = known.usd(spot) if known else None
    if usd is not None:
        labels[USD_PER_HOUR] = f"{usd:g}"
    return labels | kind.labels


def _cloud(
    spec: ClusterSpec,
    cloud: Cloud,
    region: str,
    config: Callable[[str, NodeType, bool, bool], dict[str, Any]],
) -> dict[str, Any]:
    """Sizes and node types of a cloud.

    `config(instance, kind, spot, devices)` gives the provider's own part.
    """
    labels = partial(labels_of, cloud, region)
    name, known = instance_of(spec.head, cloud, region, "head")
    gpus = spec.head.gpus or 0
    head = {
        "resources": {"CPU": spec.head.cpus or 0} | ({"GPU": gpus} if gpus else {}),
        "labels": labels(spec.head, name, known, spot=False),
        "node_config": config(name, spec.head, False, gpus > 0),
    }
    types: dict[str, Any] = {"head": head}
    for key, kind in spec.workers.items():
        place = f"workers.{key}"
        name, known = instance_of(kind, cloud, region, place)
        resources = resources_of(kind, known, place)
        devices = sum(amount for resource, amount in resources.items() if resource != "CPU") > 0
        types[key] = {
            "min_workers": kind.min,
            "max_workers": Noted(kind.max, "EDIT: how many the bill can bear"),
            "resources": resources,
            "labels": labels(kind, name, known, kind.spot),
            "node_config": config(name, kind, kind.spot, devices),
        }
        if kind.spot and spec.fallback_after_s is not None:
            types[key]["priority"] = 1
            types[f"{key}-{ON_DEMAND}"] = {
                "min_workers": 0,
                "max_workers": Noted(0, f"until there is no {key} to be had"),
                "resources": resources,
                "labels": labels(kind, name, known, spot=False) | {FALLBACK_FOR: key},
                "node_config": config(name, kind, False, devices),
            }
    most = sum(kind.max for kind in spec.workers.values())
    return {
        "sizes": {"max_workers": Noted(most, "EDIT: at most so many workers in all")},
        "nodes": {"available_node_types": types, "head_node_type": "head"},
    }


def _aws(spec: ClusterSpec) -> dict[str, Any]:
    aws = spec.aws
    assert aws is not None

    def config(name: str, kind: NodeType, spot: bool, devices: bool) -> dict[str, Any]:
        image = aws.gpu_image or aws.image if devices else aws.image
        what = "Ubuntu with NVIDIA's driver" if devices else "Ubuntu"
        disk = {"VolumeSize": kind.disk_gb, "VolumeType": "gp3", "Encrypted": True}
        told: dict[str, Any] = {
            "InstanceType": Noted(name, "EDIT: what you can get"),
            "ImageId": Noted(image, f"EDIT: {what} in your region"),
            "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
            "MetadataOptions": {"HttpTokens": "required"},
        }
        if aws.key_name is not None:
            told["KeyName"] = aws.key_name
        if spot:
            told["InstanceMarketOptions"] = {"MarketType": "spot"}
        if kind is not spec.head and aws.worker_profile is not None:
            told["IamInstanceProfile"] = {"Name": aws.worker_profile}
        tags = [{"Key": key, "Value": value} for key, value in spec.tags.items()]
        if tags:
            kinds = ("instance", "volume")
            told["TagSpecifications"] = [{"ResourceType": it, "Tags": tags} for it in kinds]
        return told

    rule = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp"}
    ranges = [{"CidrIp": Noted(it, "EDIT: where you come from")} for it in aws.ssh_from]
    group = {"GroupName": spec.name, "IpPermissions": [{**rule, "IpRanges": ranges}]}
    provider = {
        "type": "aws",
        "region": Noted(aws.region, "EDIT"),
        "availability_zone": Noted(",".join(aws.zones), "EDIT"),
        "cache_stopped_nodes": Noted(False, "terminated: a stopped disk still costs"),
        "security_group": group,
    }
    return {"provider": provider, **_cloud(spec, "aws", aws.region, config)}


def _gcp(spec: ClusterSpec) -> dict[str, Any]:
    gcp = spec.gcp
    assert gcp is not None

    def config(name: str, kind: NodeType, spot: bool, devices: bool) -> dict[str, Any]:
        image = gcp.gpu_image or gcp.image if devices else gcp.image
        disk = {"diskSizeGb": kind.disk_gb, "sourceImage": Noted(image, "EDIT" * devices)}
        boot = {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}
        told: dict[str, Any] = {
            "machineType": Noted(name, "EDIT: what you can get"),
            "disks": [boot],
        }
        scheduling: dict[str, Any] = {}
        if devices:
            scheduling = {"onHostMaintenance": "TERMINATE"}
        if spot:
            scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
        if scheduling:
            told["scheduling"] = scheduling
        if spec.tags:
            told["labels"] = dict(spec.tags)
        if kind is not spec.head and gcp.worker_account is not None:
            scope = "https://www.googleapis.com/auth/cloud-platform"
            told["serviceAccounts"] = [{"email": gcp.worker_account, "scopes": [scope]}]
        return told

    provider = {
        "type": "gcp",
        "region": Noted(gcp.region, "EDIT"),
        "availability_zone": Noted(gcp.zone, "EDIT"),
        "project_id": Noted(gcp.project, "EDIT"),
        "cache_stopped_nodes": False,
    }
    return {"provider": provider, **_cloud(spec, "gcp", gcp.region, config)}


def _azure(spec: ClusterSpec) -> dict[str, Any]:
    azure = spec.azure
    assert azure is not None

    def config(name: str, kind: NodeType, spot: bool, devices: bool) -> dict[str, Any]:
        image = azure.gpu_image or azure.image if devices else azure.image
        told: dict[str, Any] = {
            "vmSize": Noted(name, "EDIT: what you can get"),
            **_azure_image(image, devices),
            "osDiskSize": kind.disk_gb,
        }
        if spot:
            told |= {"priority": "Spot", "evictionPolicy": "Delete"}
        return {"azure_arm_parameters": told} | ({"tags": dict(spec.tags)} if spec.tags else {})

    provider: dict[str, Any] = {
        "type": "azure",
        "location": Noted(azure.location, "EDIT"),
        "resource_group": Noted(azure.resource_group, "EDIT"),
        "cache_stopped_nodes": False,
    }
    if azure.subscription is not None:
        provider["subscription_id"] = azure.subscription
    if spec.tags:
        provider["tags"] = dict(spec.tags)
    return {"provider": provider, **_cloud(spec, "azure", azure.location, config)}


def _azure_image(image: str, devices: bool) -> Mapping[str, Any]:
    parts = image.split(":")
    if len(parts) != 4:
        raise SpecError(f"azure.image: must be publisher:offer:sku:version (got {image!r})")
    keys = ("imagePublisher", "imageOffer", "imageSku", "imageVersion")
    told: dict[str, Any] = dict(zip(keys, parts, strict=True))
    if devices:
        told["imagePublisher"] = Noted(parts[0], "EDIT: an image with NVIDIA's driver")
    return told


def _local(spec: ClusterSpec) -> dict[str, Any]:
    local = spec.local
    assert local is not None
    provider = {
        "type": "local",
        "head_ip": Noted(local.head, "EDIT"),
        "worker_ips": Noted(list(local.workers), "EDIT"),
    }
    least = len(local.workers) if local.min is None else local.min
    sizes = {"min_workers": least, "max_workers": len(local.workers)}
    return {"provider": provider, "sizes": sizes, "nodes": {}}
