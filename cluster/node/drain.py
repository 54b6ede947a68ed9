"""Drain Ray nodes: `python -m cluster.node.drain ADDRESS DEADLINE DESCRIPTION NODE...`.

It is a program of its own, so that the preemption agent need not load Ray and survives what Ray's
client does when the head is gone: it ends the process. Exit code 0: Ray has accepted every node.
"""

import sys

from cluster.connection.ray_internals import drain_node


def drain_nodes(address: str, deadline: float, description: str, nodes: list[str]) -> str | None:
    """Tell the GCS at `address` that `nodes` will be preempted at `deadline` (Unix time).

    Ray places no new work on them; running work is notified and goes on. Returns the reason if
    Ray refuses a node, otherwise None.
    """
    for node in nodes:
        if refusal := drain_node(address, node, deadline, description):
            return f"node {node[:8]}: {refusal}"
    return None


if __name__ == "__main__":
    address, deadline, description, *nodes = sys.argv[1:]
    sys.exit(drain_nodes(address, float(deadline), description, nodes))
