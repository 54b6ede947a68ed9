"""Manifests match KubeRay's resource definitions strictly, and the operator's documented rules.

The definitions are not part of this project: KUBERAY_CRDS names a folder with them, or they are in
`shared/data/kuberay` beside the checkout.
"""

import os
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.base.config import read_yaml, validate
from cluster.definition.kuberay import render_kuberay
from cluster.definition.spec import SHIPPED_SPEC, ClusterSpec

HOME = Path(__file__).parents[3]
PLACES = [Path(os.environ.get("KUBERAY_CRDS", "none")), HOME.parent / "shared" / "data" / "kuberay"]


def definitions() -> Path | None:
    """The folder of the definitions, if there is one."""
    return next((place for place in PLACES if list(place.glob("*.yaml"))), None)


@cache
def validator(kind: str) -> Draft202012Validator:
    """A validator for one kind of `ray.io/v1`."""
    folder = definitions()
    assert folder is not None
    for path in folder.glob("*.yaml"):
        found = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if found["spec"]["names"]["kind"] == kind:
            versions = {each["name"]: each for each in found["spec"]["versions"]}
            schema = strict(versions["v1"]["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
            return Draft202012Validator(schema)
    raise LookupError(kind)


def strict(schema: Any) -> Any:
    """A Kubernetes schema as JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made: dict[str, Any] = {}
    for key, inner in schema.items():
        if key == "properties":
            made[key] = {name: strict(each) for name, each in inner.items()}
        elif key == "required":  # the server fills defaults in first
            fields = schema.get("properties", {})
            made[key] = [name for name in inner if "default" not in fields.get(name, {})]
        elif not key.startswith("x-") and key not in ("description", "format", "default"):
            made[key] = strict(inner)
    free = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not free:
        made["additionalProperties"] = False
    return made


def documents(job: bool, **changes: Any) -> dict[str, dict[str, Any]]:
    """The manifests by kind, after `changes` to the spec's sections."""
    data = read_yaml(SHIPPED_SPEC)
    for section, change in changes.items():
        data[section] = {**data[section], **change} if isinstance(change, dict) else change
    every = yaml.safe_load_all(render_kuberay(validate(ClusterSpec, data), job))
    return {each["kind"]: each for each in every}


FULL = {
    "state": "redis://redis:6379",
    "metrics": True,
    "mlflow": {"auth": True},
    "kuberay": {"token_secret": "token", "spot_label": "cloud.google.com/gke-spot=true"},
    "head": {"labels": {"mine": "yes"}},
}


@pytest.mark.skipif(
    definitions() is None,
    reason="no resource definitions: KUBERAY_CRDS can name a folder with KubeRay's",
)
@pytest.mark.parametrize("changes", [{}, FULL, {"state": "/ray"}], ids=["shipped", "full", "disk"])
def test_manifests_match_kuberays_definitions(changes: dict[str, Any]) -> None:
    cluster = documents(job=False, **changes)["RayCluster"]
    job = documents(job=True, **changes)["RayJob"]
    for manifest in (cluster, job):
        errors = validator(manifest["kind"]).iter_errors(manifest)
        assert [error.json_path for error in errors] == []
    container = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["imagePullPolice"] = "Always"
    assert "imagePullPolice" in str(next(validator("RayCluster").iter_errors(cluster)))


@pytest.mark.parametrize("job", [False, True], ids=["cluster", "job"])
def test_manifests_keep_the_operators_rules(job: bool) -> None:
    """Rules that the operator validates and a schema cannot express."""
    every = documents(job, **FULL)
    manifest = every["RayJob" if job else "RayCluster"]
    spec = manifest["spec"]["rayClusterSpec"] if job else manifest["spec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
    assert len(manifest["metadata"]["name"]) <= 47
    assert spec["rayVersion"] == version("ray")  # 2.52 at least, for the token
    assert spec["authOptions"]["mode"] == "token"
    assert spec["autoscalerOptions"]["version"] == "v2"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"  # the new autoscaler asks for it
        assert not {"num-cpus", "num-gpus", "resources", "labels"} & group["rayStartParams"].keys()
        told = {each["name"] for each in pod["containers"][0]["env"]}
        assert not told & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_enable_autoscaler_v2"}
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    assert len(names) == len(set(names))
    assert not (job and manifest["spec"]["ttlSecondsAfterFinished"] < 0)


def test_devices_are_requested_and_their_taint_tolerated() -> None:
    group = documents(job=False, **FULL)["RayCluster"]["spec"]["workerGroupSpecs"][0]
    pod = group["template"]["spec"]
    asked = pod["containers"][0]["resources"]
    assert asked["limits"]["nvidia.com/gpu"] == asked["requests"]["nvidia.com/gpu"] == "1"
    assert group["resources"]["GPU"] == "1"
    tolerated = {each["key"] for each in pod["tolerations"]}
    assert tolerated == {"nvidia.com/gpu", "cloud.google.com/gke-spot"}
    assert "preferredDuringSchedulingIgnoredDuringExecution" in pod["affinity"]["nodeAffinity"]
    never = documents(job=False, **FULL, fallback_after_s=None)["RayCluster"]["spec"]
    affinity = never["workerGroupSpecs"][0]["template"]["spec"]["affinity"]["nodeAffinity"]
    assert "requiredDuringSchedulingIgnoredDuringExecution" in affinity


def test_only_this_clusters_pods_reach_mlflow() -> None:
    every = documents(job=True, **FULL)
    name = every["Service"]["metadata"]["name"]
    chosen = every["NetworkPolicy"]["spec"]
    deployed = every["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert chosen["podSelector"]["matchLabels"].items() <= deployed.items()
    friends = chosen["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    cluster = every["RayJob"]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert friends.items() <= group["template"]["metadata"]["labels"].items()
        told = group["template"]["spec"]["containers"][0]["env"]
        assert {"name": "MLFLOW_TRACKING_URI", "value": f"http://{name}:5000"} in told
    assert "secretKeyRef" in str(every["Deployment"])
