"""What a cluster is: one small file, from which the files of all providers are rendered.

A kind of node is described once, with the instance that plays it at each provider. What an
instance has (CPUs, devices, memory) is looked up in the catalogue unless the file says it.
"""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, StringConstraints, field_validator, model_validator

from cluster.base.config import Spec, read_yaml, validate

Provider: TypeAlias = Literal["aws", "gcp", "azure", "local", "kuberay"]
Cloud: TypeAlias = Literal["aws", "gcp", "azure"]
Name: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")]
"""Lower case, digits and dashes: what all providers and Kubernetes allow in a name."""
Tag: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][-_a-z0-9]{0,62}$")]
"""What AWS's tags, GCP's labels, Azure's tags and Kubernetes' labels allow all four."""
ShellWord: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[^\s'\"\\$`]+$")]
"""A word that stands in a shell command as it is."""

SHIPPED_SPEC = Path(__file__).parent / "launch" / "heliostat.yaml"


class NodeType(Spec):
    """One kind of node. Provider `local` takes its hosts as they are."""

    instance: dict[Cloud, ShellWord] = {}
    """The instance type at each cloud."""
    cpus: int | None = Field(None, ge=0)
    """CPUs that Ray hands out; those of the instance when not given."""
    gpus: int | None = Field(None, ge=0)
    """Devices that Ray hands out; those of the instance when not given."""
    disk_gb: int = Field(100, ge=10)
    labels: dict[str, str] = {}
    """Ray labels, beside those of price and market that are always there."""


class WorkerType(NodeType):
    """A kind of node that comes and goes with the work."""

    min: int = Field(0, ge=0)
    max: int = Field(1, ge=1)
    spot: bool = False
    """Spot instances, with an on-demand kind beside them where `fallback_after_s` is given."""

    @model_validator(mode="after")
    def _bounds(self) -> "WorkerType":
        if self.min > self.max:
            raise ValueError(f"min is {self.min} but max is {self.max}")
        return self


class Ssh(Spec):
    user: ShellWord = "ubuntu"
    key: ShellWord | None = None
    """Private key; when not given, a cloud's launcher makes one, and ssh's own is used on hosts."""


class Aws(Spec):
    region: ShellWord = "us-east-1"
    zones: list[ShellWord] = Field(["us-east-1a", "us-east-1b"], min_length=1)
    ssh_from: list[str] = Field(min_length=1)
    """Networks from which SSH is let in, such as 203.0.113.0/24."""
    image: ShellWord
    """AMI of the head."""
    gpu_image: ShellWord | None = None
    """AMI of nodes with devices; that of the head when not given."""
    key_name: ShellWord | None = None
    """The EC2 key pair that belongs to `ssh.key`."""
    worker_profile: ShellWord | None = None
    """Instance profile of workers, so that they reach their storage; Ray gives them none."""

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
    """Service account of workers, so that they reach their storage; Ray gives them none."""


class Azure(Spec):
    location: ShellWord = "eastus"
    resource_group: ShellWord
    subscription: ShellWord | None = None
    """The one of the Azure command line when not given."""
    image: ShellWord = "Canonical:ubuntu-24_04-lts:server:latest"
    """publisher:offer:sku:version"""
    gpu_image: ShellWord | None = None


class Local(Spec):
    """Hosts of one's own, reached by SSH. Ray detects what they have."""

    head: ShellWord
    """Address of the head on the network that all hosts share."""
    workers: list[ShellWord] = Field(min_length=1)
    min: int | None = Field(None, ge=0)
    """How many of the workers are always in; all when not given."""
    head_resources: dict[str, int] = {"CPU": 0}
    """What Ray hands out on the head, over what it detects; memory in bytes."""
    worker_resources: dict[str, int] = {}
    usd_per_hour: float | None = Field(None, ge=0)
    """What one host costs, for `status` and budgets."""


class Pod(Spec):
    """What a pod asks Kubernetes for; a machine has a little less to give than it has."""

    cpus: int = Field(ge=1)
    gpus: int = Field(0, ge=0)
    memory_gb: int = Field(ge=1)


class Kuberay(Spec):
    namespace: Name = "default"
    image: ShellWord
    """With Ray and Heliostat in it."""
    pods: dict[Name, Pod]
    """Of the head and of each kind of worker."""
    gpu_resource: ShellWord = "nvidia.com/gpu"
    """What the cluster calls its devices; also the taint of their machines that pods tolerate."""
    spot_label: Annotated[str, StringConstraints(pattern=r"^[\w./-]+=[\w.-]+$")] | None = None
    """How machines on spot are labelled, KEY=VALUE, for kinds with `spot`."""
    token_secret: Name | None = None
    """A secret with the key `auth_token`; KubeRay makes one of its own when not given."""
    job: str = "heliostat train digits --set scale.workers=2"
    """The command of the RayJob."""


class Mlflow(Spec):
    """The MLflow server on the head. Jobs reach it over the private network, people by SSH."""

    port: int = Field(default=5000, ge=1, le=65535)
    database: str | None = None
    """SQLAlchemy URI; SQLite on the head's disk when not given."""
    artifacts: ShellWord | None = None
    """Folder or URI; the head's disk when not given."""
    auth: bool = False
    """MLflow's basic authentication, with a password derived from the cluster's token."""

    @field_validator("database")
    @classmethod
    def _no_password(cls, database: str | None) -> str | None:
        if database is not None and ":" in database.rpartition("@")[0].partition("://")[2]:
            raise ValueError("keep the password out of this file: give it in ~/.pgpass on the head")
        return database


class ClusterSpec(Spec):
    name: Name
    python: ShellWord = "python3"
    """The Python on the hosts from which the environment is made."""
    setup: Literal["install", "installed"] = "install"
    """Whether hosts are to be set up, or have Heliostat in `venv` already."""
    venv: ShellWord = "~/venv"
    """The virtual environment on the hosts."""
    ssh: Ssh = Ssh()
    idle_minutes: float = Field(10, gt=0)
    fallback_after_s: float | None = Field(300, ge=0)
    """On-demand nodes take over where spot has been unavailable for so long; null for never."""
    state: ShellWord | None = None
    """Where Ray's state outlives the head: a folder on a disk that does, or redis://HOST:PORT."""
    storage: ShellWord | None = None
    """Folder that all nodes share. There are the runs of jobs whose spec has a relative `storage`;
    in the home folder of the head when not given."""
    metrics: bool = False
    """Prometheus on the head, scraping every node."""
    tags: dict[Tag, Tag] = {}
    """On every machine, for the bill."""
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
            raise ValueError("workers.head: the name is taken by the head")
        if self.kuberay is not None:
            if self.kuberay.pods.keys() != {"head", *self.workers}:
                kinds = ", ".join(["head", *self.workers])
                raise ValueError(f"kuberay.pods: must be of {kinds}")
            if self.mlflow.auth and self.kuberay.token_secret is None:
                raise ValueError("kuberay.token_secret: is required for mlflow.auth")
        return self


def read_cluster_spec(path: Path) -> ClusterSpec:
    """The spec in a file. Raises SpecError with one line per mistake."""
    return validate(ClusterSpec, read_yaml(path))
