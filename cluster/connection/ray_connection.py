"""The driver's connection to Ray: a given cluster, or a local Ray that ends with this process."""

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
from cluster.connection.ray_internals import (
    JOB_CONFIG_ENV_VAR,
    PREEMPTION_WATCHER_ENV_VAR,
    current_cluster_file,
    job_metadata,
    placement_groups,
)


@contextlib.contextmanager
def ray_session(
    address: str | None = None, code_folder: Path | None = None, exclude: tuple[str, ...] = ()
) -> Iterator[bool]:
    """Connect to `address`, else to RAY_ADDRESS, else to this machine's Ray, else start one.

    `code_folder` is a folder of the user's from which workers import. It is uploaded with the
    job, without the files that `exclude` names in the notation of .gitignore. A Ray that was
    started here is stopped at the end; an existing connection is used and left open.
    Yields whether Ray was started here, in which case it cannot grow.
    Raises ClusterError if the cluster does not answer.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    runtime_env: dict[str, Any] = {}
    # A submitted job already has a working directory, and Ray does not let a driver change it.
    if code_folder is not None and submission_metadata() is None:
        runtime_env = {"working_dir": str(code_folder), "excludes": list(exclude)}
    address = address or os.environ.get("RAY_ADDRESS")
    if address and read_token():
        # Ray enables authentication by itself for a cluster that it starts, never for a client.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    on_this_machine = not address
    if on_this_machine and not local_ray_answers(current_cluster_file()):
        # Without an address Ray would wait for minutes for one that was killed.
        address = "local"
        # This machine gets no preemption notices, so the watcher would be a process for nothing.
        os.environ.setdefault(PREEMPTION_WATCHER_ENV_VAR, "0")
    try:
        ray.init(
            address=address,
            runtime_env=runtime_env,
            include_dashboard=False if on_this_machine else None,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises Exception itself if a node does not start in time
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if cause := str(error.__cause__ or "").strip():
            reason = f"{reason}: {cause.splitlines()[-1]}"
        target = "a local Ray" if on_this_machine else f"the cluster at {address}"
        raise ClusterError(f"cannot connect to {target}: {reason}") from error
    _remove_stale_placement_groups()
    try:
        yield address == "local"
    finally:
        ray.shutdown()


def submission_metadata() -> dict[str, str] | None:
    """The metadata of the submitted Ray job whose driver this process is; None in any other."""
    config = os.environ.get(JOB_CONFIG_ENV_VAR)
    return dict(json.loads(config).get("metadata") or {}) if config else None


def base_folder() -> Path:
    """The folder to which relative paths of a spec refer: the working folder.

    In a submitted job the working folder is Ray's copy, which is deleted with the job. There
    this is HELIOSTAT_STORAGE, the cluster's storage, or the home folder if that is not set.
    """
    if submission_metadata() is None:
        return Path.cwd()
    return Path(os.environ.get("HELIOSTAT_STORAGE") or Path.home())


def _remove_stale_placement_groups() -> None:
    """Remove placement groups that earlier attempts of this job still hold.

    Ray frees a driver's placement groups when it learns that the driver has ended. If the driver
    was lost with its node, while the nodes of its workers live on, Ray may not learn of it, and
    the groups would keep the devices that this attempt waits for.
    """
    name = (submission_metadata() or {}).get("heliostat.name")
    if name is None:
        return
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    attempts = {
        job for job, metadata in job_metadata().items() if metadata.get("heliostat.name") == name
    }
    earlier = attempts - {ray.get_runtime_context().get_job_id()}
    for group in placement_groups():
        if group.job_id in earlier and group.state != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group.id)))


def local_ray_answers(address_file: Path) -> bool:
    """Whether the Ray that was started last on this machine still accepts connections.

    `address_file` has its address (`ray_internals.current_cluster_file`).
    """
    try:
        host, _, port = address_file.read_text().strip().rpartition(":")
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def missing_resources(workers: int, per_worker: dict[str, float]) -> str | None:
    """The first resource of which the cluster has too little for `workers` workers, or None."""
    import ray

    available = ray.cluster_resources()
    for resource, amount in per_worker.items():
        if amount * workers > available.get(resource, 0):
            return (
                f"{workers} x {amount:g} {resource} requested, "
                f"the cluster has {available.get(resource, 0):g}"
            )
    return None
