"""Take nodes out of Ray with notice: `python -m cluster.node.drain ADDRESS DEADLINE WHAT NODE...`.

A program of its own, so that the agent that watches for notices need not load Ray, and outlives
what Ray's client does to a process when the head is gone: it ends it. Exit code 0: all is known.
"""

import sys


def drain_nodes(address: str, deadline: float, description: str, nodes: list[str]) -> str | None:
    """Tell the Ray at `address` that `nodes` are taken away at `deadline` (Unix time).

    New work avoids them; what runs there is told and goes on. Returns why Ray refused, or None.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    client = GcsClient(address=address)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    for node in nodes:
        accepted, why = client.drain_node(node, reason, description, round(deadline * 1000))
        if not accepted:
            return f"node {node[:8]}: {why}"
    return None


if __name__ == "__main__":
    address, deadline, what, *nodes = sys.argv[1:]
    sys.exit(drain_nodes(address, float(deadline), what, nodes))
