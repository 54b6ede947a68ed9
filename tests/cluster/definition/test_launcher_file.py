"""Files of all providers: up to date, accepted by Ray and the clouds, and no field ignored."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml

from cluster.base.config import Spec, read_yaml, validate
from cluster.base.errors import SpecError
from cluster.base.labels import FALLBACK_FOR
from cluster.connection.ray_internals import prepare_launcher_file, validate_launcher_file
from cluster.definition.commented_yaml import plain_data
from cluster.definition.launcher_file import commented_config, render
from cluster.definition.spec import SHIPPED_SPEC, ClusterSpec, Provider, read_cluster_spec

HOME = Path(__file__).parents[3]
LAUNCH = HOME / "cluster" / "definition" / "launch"
FILES: dict[Path, tuple[Provider, bool]] = {
    HOME / "cluster.yaml": ("aws", False),
    LAUNCH / "gcp.yaml": ("gcp", False),
    LAUNCH / "azure.yaml": ("azure", False),
    LAUNCH / "local.yaml": ("local", False),
    LAUNCH / "kuberay.yaml": ("kuberay", False),
    LAUNCH / "kuberay-job.yaml": ("kuberay", True),
}
LAUNCHED: tuple[Provider, ...] = ("aws", "gcp", "azure", "local")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_committed_file_is_up_to_date(path: Path) -> None:
    provider, job = FILES[path]
    command = f"heliostat cluster render --provider {provider}{' --job' * job}"
    given = render(read_cluster_spec(SHIPPED_SPEC), provider, job)
    assert path.read_text() == given, f"{command} > {path.relative_to(HOME)}"


@pytest.mark.parametrize("provider", LAUNCHED)
def test_ray_accepts_the_file_and_adds_no_commands(provider: Provider) -> None:
    """Ray's defaults would install a nightly build and open the dashboard to the network."""
    config = yaml.safe_load(render(read_cluster_spec(SHIPPED_SPEC), provider))
    prepared = prepare_launcher_file(config)
    validate_launcher_file(prepared)
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[key] == config[key]
    assert "dev0" not in str(prepared)
    assert prepared["worker_setup_commands"] == config["setup_commands"]
    config["max_worker"] = 1
    with pytest.raises(Exception, match="max_worker"):
        validate_launcher_file(prepare_launcher_file(config))


@pytest.mark.parametrize("provider", [*LAUNCHED, "kuberay"])
def test_values_that_users_must_edit_are_marked(provider: Provider) -> None:
    lines = render(read_cluster_spec(SHIPPED_SPEC), provider).splitlines()
    marked = [line for line in lines if "# EDIT" in line]
    examples = ("ami-0000", "203.0.113.", "my-project", "192.0.2.", "registry.example.com")
    values = [line.partition("# ")[0] for line in lines]
    for line, value in zip(lines, values, strict=True):
        if any(example in value for example in examples):
            # MLflow's container repeats the image of the others.
            assert line in marked or (provider == "kuberay" and "image" in value), line
    assert marked


def rendered(data: Mapping[str, Any], provider: Provider) -> str:
    """The content of the file without comments; for Kubernetes, that of a RayJob."""
    spec = validate(ClusterSpec, data)
    texts = [render(spec, provider, job) for job in {False, provider == "kuberay"}]
    return str([list(yaml.safe_load_all(text)) for text in texts])


CHANGES: dict[str, Any] = {
    "name": "other",
    "python": "python3.12",
    "setup": "installed",
    "venv": "/opt/venv",
    "ssh.user": "root",
    "ssh.key": "~/.ssh/mine",
    "idle_minutes": 3,
    "fallback_after_s": None,
    "state": "/mnt/state",
    "storage": "/shared/runs",
    "metrics": True,
    "tags": {"owner": "me"},
    "head.instance": {"aws": "m7i.large", "gcp": "n2-standard-4", "azure": "Standard_F8s_v2"},
    "head.cpus": 2,
    "head.gpus": 1,
    "head.disk_gb": 77,
    "head.labels": {"mine": "yes"},
    "workers.gpu.instance": {
        "aws": "g6.2xlarge",
        "gcp": "g2-standard-8",
        "azure": "Standard_NC6s_v3",
    },
    "workers.gpu.cpus": 2,
    "workers.gpu.gpus": 0,
    "workers.gpu.disk_gb": 77,
    "workers.gpu.labels": {"mine": "yes"},
    "workers.gpu.min": 1,
    "workers.gpu.max": 7,
    "workers.gpu.spot": False,
    "mlflow.port": 5001,
    "mlflow.database": "postgresql://mlflow@db.internal/mlflow",
    "mlflow.artifacts": "s3://bucket/mlflow",
    "mlflow.auth": True,
    "aws.region": "eu-west-1",
    "aws.zones": ["us-east-1c"],
    "aws.ssh_from": ["198.51.100.0/24"],
    "aws.image": "ami-1",
    "aws.gpu_image": "ami-2",
    "aws.key_name": "mine",
    "aws.worker_profile": "profile",
    "gcp.project": "other",
    "gcp.region": "us-west1",
    "gcp.zone": "us-east4-a",
    "gcp.image": "projects/a/global/images/b",
    "gcp.gpu_image": "projects/a/global/images/c",
    "gcp.worker_account": "me@example.com",
    "azure.location": "westus",
    "azure.resource_group": "other",
    "azure.subscription": "00000000-0000-0000-0000-000000000001",
    "azure.image": "a:b:c:d",
    "azure.gpu_image": "a:b:c:e",
    "local.head": "192.0.2.99",
    "local.workers": ["192.0.2.98"],
    "local.min": 1,
    "local.head_resources": {"CPU": 1},
    "local.worker_resources": {"CPU": 1, "memory": 500000000, "disks": 2},
    "local.usd_per_hour": 0.5,
    "kuberay.namespace": "other",
    "kuberay.image": "other:1",
    "kuberay.pods.head": {"cpus": 9, "memory_gb": 9},
    "kuberay.pods.gpu": {"cpus": 9, "gpus": 2, "memory_gb": 9},
    "kuberay.gpu_resource": "amd.com/gpu",
    "kuberay.spot_label": "a/b=c",
    "kuberay.token_secret": "mine",
    "kuberay.job": "heliostat sweep digits",
}
HOSTS = {"python", "setup", "venv", "ssh.user", "ssh.key"}
"""Fields that pods cannot use: a pod has a container image and no SSH."""
OTHERS = {
    "local": {"fallback_after_s", "tags"},  # nothing is rented
    "kuberay": HOSTS,
}
"""Fields that a provider cannot use; own hosts have no node types either."""


def leaves(model: Any, place: str = "") -> set[str]:
    """All dotted paths of the spec, with the shipped names of workers and pods."""
    found = set()
    for name, value in model:
        at = f"{place}{name}"
        if at in ("workers", "kuberay.pods"):
            for key, inner in value.items():
                found |= {f"{at}.{key}"} if at == "kuberay.pods" else leaves(inner, f"{at}.{key}.")
        elif isinstance(value, Spec):
            found |= leaves(value, f"{at}.")
        else:
            found.add(at)
    return found


def test_every_field_is_in_the_table_of_changes() -> None:
    assert leaves(read_cluster_spec(SHIPPED_SPEC)) == set(CHANGES)


def honours(provider: Provider, place: str) -> bool:
    if place in ("ssh.key", "aws.key_name"):  # a test of their own, since each needs the other
        return False
    section = place.partition(".")[0]
    if section in ("aws", "gcp", "azure", "local", "kuberay"):
        return section == provider
    if place in OTHERS.get(provider, set()):
        return False
    if provider == "local":
        return section not in ("head", "workers")
    return not (provider == "kuberay" and place.endswith(".instance"))


@pytest.mark.parametrize("provider", [*LAUNCHED, "kuberay"])
def test_no_field_is_ignored_by_a_provider_that_could_honour_it(provider: Provider) -> None:
    before = copy.deepcopy(read_yaml(SHIPPED_SPEC))
    # Fields that mean something only beside others.
    before["kuberay"] |= {"token_secret": "token", "spot_label": "spot=true"}
    said = rendered(before, provider)
    ignored = [
        place
        for place, value in CHANGES.items()
        if honours(provider, place) and said == rendered(with_field(before, place, value), provider)
    ]
    assert ignored == []


def with_field(data: Mapping[str, Any], place: str, value: Any) -> dict[str, Any]:
    result: dict[str, Any] = copy.deepcopy(dict(data))
    *outer, last = place.split(".")
    inner = result
    for key in outer:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return result


def test_an_ssh_key_needs_its_key_pairs_name_on_aws() -> None:
    data = with_field(read_yaml(SHIPPED_SPEC), "ssh.key", "~/.ssh/mine")
    config = plain_data(
        commented_config(validate(ClusterSpec, with_field(data, "aws.key_name", "mine")), "aws")
    )
    assert config["auth"]["ssh_private_key"] == "~/.ssh/mine"
    kinds = config["available_node_types"].values()
    assert all(kind["node_config"]["KeyName"] == "mine" for kind in kinds)
    del data["aws"]
    azure = plain_data(commented_config(validate(ClusterSpec, data), "azure"))
    assert azure["auth"]["ssh_public_key"] == "~/.ssh/mine.pub"


def test_a_spot_type_has_an_on_demand_type_with_no_nodes_beside_it() -> None:
    kinds = plain_data(commented_config(read_cluster_spec(SHIPPED_SPEC), "aws"))[
        "available_node_types"
    ]
    spot, twin = kinds["gpu"], kinds["gpu-on-demand"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert twin["labels"][FALLBACK_FOR] == "gpu"
    assert (twin["max_workers"], twin["resources"]) == (0, spot["resources"])
    assert spot["priority"] > twin.get("priority", 0)
    same = ("InstanceType", "ImageId", "BlockDeviceMappings")
    assert all(twin["node_config"][key] == spot["node_config"][key] for key in same)
    assert "InstanceMarketOptions" not in twin["node_config"]


def test_gcps_node_configs_match_its_api() -> None:
    """Against the API description in Google's client library."""
    pytest.importorskip("googleapiclient", reason="google-api-python-client is not installed")
    from googleapiclient import discovery_cache

    folder = Path(discovery_cache.__file__).parent / "documents" / "compute.v1.json"
    schemas = json.loads(folder.read_text())["schemas"]
    config = plain_data(commented_config(read_cluster_spec(SHIPPED_SPEC), "gcp"))
    for kind in config["available_node_types"].values():
        assert list(unknown(kind["node_config"], schemas["Instance"], schemas)) == []
    assert list(unknown({"scheduling": [{}]}, schemas["Instance"], schemas)) == [": not a mapping"]


def unknown(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """Dotted paths in a value that its schema, in Google's format, does not have."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kind = schema.get("type")
    if kind == "object" and not isinstance(value, dict):
        yield ": not a mapping"
    elif kind == "object":
        for key, inner in value.items():
            known = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if known is None:
                yield f".{key}"
            else:
                yield from unknown(inner, known, schemas)
    elif kind == "array":
        for inner in value:
            yield from unknown(inner, schema["items"], schemas)
    elif value not in schema.get("enum", [value]):
        yield f": {value} is none of {schema['enum']}"


def test_azures_node_configs_match_rays_template() -> None:
    folder = Path(ray.autoscaler.__file__).parent / "_private" / "_azure"
    parameters = json.loads((folder / "azure-vm-template.json").read_text())["parameters"]
    config = plain_data(commented_config(read_cluster_spec(SHIPPED_SPEC), "azure"))
    for kind in config["available_node_types"].values():
        asked = kind["node_config"]["azure_arm_parameters"]
        assert asked.keys() <= parameters.keys()
        for key, value in asked.items():
            assert isinstance(value, {"string": str, "int": int}[parameters[key]["type"]])


def test_missing_sections_and_fields_are_reported() -> None:
    data = read_yaml(SHIPPED_SPEC)
    with pytest.raises(SpecError, match=r"^gcp: this section is needed"):
        render(validate(ClusterSpec, {**data, "gcp": None}), "gcp")
    del data["workers"]["gpu"]["instance"]["aws"]
    with pytest.raises(SpecError, match=r"^workers\.gpu\.instance\.aws: is required"):
        render(validate(ClusterSpec, data), "aws")
    data["workers"]["gpu"]["instance"]["aws"] = "x9.mega"
    with pytest.raises(SpecError, match=r"^workers\.gpu\.cpus: is required, since"):
        render(validate(ClusterSpec, data), "aws")
