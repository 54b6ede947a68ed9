"""From a cluster's spec to manifests for KubeRay: RayCluster or RayJob, and MLflow.

Written for operator 1.7. Its autoscaler needs pods that are never restarted in place. Its token
authentication needs Ray 2.52 or newer, and `rayVersion` in the manifest.
"""

from importlib.metadata import version
from typing import Any

from cluster.definition.commented_yaml import Commented, dump_commented
from cluster.definition.spec import ClusterSpec, Kuberay, Mlflow, NodeType, Pod, WorkerType

RESTART_POLICY = {"restartPolicy": "Never"}
_HEADING = """{what} on Kubernetes with the KubeRay operator 1.7: `kubectl apply -f FILE`.
Rendered by `heliostat cluster render --provider kuberay{option}` from
cluster/definition/launch/heliostat.yaml. Change the lines marked EDIT, here or there.

Every part of Ray asks for a token, which KubeRay keeps in a secret. No port is open to the outside:
use `kubectl port-forward`."""


def render_kuberay(spec: ClusterSpec, job: bool) -> str:
    """The manifests as one file."""
    what, option = ("One job", " --job") if job else ("A cluster", "")
    first, *rest = manifests(spec, job)
    return "---\n".join(
        [
            dump_commented(first, _HEADING.format(what=what, option=option)),
            *map(dump_commented, rest),
        ]
    )


def manifests(spec: ClusterSpec, job: bool) -> list[dict[str, Any]]:
    """A RayCluster, or a RayJob with a cluster of its own; and MLflow, which both share."""
    kuberay = spec.kuberay
    assert kuberay is not None
    cluster = _cluster(spec, kuberay)
    ray = _manifest(spec, "ray.io/v1", "RayCluster", spec.name, cluster)
    if job:
        body = {
            "entrypoint": Commented(kuberay.job, "EDIT, with `storage` where all pods reach it"),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "submissionMode": "K8sJobMode",
            "rayClusterSpec": cluster,
        }
        ray = _manifest(spec, "ray.io/v1", "RayJob", f"{spec.name}-job", body)
    return [ray, *_mlflow(spec, kuberay)]


def _manifest(
    spec: ClusterSpec, api: str, kind: str, name: str, body: dict[str, Any]
) -> dict[str, Any]:
    assert spec.kuberay is not None
    metadata = {"name": name, "namespace": spec.kuberay.namespace, "labels": _labels(spec)}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": body}


def _labels(spec: ClusterSpec) -> dict[str, str]:
    return {"app.kubernetes.io/part-of": spec.name, **spec.tags}


def _cluster(spec: ClusterSpec, kuberay: Kuberay) -> dict[str, Any]:
    auth: dict[str, Any] = {"mode": "token"}
    if kuberay.token_secret is not None:
        auth["secretName"] = kuberay.token_secret
    head = {
        "resources": _ray_resources(spec.head.cpus or 0, spec.head.gpus or 0),
        # KubeRay's service reaches the dashboard by the pod's address. It asks for the token.
        "rayStartParams": {"dashboard-host": "0.0.0.0"},
        "template": _template(spec, "head", spec.head),
    }
    cluster: dict[str, Any] = {
        "rayVersion": version("ray"),
        "authOptions": auth,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": round(spec.idle_minutes * 60),
        },
    }
    if spec.state is not None:
        cluster["gcsFaultToleranceOptions"] = _fault_tolerance(spec.name, spec.state)
    cluster["headGroupSpec"] = _with_labels(head, spec.head)
    cluster["workerGroupSpecs"] = [_group(spec, name, kind) for name, kind in spec.workers.items()]
    return cluster


def _fault_tolerance(name: str, state: str) -> dict[str, Any]:
    """Keeps Ray's state on a volume that KubeRay makes, or in the user's Redis."""
    if state.startswith("redis://"):
        address = state.removeprefix("redis://").rstrip("/")
        return {"backend": "redis", "redisAddress": address, "externalStorageNamespace": name}
    return {"backend": "rocksdb", "storage": {"size": "1Gi", "subPath": state.strip("/~")}}


def _group(spec: ClusterSpec, name: str, node_type: WorkerType) -> dict[str, Any]:
    assert spec.kuberay is not None
    pod = spec.kuberay.pods[name]
    cpus = pod.cpus if node_type.cpus is None else node_type.cpus
    gpus = pod.gpus if node_type.gpus is None else node_type.gpus
    group = {
        "groupName": name,
        "replicas": node_type.min,
        "minReplicas": node_type.min,
        "maxReplicas": Commented(node_type.max, "EDIT: upper limit, which limits the bill"),
        "resources": _ray_resources(cpus, gpus),
        "rayStartParams": {},
        "template": _template(spec, name, node_type),
    }
    return _with_labels(group, node_type)


def _ray_resources(cpus: int, gpus: int) -> dict[str, str]:
    return {"CPU": str(cpus)} | ({"GPU": str(gpus)} if gpus else {})


def _with_labels(group: dict[str, Any], node_type: NodeType) -> dict[str, Any]:
    return group | ({"labels": dict(node_type.labels)} if node_type.labels else {})


def _template(spec: ClusterSpec, name: str, node_type: NodeType) -> dict[str, Any]:
    """The pod template of a node type."""
    kuberay = spec.kuberay
    assert kuberay is not None
    pod = kuberay.pods[name]
    container = {
        "name": "ray-head" if name == "head" else "ray-worker",
        "image": Commented(kuberay.image, "EDIT: Ray and your checkout in one image"),
        "env": _environment(spec, kuberay),
        "resources": _pod_resources(pod, node_type, kuberay),
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    if name == "head":
        ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
        container["ports"] = [{"name": key, "containerPort": port} for key, port in ports.items()]
    metadata: dict[str, Any] = {"labels": _labels(spec)}
    if spec.metrics:
        metadata["annotations"] = {"prometheus.io/scrape": "true", "prometheus.io/port": "8080"}
    body: dict[str, Any] = {**RESTART_POLICY, "containers": [container]}
    tolerations = []
    if pod.gpus:
        tolerations.append(_toleration(kuberay.gpu_resource))
    if isinstance(node_type, WorkerType) and node_type.spot and kuberay.spot_label is not None:
        key, value = kuberay.spot_label.split("=")
        tolerations.append(_toleration(key))
        body["affinity"] = {"nodeAffinity": _affinity(key, value, spec.fallback_after_s is None)}
    if tolerations:
        body["tolerations"] = tolerations
    return {"metadata": metadata, "spec": body}


def _toleration(taint: str) -> dict[str, str]:
    return {"key": taint, "operator": "Exists", "effect": "NoSchedule"}


def _affinity(key: str, value: str, required: bool) -> dict[str, Any]:
    """Only spot machines, or preferably: then Kubernetes falls back to on-demand without delay."""
    term = {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}
    if required:
        return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    preferred = {"weight": 100, "preference": term}
    return {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}


def _pod_resources(pod: Pod, node_type: NodeType, kuberay: Kuberay) -> dict[str, Any]:
    """Requests equal limits, so that other pods on the machine cannot take the difference."""
    amounts: dict[str, Any] = {
        "cpu": str(pod.cpus),
        "memory": f"{pod.memory_gb}Gi",
        "ephemeral-storage": f"{node_type.disk_gb}Gi",
    }
    if pod.gpus:
        amounts[kuberay.gpu_resource] = str(pod.gpus)
    return {"requests": amounts, "limits": amounts}


def _environment(spec: ClusterSpec, kuberay: Kuberay) -> list[dict[str, Any]]:
    uri = f"http://{spec.name}-mlflow:{spec.mlflow.port}"
    variables: list[dict[str, Any]] = [{"name": "MLFLOW_TRACKING_URI", "value": uri}]
    if spec.storage is not None:
        variables.append({"name": "HELIOSTAT_STORAGE", "value": spec.storage})
    if spec.mlflow.auth:
        variables.append({"name": "MLFLOW_TRACKING_USERNAME", "value": "admin"})
        variables.append(_secret_variable("MLFLOW_TRACKING_PASSWORD", kuberay))
    return variables


def _secret_variable(variable: str, kuberay: Kuberay) -> dict[str, Any]:
    source = {"name": kuberay.token_secret, "key": "mlflow_password"}
    return {"name": variable, "valueFrom": {"secretKeyRef": source}}


def _mlflow(spec: ClusterSpec, kuberay: Kuberay) -> list[dict[str, Any]]:
    """MLflow with a volume that outlives clusters and jobs, for pods of this cluster only."""
    name, port = f"{spec.name}-mlflow", spec.mlflow.port
    app_label = {"app.kubernetes.io/name": name}
    container = {
        "name": "mlflow",
        "image": kuberay.image,
        "command": ["mlflow", "server", *_mlflow_command(spec.mlflow, name)],
        "env": [],
        "ports": [{"name": "http", "containerPort": port}],
        "volumeMounts": [{"name": "data", "mountPath": "/mlflow"}],
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    if spec.mlflow.auth:
        container["env"] = [
            _secret_variable("MLFLOW_AUTH_ADMIN_PASSWORD", kuberay),
            _secret_variable("MLFLOW_FLASK_SERVER_SECRET_KEY", kuberay),
        ]
        container["workingDir"] = "/mlflow"  # where MLflow keeps its users
    claim = {"persistentVolumeClaim": {"claimName": name}}
    template = {
        "metadata": {"labels": _labels(spec) | app_label},
        "spec": {"containers": [container], "volumes": [{"name": "data", **claim}]},
    }
    selector = {"matchLabels": app_label}
    deployment = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": selector,
        "template": template,
    }
    own_pods = {"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": spec.name}}}
    policy = {
        "podSelector": selector,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [own_pods], "ports": [{"port": port}]}],
    }
    volume = {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": f"{spec.head.disk_gb}Gi"}},
    }
    service = {"selector": app_label, "ports": [{"name": "http", "port": port}]}
    return [
        _manifest(spec, "apps/v1", "Deployment", name, deployment),
        _manifest(spec, "v1", "Service", name, service),
        _manifest(spec, "v1", "PersistentVolumeClaim", name, volume),
        _manifest(spec, "networking.k8s.io/v1", "NetworkPolicy", name, policy),
    ]


def _mlflow_command(mlflow: Mlflow, name: str) -> list[str]:
    options = {
        "--host": "0.0.0.0",  # within the pod; the NetworkPolicy decides who gets in
        "--port": str(mlflow.port),
        "--workers": "1",
        "--allowed-hosts": f"{name}:{mlflow.port},127.0.0.1:*,localhost:*",
        "--backend-store-uri": mlflow.database or "sqlite:////mlflow/mlflow.db",
        "--artifacts-destination": mlflow.artifacts or "/mlflow/artifacts",
    }
    if mlflow.auth:
        options["--app-name"] = "basic-auth"
    return [word for pair in options.items() for word in pair]
