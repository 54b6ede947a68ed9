"""Everything of Ray's core that is used here and is not part of its public API.

Each item says why it is needed, and was read in Ray `READ_IN_RELEASE`. For each of them
`tests/cluster/connection/test_ray_internals.py` has a test that fails, and says what to do, when
another release has changed it. What is private to Ray Train and Ray Tune is in `trainers.runs` and
`tuning.fused`.

This module imports nothing of ours, and Ray only inside functions: the programs on the nodes and
the command line must start without it.
"""

import contextlib
import logging
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ_IN_RELEASE = "2.60.0"
"""The release of Ray in which every item was read."""

HEAD_CLUSTER_FILE = Path("~/ray_bootstrap_config.yaml")
"""The cluster's file as JSON, prepared by the launcher. `ray up` copies it to the head, where the
autoscaler reads it anew before each decision. No API changes node types on a running cluster."""

LAUNCHER_V2_ENV_VAR = "RAY_UP_enable_autoscaler_v2"
"""Whether `ray up` starts autoscaler v2 ("1") or v1 ("0"); the file has no field for it."""

STARTUP_TIMEOUT_MESSAGE = "timed out during startup"
"""Part of what `ray start` prints when it gives up on a head that is slow; its exit code is that
of any other failure."""

SESSION_METRICS_FOLDER = Path("/tmp/ray/session_latest/metrics")
"""Where the head's dashboard writes the configuration of Prometheus and Grafana. Ray documents the
files in this folder, not when they are there."""

DASHBOARD_AGENT_PORT = 52365
"""The default port of Ray's dashboard agent, which runs on every node; an open one shows that Ray
runs there, without a token."""

RAYLET_FLAGS = {"node_id": "node_id", "ip": "node_ip_address", "gcs_address": "gcs-address"}
"""Flags of a raylet's command line that identify its node: our name -> the flag. The public API
needs a connected driver, which takes 70 MB and a second on every node."""

JOB_CONFIG_ENV_VAR = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable of a submitted job's driver: the job's configuration with its metadata, as
JSON. The public way asks the dashboard, which a driver on another node may not reach."""

JOB_STOP_WAIT_ENV_VAR = "RAY_JOB_STOP_WAIT_TIME_S"
"""Environment variable of a job: the seconds between its SIGTERM and its SIGKILL."""

JOB_EXISTS_MESSAGE = "already exists"
"""Part of the job server's answer when a submission id is taken; its HTTP status, 500, is that of
many other failures."""

LOST_DRIVER_ERRORS = (
    "JOB_SUPERVISOR_ACTOR_DIED",
    # A new head also says this of a supervisor that is gone.
    "JOB_SUPERVISOR_ACTOR_START_FAILURE",
    "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE",
)
"""Values of a job's `error_type` that mean that Ray lost the driver. The field is public, and its
values are not documented."""

PREEMPTION_WATCHER_ENV_VAR = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Whether each training run starts Ray Train's watcher for preempted nodes ("0": no). Set before
`ray.init`, hence here and not with the other internals of Ray Train."""


@dataclass(frozen=True)
class PlacementGroupInfo:
    """A placement group as the GCS stores it."""

    id: str
    """Hex, as `PlacementGroup.id.hex()`."""
    job_id: str
    """Hex, as `ray.get_runtime_context().get_job_id()` of the driver that created it."""
    state: str
    """PENDING, PREPARED, CREATED, REMOVED or RESCHEDULING."""
    bundles: tuple[tuple[str, dict[str, float]], ...]
    """For each bundle the id of its node (hex, empty before it is placed) and its resources."""


def drain_node(address: str, node_id: str, deadline_s: float, message: str) -> str | None:
    """Tell the GCS at `address` that a node will be preempted at `deadline_s` (Unix time).

    Returns Ray's reason for refusing, or None.

    There is no public API. The command `ray drain-node` does the same, but is hidden, and Ray's
    documentation excludes it from its promises of stability.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = round(deadline_s * 1000)
    accepted, refusal = GcsClient(address=address).drain_node(node_id, reason, message, deadline_ms)
    return None if accepted else str(refusal)


def current_cluster_file() -> Path:
    """The file with the address of the Ray that was started last on this machine.

    `ray.init()` reads it as well, but waits for minutes for a Ray that was killed and left its
    address behind; no public function only looks.
    """
    from ray._common.utils import get_ray_address_file

    return Path(get_ray_address_file(None))


def autoscaler_status(gcs_address: str) -> Any:
    """Nodes and launches as autoscaler v2 sees them, a `ray.autoscaler.v2.schema.ClusterStatus`.

    Public APIs say nothing about launches that a cloud refused: `ray status` prints text.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(gcs_address)


def free_resources_by_node() -> dict[str, dict[str, float]]:
    """Node id (hex) -> the resources that are not reserved there.

    `ray.available_resources()` is the sum over all nodes, and `ray.nodes()` has totals only.
    """
    from ray._private.state import available_resources_per_node

    return dict(available_resources_per_node())


def placement_groups() -> list[PlacementGroupInfo]:
    """All placement groups that the GCS knows, removed ones included.

    `ray.util.placement_group_table()` does not say which job created a group, and Ray Train and
    Ray Tune create theirs without names. `ray.util.state` needs a dashboard, which a local Ray
    here does not have.
    """
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    groups = map(PlacementGroupTableData.FromString, _accessor().get_placement_group_table())
    return [
        PlacementGroupInfo(
            id=group.placement_group_id.hex(),
            job_id=group.creator_job_id.hex(),
            state=PlacementGroupTableData.PlacementGroupState.Name(group.state),
            bundles=tuple(
                (bundle.node_id.hex(), dict(bundle.unit_resources)) for bundle in group.bundles
            ),
        )
        for group in groups
    ]


def job_metadata() -> dict[str, dict[str, str]]:
    """Job id (hex) of each driver, running or ended -> the metadata it was submitted with.

    The public lists of jobs need the dashboard, and give a driver's job id for submitted jobs only.
    """
    from ray.core.generated.gcs_pb2 import JobTableData

    jobs = map(JobTableData.FromString, _accessor().get_job_table())
    return {job.job_id.hex(): dict(job.config.metadata) for job in jobs}


def _accessor() -> Any:
    """The connection to the GCS's tables; a driver has to be connected."""
    from ray._private.state import state

    return state._connect_and_get_accessor()


def launcher_state_file(cluster_name: str) -> Path:
    """Where the launcher remembers the hosts of an on-premises cluster on this machine.

    It takes a head that was replaced by an empty machine for one that is set up. `ray down`, which
    would delete the file, first stops the head.
    """
    from ray.autoscaler._private.local.config import get_state_path

    return Path(get_state_path(cluster_name))


def find_head(file: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The address of a cloud cluster's head, and the `auth` section with the provider's defaults.

    `config` is the content of `file`. Asks the cloud, prints, and raises whatever the provider's
    library raises. `ray.autoscaler.sdk` is an API for developers that may change with any release;
    the stable command `ray get-head-ip` prints the address and nothing about the SSH key.
    """
    from ray.autoscaler import sdk

    auth = sdk.bootstrap_config(dict(config))["auth"]
    return sdk.get_head_node_ip(str(file)), dict(auth)


def launcher_command() -> list[str]:
    """The command `ray` of this Python; the one on PATH may belong to another environment."""
    return [sys.executable, "-m", "ray.scripts.scripts"]


def run_ray_command(words: list[str]) -> None:
    """Run the command `ray WORDS...` in this process, and end it.

    A process of its own would build the commands of Ray's processes from its own `sys.executable`.
    """
    sys.argv = ["ray", *words]
    runpy.run_module("ray.scripts.scripts", run_name="__main__", alter_sys=True)


def prepare_launcher_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """A file for `ray up` with the launcher's defaults filled in, which is what `ray up` runs.

    `ray.autoscaler.sdk.fillout_defaults` leaves out the common set-up commands and each type's
    number of workers, and `bootstrap_config` of the same module asks the cloud.
    """
    from ray.autoscaler._private.util import prepare_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    return dict(prepare_config(dict(config)))


def validate_launcher_file(prepared: Mapping[str, Any]) -> None:
    """Check a prepared file against the launcher's schema and rules.

    Raises jsonschema's ValidationError, or ValueError or RuntimeError. Public functions validate
    only while they start a cluster.
    """
    from ray.autoscaler._private.util import validate_config

    validate_config(dict(prepared))


FORKED_RAY_SETTINGS = {
    # A worker that is started before it is needed is never used: each actor of Ray Train and Tune
    # has variables of its own. `ray.init` waits for it all the same.
    "RAY_prestart_worker_first_driver": "0",
    # The agents see by a pipe, not by their parent, whether the raylet lives: their parent is the
    # zygote. Otherwise they end, and the raylet with them.
    "RAY_enable_pipe_based_agent_to_parent_health_check": "1",
}
"""Environment variables of a Ray whose Python processes are forked; none is documented."""


def reload_configuration() -> None:
    """Have a forked process read Ray's settings and token from its own environment.

    Ray's C++ part reads RAY_* once, when it is imported. No public function reads them again.
    """
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")


@contextlib.contextmanager
def undrawn_identifiers() -> Iterator[None]:
    """Within this context, modules with actor classes can be imported before a fork.

    Such a module draws a random identifier of the class. That seeds Ray's generator, whose state
    all forked children would have, and they would draw the same identifiers of workers and objects.
    """
    import ray.actor

    drawn: Any = ray.actor.ActorClassID

    class ActorClassID:
        """Draws identifiers from the system's generator instead."""

        @staticmethod
        def from_random() -> Any:
            return drawn(os.urandom(drawn.size()))

    ray.actor.ActorClassID = ActorClassID
    try:
        yield
    finally:
        ray.actor.ActorClassID = drawn


def other_drivers() -> list[str]:
    """The ids of the jobs of the connected Ray that run, without this process's."""
    import ray
    from ray.core.generated.gcs_pb2 import JobTableData

    own = ray.get_runtime_context().get_job_id()
    jobs = map(JobTableData.FromString, _accessor().get_job_table())
    return [job.job_id.hex() for job in jobs if not job.is_dead and job.job_id.hex() != own]


def leftovers_of_jobs() -> list[str]:
    """What ended drivers have left in the connected Ray: actors, placement groups, resources.

    `ray.util.state` needs a dashboard, and `ray.nodes()` says nothing about actors.
    """
    import ray
    from ray._private.state import state

    actors = state.actor_table(None).values()
    left = [f"actor {each['ActorID']}" for each in actors if each["State"] != "DEAD"]
    groups = [group for group in placement_groups() if group.state != "REMOVED"]
    left += [f"placement group {group.id}" for group in groups]
    free = ray.available_resources()
    for name, amount in ray.cluster_resources().items():
        if free.get(name, 0.0) < amount and name != "object_store_memory":
            left.append(f"reserved {name}")
    return left
