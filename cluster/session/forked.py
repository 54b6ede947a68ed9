"""Starts a Ray whose Python processes are forked: `python -m cluster.session.forked ray start ...`.

For the nodes of a cluster. The node's session lives as long as this Ray, whose workers, actors and
drivers of jobs it forks. Without a session it is `ray start`.
"""

import contextlib
import sys

from cluster.connection.ray_internals import run_ray_command
from cluster.session.session import find_or_start_session
from cluster.zygote.python_for_ray import forked_processes

CLUSTER_RAY = "cluster"
"""The name of a cluster's Ray in its session."""


def main(words: list[str]) -> None:
    if words[:1] != ["ray"]:
        sys.exit("usage: python -m cluster.session.forked ray start ...")
    session = find_or_start_session()
    with (
        contextlib.nullcontext()
        if session is None
        else forked_processes(session.folder, CLUSTER_RAY)
    ):
        run_ray_command(words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
