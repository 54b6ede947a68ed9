"""The driver's connection to Ray: a given cluster, the session's warm Ray, or one of its own."""

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.base.errors import ClusterError
from cluster.connection.auth_token import read_token
from cluster.connection.ray_connection import local_ray_answers, submission_metadata
from cluster.connection.ray_internals import (
    PREEMPTION_WATCHER_ENV_VAR,
    current_cluster_file,
    job_metadata,
    placement_groups,
    reload_configuration,
)
from cluster.session.session import RayLease, find_or_start_session

COMMAND_ENV_VAR = "HELIOSTAT_COMMAND"
"""Variable of the workers in the session's Ray: a random word, another one for each command."""


@contextlib.contextmanager
def ray_session(
    address: str | None = None,
    pack_code: Callable[[], bytes] | None = None,
    keep_warm_s: float | None = None,
) -> Iterator[bool]:
    """Connect to `address`, else to RAY_ADDRESS, else to this machine's Ray, else to the session's.

    `pack_code` makes a zip of the working folder if the user's code is in it, and a cluster's
    workers import from that. Workers of the session's Ray have the working folder itself. That Ray
    stays for `keep_warm_s` after its last use; where there can be no session, a Ray is started and
    stopped at the end. An existing connection is used and left open.
    Yields whether Ray is this machine's alone, in which case it cannot grow.
    Raises ClusterError if the cluster does not answer.
    """
    import ray

    if ray.is_initialized():
        yield False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    on_this_machine = not address
    lease: RayLease | None = None
    if on_this_machine and not local_ray_answers(current_cluster_file()):
        # This machine gets no preemption notices, so the watcher would be a process for nothing.
        os.environ.setdefault(PREEMPTION_WATCHER_ENV_VAR, "0")
        lease = _lease_warm_ray()
        # Without an address Ray would wait for minutes for one that was killed.
        address = lease.address if lease else "local"
    is_alone = lease is not None or address == "local"
    # A submitted job already has a working directory, and Ray does not let a driver change it.
    has_code = is_alone or submission_metadata() is not None
    package = pack_code() if pack_code is not None and not has_code else None
    if address != "local" and read_token():
        # Ray enables authentication by itself for a cluster that it starts, never for a client.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        reload_configuration()
    try:
        with _runtime_env(package, lease is not None) as runtime_env:
            ray.init(
                address=address,
                runtime_env=runtime_env,
                include_dashboard=False if on_this_machine and not lease else None,
                logging_level=logging.WARNING,
            )
    except Exception as error:  # Ray raises Exception itself if a node does not start in time
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if cause := str(error.__cause__ or "").strip():
            reason = f"{reason}: {cause.splitlines()[-1]}"
        target = "a local Ray" if on_this_machine else f"the cluster at {address}"
        raise ClusterError(f"cannot connect to {target}: {reason}") from error
    if lease is not None:
        lease.keep_command_state(ray.get_runtime_context().get_job_id())
    _remove_stale_placement_groups()
    try:
        yield is_alone
    finally:
        ray.shutdown()
        if lease is not None:
            lease.release(keep_warm_s)


@contextlib.contextmanager
def _runtime_env(package: bytes | None, is_leased: bool) -> Iterator[dict[str, Any]]:
    """The workers' environment; a zip for their working folder is read by Ray in here.

    In a Ray that other commands have used, a variable keeps its workers apart: Ray 2.60 gives a
    worker that was started for one job and never used to the next job with the same environment,
    and it would have the variables and the working folder of the earlier command.
    """
    if package is None:
        yield {"env_vars": {COMMAND_ENV_VAR: secrets.token_hex(8)}} if is_leased else {}
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "working_dir.zip"
        file.write_bytes(package)
        yield {"working_dir": str(file)}


def _lease_warm_ray() -> RayLease | None:
    session = find_or_start_session()
    return session.lease_ray() if session is not None else None


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
