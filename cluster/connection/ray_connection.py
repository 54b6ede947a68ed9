"""What a driver asks about its connection to Ray: the submitted job, the local Ray, resources."""

import json
import os
import socket
from pathlib import Path

from cluster.connection.ray_internals import JOB_CONFIG_ENV_VAR


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


def room_for(needs: dict[str, float]) -> int:
    """How many times the cluster's machines, if they were idle, have these resources together."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(int(machine.get(name, 0) / amount + 1e-9) for name, amount in needs.items() if amount)
        for machine in machines
    )


def missing_resources(workers: int, per_worker: dict[str, float]) -> str | None:
    """What the cluster lacks for `workers` workers, each of them on one machine, or None."""
    import ray

    available = ray.cluster_resources()
    for resource, amount in per_worker.items():
        if amount * workers > available.get(resource, 0):
            return (
                f"{workers} x {amount:g} {resource} requested, "
                f"the cluster has {available.get(resource, 0):g}"
            )
    room = room_for(per_worker)
    if room >= workers:
        return None
    needs = " and ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    return f"{workers} x {needs} requested, the cluster's machines have room for {room}"
