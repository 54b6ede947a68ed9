"""Ray's nodes on this machine, found in the list of processes, without loading Ray."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.connection.ray_internals import RAYLET_FLAGS

NODE_IP_VAR = "HELIOSTAT_NODE_IP"
"""Environment variable: the address of the one Ray node to consider, if a machine has several."""


@dataclass(frozen=True)
class Raylet:
    """The process of a Ray node, and what its command line says."""

    pid: int
    node_id: str
    ip: str
    gcs_address: str
    """The address of the cluster's GCS."""


def local_raylets(proc: Path = Path("/proc")) -> Iterator[Raylet]:
    """The Ray nodes on this machine, or only the one at HELIOSTAT_NODE_IP if that is set."""
    wanted = os.environ.get(NODE_IP_VAR)
    for folder in proc.glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        if Path(words[0]).name != "raylet":
            continue
        flags = dict(
            word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word
        )
        values = {field: flags[flag] for field, flag in RAYLET_FLAGS.items()}
        if wanted in (None, values["ip"]):
            yield Raylet(int(folder.name), **values)
