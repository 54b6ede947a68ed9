"""The connection to Ray: the cluster that the user names, or a local one that ends with us."""

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.base.errors import ClusterError
from cluster.connection.auth_token import read_token


@contextlib.contextmanager
def ray_session(
    address: str | None = None, code_folder: Path | None = None, exclude: tuple[str, ...] = ()
) -> Iterator[bool]:
    """Connect to `address`, else to RAY_ADDRESS, else to this machine's Ray, else start one.

    `code` is a folder of the user's that workers must be able to import from; it travels with
    the job, without what `exclude` names in gitignore's notation. A Ray that was started here is
    stopped at the end; a connection that was there before is used and left alone.
    Yields whether the Ray was started here, so that it cannot grow.
    Raises ClusterError when the cluster does not answer.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    runtime_env: dict[str, Any] = {}
    # A submitted job brings its own working directory, which Ray lets nobody change.
    if code_folder is not None and submission_metadata() is None:
        runtime_env = {"working_dir": str(code_folder), "excludes": list(exclude)}
    address = address or os.environ.get("RAY_ADDRESS")
    if address and read_token():
        # Ray turns authentication on by itself for a cluster it starts, never for a client.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    here = not address
    if here and not local_ray_answers():
        # Ray would wait for minutes for one that was killed.
        address = "local"
        # Nobody takes this machine away with a notice; the watcher is a process for nothing.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        ray.init(
            address=address,
            runtime_env=runtime_env,
            include_dashboard=False if here else None,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises Exception itself where a node does not start in time
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if cause := str(error.__cause__ or "").strip():
            reason = f"{reason}: {cause.splitlines()[-1]}"
        where = "a local Ray" if here else f"the cluster at {address}"
        raise ClusterError(f"cannot connect to {where}: {reason}") from error
    _remove_stale_placement_groups()
    try:
        yield bool(ray._private.worker._global_node.is_head())
    finally:
        ray.shutdown()


def submission_metadata() -> dict[str, str] | None:
    """The metadata of the Ray job that this process is the driver of; None when it is none."""
    config = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return dict(json.loads(config).get("metadata") or {}) if config else None


def base_folder() -> Path:
    """The folder from which relative places are meant: the working folder.

    In a submitted job that is Ray's copy of it, which does not outlive the job. There it is the
    cluster's storage, HELIOSTAT_STORAGE, or the home folder where the cluster names none.
    """
    if submission_metadata() is None:
        return Path.cwd()
    return Path(os.environ.get("HELIOSTAT_STORAGE") or Path.home())


def _remove_stale_placement_groups() -> None:
    """Give back what earlier starts of this job still reserve.

    Ray frees a driver's placement groups when it hears of its end. Of a driver that went with
    its node it may not hear while the nodes of its workers live on, and its groups would keep
    the devices that this start waits for.
    """
    name = (submission_metadata() or {}).get("heliostat.name")
    if name is None:
        return
    import ray
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    state = ray._private.state.state._connect_and_get_accessor()
    own = bytes.fromhex(ray.get_runtime_context().get_job_id())
    drivers = [gcs_pb2.JobTableData.FromString(each) for each in state.get_job_table()]
    ended = {each.job_id for each in drivers if each.config.metadata["heliostat.name"] == name}
    for data in state.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(data)
        removed = group.state == gcs_pb2.PlacementGroupTableData.REMOVED
        if group.creator_job_id in ended - {own} and not removed:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def local_ray_answers(address_file: Path = Path("/tmp/ray/ray_current_cluster")) -> bool:
    """Whether the Ray that was started last on this machine, as `note` has it, answers."""
    try:
        host, _, port = address_file.read_text().strip().rpartition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def missing_resources(workers: int, per_worker: dict[str, float]) -> str | None:
    """What the cluster lacks today for `workers` workers, in one phrase, or None."""
    import ray

    have = ray.cluster_resources()
    for resource, amount in per_worker.items():
        if amount * workers > have.get(resource, 0):
            return (
                f"{workers} x {amount:g} {resource} asked for, "
                f"the cluster has {have.get(resource, 0):g}"
            )
    return None
