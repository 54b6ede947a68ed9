"""The spec of a cluster: one small file from which the files of all providers are rendered.

A node type is described once, with its instance type at each provider. The instance's CPUs, devices
and memory come from the catalogue unless the spec gives them.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StringConstraints, field_validator, model_validator

from cluster.base.config import Spec, read_yaml, validate

Provider: TypeAlias = Literal["aws", "gcp", "azure", "local", "kuberay"]
Cloud: TypeAlias = Literal["aws", "gcp", "azure"]
Name: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
"""Lower case, digits and dashes, which all providers and Kubernetes allow in names."""
Tag: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][-_a-z0-9]{0,62}$")]
"""Characters that AWS's tags, GCP's labels, Azure's tags and Kubernetes' labels all allow."""
ShellWord: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[^\s'\"\\$`]+$")]
"""A word that needs no quoting in a shell command."""

SHIPPED_SPEC = Path(__file__).parent / "launch" / "heliostat.yaml"


class NodeType(Spec):
    """A node type. Provider `local` ignores it and detects what its hosts have."""

    instance: dict[Cloud, ShellWord] = {}
    """Cloud -> instance type."""
    cpus: int | None = Field(None, ge=0)
    """CPUs that Ray schedules; those of the instance when not given."""
    gpus: int | None = Field(None, ge=0)
    """Devices that Ray schedules; those of the instance when not given."""
    disk_gb: int = Field(100, ge=10)
    labels: dict[str, str] = {}
    """More Ray labels, besides those for instance, price and market."""


class WorkerType(NodeType):
    """A node type that the autoscaler starts and ends."""

    min: int = Field(0, ge=0)
    max: int = Field(1, ge=1)
    spot: bool = False
    """Spot instances. With `fallback_after_s`, an on-demand type can take their place."""

    @model_validator(mode="after")
    def _bounds(self) -> "WorkerType":
        if self.min > self.max:
            raise ValueError(f"min is {self.min} but max is {self.max}")
        return self


class Ssh(Spec):
    user: ShellWord = "ubuntu"
    key: ShellWord | None = None
    """Private key. When not given, Ray makes one in clouds, and `local` uses ssh's default."""


class Aws(Spec):
    region: ShellWord = "us-east-1"
    zones: list[ShellWord] = Field(["us-east-1a", "us-east-1b"], min_length=1)
    ssh_from: list[str] = Field(min_length=1)
    """Networks that may connect by SSH, such as 203.0.113.0/24."""
    image: ShellWord
    """AMI of nodes without devices."""
    gpu_image: ShellWord | None = None
    """AMI of nodes with devices; `image` when not given."""
    key_name: ShellWord | None = None
    """The EC2 key pair of `ssh.key`."""
    worker_profile: ShellWord | None = None
    """Instance profile of workers, for access to storage; by default Ray gives them none."""

    @field_validator("ssh_from")
    @classmethod
    def _networks(cls, networks: list[str]) -> list[str]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks


class Gcp(Spec):
    project: ShellWord
    region: ShellWord = "us-east4"
    zone: ShellWord = "us-east4-c"
    image: ShellWord = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"
    gpu_image: ShellWord | None = None
    worker_account: ShellWord | None = None
    """Service account of workers, for access to storage; by default Ray gives them none."""


class Azure(Spec):
    location: ShellWord = "eastus"
    resource_group: ShellWord
    subscription: ShellWord | None = None
    """When not given, the one that the Azure command line uses."""
    image: ShellWord = "Canonical:ubuntu-24_04-lts:server:latest"
    """publisher:offer:sku:version"""
    gpu_image: ShellWord | None = None


class Local(Spec):
    """The user's own hosts, reached by SSH. Ray detects their resources."""

    head: ShellWord
    """The head's address on the network that all hosts share."""
    workers: list[ShellWord] = Field(min_length=1)
    min: int | None = Field(None, ge=0)
    """Number of workers that are always in the cluster; all when not given."""
    head_resources: dict[str, int] = {"CPU": 0}
    """Resources of the head, in place of the detected ones; memory in bytes."""
    worker_resources: dict[str, int] = {}
    usd_per_hour: float | None = Field(None, ge=0)
    """Price of one host, for `status` and budgets."""


class Pod(Spec):
    """Resources that a pod requests; Kubernetes reserves a part of each machine for itself."""

    cpus: int = Field(ge=1)
    gpus: int = Field(0, ge=0)
    memory_gb: int = Field(ge=1)


class Kuberay(Spec):
    namespace: Name = "default"
    image: ShellWord
    """Container image with Ray and Heliostat."""
    pods: dict[Name, Pod]
    """Node type (`head`, or a worker type) -> its pod."""
    gpu_resource: ShellWord = "nvidia.com/gpu"
    """Kubernetes' name of devices; also the taint of their machines, which pods tolerate."""
    spot_label: Annotated[str, StringConstraints(pattern=r"^[\w./-]+=[\w.-]+$")] | None = None
    """Label of spot machines, KEY=VALUE, for node types with `spot`."""
    token_secret: Name | None = None
    """A secret with the key `auth_token`; when not given, KubeRay makes one."""
    job: str = "heliostat train digits --set scale.workers=2"
    """Command of the RayJob."""


class Mlflow(Spec):
    """The MLflow server on the head. Jobs reach it over the private network, users through SSH."""

    port: int = Field(default=5000, ge=1, le=65535)
    database: str | None = None
    """SQLAlchemy URI; SQLite on the head's disk when not given."""
    artifacts: ShellWord | None = None
    """Folder or URI; the head's disk when not given."""
    auth: bool = False
    """Use MLflow's basic authentication, with a password derived from the cluster's token."""

    @field_validator("database")
    @classmethod
    def _no_password(cls, database: str | None) -> str | None:
        if database is not None and ":" in database.rpartition("@")[0].partition("://")[2]:
            raise ValueError("keep the password out of this file: give it in ~/.pgpass on the head")
        return database


class ClusterSpec(Spec):
    name: Name
    python: ShellWord = "python3"
    """Python on the hosts, from which the virtual environment is made."""
    setup: Literal["install", "installed"] = "install"
    """install: set up each host. installed: the hosts have Heliostat in `venv`."""
    venv: ShellWord = "~/venv"
    """Virtual environment on the hosts."""
    ssh: Ssh = Ssh()
    idle_minutes: float = Field(10, gt=0)
    fallback_after_s: float | None = Field(300, ge=0)
    """On-demand nodes take over when spot nodes were unavailable for so long; null for never."""
    state: ShellWord | None = None
    """Where Ray's state survives the loss of the head: a folder on a disk that outlives the head,
    or redis://HOST:PORT."""
    storage: ShellWord | None = None
    """Folder that all nodes share, for the runs of jobs whose spec has a relative `storage`. When
    not given, these are in the home folder of the head."""
    metrics: bool = False
    """Run Prometheus on the head, which scrapes every node."""
    tags: dict[Tag, Tag] = {}
    """Tags of every machine, for the cloud's bill."""
    head: NodeType
    workers: dict[Name, WorkerType] = Field(min_length=1)
    mlflow: Mlflow = Mlflow()
    aws: Aws | None = None
    gcp: Gcp | None = None
    azure: Azure | None = None
    local: Local | None = None
    kuberay: Kuberay | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ClusterSpec":
        if self.aws is not None and (self.ssh.key is None) != (self.aws.key_name is None):
            raise ValueError("ssh.key and aws.key_name: give both or neither")
        if "head" in self.workers:
            raise ValueError("workers.head: this name is reserved for the head")
        if self.kuberay is not None:
            if self.kuberay.pods.keys() != {"head", *self.workers}:
                kinds = ", ".join(["head", *self.workers])
                raise ValueError(f"kuberay.pods: must have exactly the keys {kinds}")
            if self.mlflow.auth and self.kuberay.token_secret is None:
                raise ValueError("kuberay.token_secret: is required for mlflow.auth")
        return self


def read_cluster_spec(path: Path) -> ClusterSpec:
    """Read the spec in a file. Raises SpecError with one line per mistake."""
    return validate(ClusterSpec, read_yaml(path))
