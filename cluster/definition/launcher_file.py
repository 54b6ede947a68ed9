"""From a cluster's spec to the file for Ray's launcher, for a cloud or the user's own hosts.

`render` returns the text. Every line that a user must or may want to change is marked EDIT.
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
from cluster.cost.catalog import Instance, find_instance, ray_resource
from cluster.definition import kuberay, shell_commands
from cluster.definition.commented_yaml import Commented, dump_commented
from cluster.definition.spec import Cloud, ClusterSpec, NodeType, Provider

_RSYNC_EXCLUDED = [
    ".git/**",
    ".venv/**",
    "runs/**",
    "mlartifacts/**",
    "mlflow.db",
    "**/__pycache__/**",
]

_HEADING = """{what}, for `heliostat up FILE` or Ray's own `ray up FILE`.
Rendered by `heliostat cluster render --provider {provider}` from
cluster/definition/launch/heliostat.yaml. Change the lines marked EDIT, here or there, and then run
`heliostat cluster check FILE`.

Every part of Ray asks for the token in ~/.ray/auth_token, which `heliostat up` creates. The
dashboard listens on the head's loopback and MLflow on the head's private address:
`heliostat ui --cluster FILE` opens tunnels to both."""


def render(spec: ClusterSpec, provider: Provider, job: bool = False) -> str:
    """The file for `provider`; for Kubernetes, of a RayJob if `job`.

    Raises SpecError if the spec lacks a section or field that the provider needs.
    """
    if getattr(spec, provider) is None:
        raise SpecError(f"{provider}: this section is needed for provider {provider}")
    if provider == "kuberay":
        return kuberay.render_kuberay(spec, job)
    what = {
        "aws": "A cluster on AWS",
        "gcp": "A cluster on Google Cloud",
        "azure": "A cluster on Azure",
        "local": "A cluster of hosts that you reach by SSH",
    }[provider]
    return dump_commented(
        commented_config(spec, provider), _HEADING.format(what=what, provider=provider)
    )


def commented_config(spec: ClusterSpec, provider: Provider) -> dict[str, Any]:
    """The content of the file for Ray's launcher, with its comments; `plain_data` removes those."""
    sections = {
        "aws": _aws_sections,
        "gcp": _gcp_sections,
        "azure": _azure_sections,
        "local": _local_sections,
    }[provider](spec)
    mounts = {shell_commands.TOKEN_FILE: shell_commands.TOKEN_FILE}
    if spec.setup == "install":
        mounts = {shell_commands.REMOTE_PROJECT: "."} | mounts
    auth: dict[str, Any] = {
        "ssh_user": Commented(spec.ssh.user, "EDIT" if provider == "local" else "")
    }
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
        "rsync_exclude": _RSYNC_EXCLUDED if spec.setup == "install" else [],
        "initialization_commands": [],
        "setup_commands": shell_commands.setup_commands(spec, provider),
        "head_setup_commands": shell_commands.head_setup_commands(spec, provider),
        "worker_setup_commands": [],
        "head_start_ray_commands": shell_commands.head_start_commands(spec, provider),
        "worker_start_ray_commands": shell_commands.worker_start_commands(spec, provider),
    }


def _metadata(spec: ClusterSpec) -> dict[str, Any]:
    """Settings for our verbs and the head's programs; Ray ignores this section."""
    return {"mlflow_port": spec.mlflow.port, "mlflow_auth": spec.mlflow.auth}


def find_node_instance(
    node_type: NodeType, cloud: Cloud, region: str, path: str
) -> tuple[str, Instance | None]:
    """The name of a node type's instance, and its entry in the catalogue, if it has one.

    Raises SpecError if the spec names no instance for this cloud.
    """
    name = node_type.instance.get(cloud)
    if name is None:
        raise SpecError(f"{path}.instance.{cloud}: is required for provider {cloud}")
    return name, find_instance(cloud, name, region)


def node_resources(node_type: NodeType, instance: Instance | None, path: str) -> dict[str, int]:
    """The resources that Ray schedules on a node: from the spec, otherwise from the catalogue."""
    if instance is None and node_type.cpus is None:
        raise SpecError(f"{path}.cpus: is required, since its instance is not in the catalogue")
    cpus, gpus = node_type.cpus, node_type.gpus
    if cpus is None:
        cpus = int(instance.vcpus if instance else 0)
    if gpus is None:
        gpus = instance.accelerators if instance else 0
    resource = "GPU"
    if instance is not None and instance.accelerators:
        resource = ray_resource(instance.ray_accelerator_type)
    return {"CPU": cpus} | ({resource: gpus} if gpus else {})


def node_labels(
    cloud: Cloud,
    region: str,
    node_type: NodeType,
    instance_name: str,
    instance: Instance | None,
    spot: bool,
) -> dict[str, str]:
    """Ray labels that tell `status`, budgets and users a node's instance and price."""
    market = SPOT if spot else ON_DEMAND
    labels = {PROVIDER: cloud, REGION: region, INSTANCE: instance_name, MARKET: market}
    usd = instance.usd(spot) if instance else None
    if usd is not None:
        labels[USD_PER_HOUR] = f"{usd:g}"
    return labels | node_type.labels


def _cloud_sections(
    spec: ClusterSpec,
    cloud: Cloud,
    region: str,
    node_config: Callable[[str, NodeType, bool, bool], dict[str, Any]],
) -> dict[str, Any]:
    """The sections for sizes and node types of a cloud.

    `node_config(instance, node_type, spot, devices)` returns the provider's part of a node type.
    """
    labels = partial(node_labels, cloud, region)
    name, instance = find_node_instance(spec.head, cloud, region, "head")
    gpus = spec.head.gpus or 0
    head = {
        "resources": {"CPU": spec.head.cpus or 0} | ({"GPU": gpus} if gpus else {}),
        "labels": labels(spec.head, name, instance, spot=False),
        "node_config": node_config(name, spec.head, False, gpus > 0),
    }
    types: dict[str, Any] = {"head": head}
    for key, node_type in spec.workers.items():
        path = f"workers.{key}"
        name, instance = find_node_instance(node_type, cloud, region, path)
        resources = node_resources(node_type, instance, path)
        devices = sum(amount for resource, amount in resources.items() if resource != "CPU") > 0
        types[key] = {
            "min_workers": node_type.min,
            "max_workers": Commented(node_type.max, "EDIT: upper limit, which limits the bill"),
            "resources": resources,
            "labels": labels(node_type, name, instance, node_type.spot),
            "node_config": node_config(name, node_type, node_type.spot, devices),
        }
        if node_type.spot and spec.fallback_after_s is not None:
            types[key]["priority"] = 1
            types[f"{key}-{ON_DEMAND}"] = {
                "min_workers": 0,
                "max_workers": Commented(0, f"raised while {key} is unavailable"),
                "resources": resources,
                "labels": labels(node_type, name, instance, spot=False) | {FALLBACK_FOR: key},
                "node_config": node_config(name, node_type, False, devices),
            }
    most = sum(node_type.max for node_type in spec.workers.values())
    return {
        "sizes": {"max_workers": Commented(most, "EDIT: upper limit for all workers")},
        "nodes": {"available_node_types": types, "head_node_type": "head"},
    }


def _aws_sections(spec: ClusterSpec) -> dict[str, Any]:
    aws = spec.aws
    assert aws is not None

    def node_config(
        instance: str, node_type: NodeType, spot: bool, devices: bool
    ) -> dict[str, Any]:
        image = aws.gpu_image or aws.image if devices else aws.image
        what = "Ubuntu with NVIDIA's driver" if devices else "Ubuntu"
        disk = {"VolumeSize": node_type.disk_gb, "VolumeType": "gp3", "Encrypted": True}
        node: dict[str, Any] = {
            "InstanceType": Commented(instance, "EDIT: what you can get"),
            "ImageId": Commented(image, f"EDIT: {what} in your region"),
            "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
            "MetadataOptions": {"HttpTokens": "required"},
        }
        if aws.key_name is not None:
            node["KeyName"] = aws.key_name
        if spot:
            node["InstanceMarketOptions"] = {"MarketType": "spot"}
        if node_type is not spec.head and aws.worker_profile is not None:
            node["IamInstanceProfile"] = {"Name": aws.worker_profile}
        tags = [{"Key": key, "Value": value} for key, value in spec.tags.items()]
        if tags:
            kinds = ("instance", "volume")
            node["TagSpecifications"] = [{"ResourceType": it, "Tags": tags} for it in kinds]
        return node

    rule = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp"}
    ranges = [{"CidrIp": Commented(it, "EDIT: your own network")} for it in aws.ssh_from]
    group = {"GroupName": spec.name, "IpPermissions": [{**rule, "IpRanges": ranges}]}
    provider = {
        "type": "aws",
        "region": Commented(aws.region, "EDIT"),
        "availability_zone": Commented(",".join(aws.zones), "EDIT"),
        "cache_stopped_nodes": Commented(False, "terminated: a stopped disk still costs"),
        "security_group": group,
    }
    return {"provider": provider, **_cloud_sections(spec, "aws", aws.region, node_config)}


def _gcp_sections(spec: ClusterSpec) -> dict[str, Any]:
    gcp = spec.gcp
    assert gcp is not None

    def node_config(
        instance: str, node_type: NodeType, spot: bool, devices: bool
    ) -> dict[str, Any]:
        image = gcp.gpu_image or gcp.image if devices else gcp.image
        disk = {"diskSizeGb": node_type.disk_gb, "sourceImage": Commented(image, "EDIT" * devices)}
        boot = {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}
        node: dict[str, Any] = {
            "machineType": Commented(instance, "EDIT: what you can get"),
            "disks": [boot],
        }
        scheduling: dict[str, Any] = {}
        if devices:
            scheduling = {"onHostMaintenance": "TERMINATE"}
        if spot:
            scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
        if scheduling:
            node["scheduling"] = scheduling
        if spec.tags:
            node["labels"] = dict(spec.tags)
        if node_type is not spec.head and gcp.worker_account is not None:
            scope = "https://www.googleapis.com/auth/cloud-platform"
            node["serviceAccounts"] = [{"email": gcp.worker_account, "scopes": [scope]}]
        return node

    provider = {
        "type": "gcp",
        "region": Commented(gcp.region, "EDIT"),
        "availability_zone": Commented(gcp.zone, "EDIT"),
        "project_id": Commented(gcp.project, "EDIT"),
        "cache_stopped_nodes": False,
    }
    return {"provider": provider, **_cloud_sections(spec, "gcp", gcp.region, node_config)}


def _azure_sections(spec: ClusterSpec) -> dict[str, Any]:
    azure = spec.azure
    assert azure is not None

    def node_config(
        instance: str, node_type: NodeType, spot: bool, devices: bool
    ) -> dict[str, Any]:
        image = azure.gpu_image or azure.image if devices else azure.image
        node: dict[str, Any] = {
            "vmSize": Commented(instance, "EDIT: what you can get"),
            **_azure_image(image, devices),
            "osDiskSize": node_type.disk_gb,
        }
        if spot:
            node |= {"priority": "Spot", "evictionPolicy": "Delete"}
        return {"azure_arm_parameters": node} | ({"tags": dict(spec.tags)} if spec.tags else {})

    provider: dict[str, Any] = {
        "type": "azure",
        "location": Commented(azure.location, "EDIT"),
        "resource_group": Commented(azure.resource_group, "EDIT"),
        "cache_stopped_nodes": False,
    }
    if azure.subscription is not None:
        provider["subscription_id"] = azure.subscription
    if spec.tags:
        provider["tags"] = dict(spec.tags)
    return {"provider": provider, **_cloud_sections(spec, "azure", azure.location, node_config)}


def _azure_image(image: str, devices: bool) -> Mapping[str, Any]:
    parts = image.split(":")
    if len(parts) != 4:
        raise SpecError(f"azure.image: must be publisher:offer:sku:version (got {image!r})")
    keys = ("imagePublisher", "imageOffer", "imageSku", "imageVersion")
    node: dict[str, Any] = dict(zip(keys, parts, strict=True))
    if devices:
        node["imagePublisher"] = Commented(parts[0], "EDIT: an image with NVIDIA's driver")
    return node


def _local_sections(spec: ClusterSpec) -> dict[str, Any]:
    local = spec.local
    assert local is not None
    provider = {
        "type": "local",
        "head_ip": Commented(local.head, "EDIT"),
        "worker_ips": Commented(list(local.workers), "EDIT"),
    }
    least = len(local.workers) if local.min is None else local.min
    sizes = {"min_workers": least, "max_workers": len(local.workers)}
    return {"provider": provider, "sizes": sizes, "nodes": {}}
