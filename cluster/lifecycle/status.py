"""The state of a running cluster: its nodes and their devices, its jobs, and its cost per hour."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.base.labels import USD_PER_HOUR
from cluster.connection.job_server_client import call_api

DEVICES = ("GPU", "TPU", "HPU", "neuron_cores")
"""Ray's resources that are accelerators."""


@dataclass(frozen=True)
class NodeStatus:
    """A living node of a cluster."""

    address: str
    node_type: str
    """The node's type in the cluster's file."""
    is_head: bool
    resources: Mapping[str, float]
    usd_per_hour: float | None
    """None if its price is unknown."""

    def devices(self) -> str:
        """The node's accelerators with their model, such as `4 x A100`."""
        models = [name.rpartition(":")[2] for name in self.resources if "accelerator_type:" in name]
        counts = [(self.resources[name], name) for name in DEVICES if name in self.resources]
        return ", ".join(f"{count:g} x {(models or [name])[0]}" for count, name in counts) or "-"


def list_nodes(dashboard: str) -> list[NodeStatus]:
    """The living nodes, the head first."""
    answer = call_api(dashboard, "GET", "/api/v0/nodes?limit=10000&detail=true", timeout_s=10)
    rows = answer["data"]["result"]["result"]
    nodes = [_parse_node(row) for row in rows if row["state"] == "ALIVE"]
    return sorted(nodes, key=lambda node: (not node.is_head, node.node_type, node.address))


def _parse_node(row: Mapping[str, Any]) -> NodeStatus:
    labels = row.get("labels") or {}
    price = labels.get(USD_PER_HOUR)
    return NodeStatus(
        address=row["node_ip"],
        node_type="head" if row["is_head_node"] else labels.get("ray.io/node-group", "worker"),
        is_head=row["is_head_node"],
        resources={name: _parse_amount(value) for name, value in row["resources_total"].items()},
        usd_per_hour=float(price) if price else None,
    )


def _parse_amount(value: Any) -> float:
    """An amount of a resource; the API sends memory as text, such as `1.5 GiB`."""
    try:
        return float(value)
    except ValueError:
        number, _, unit = str(value).partition(" ")
        return float(number) * float(1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit))


def list_running_jobs(dashboard: str) -> list[str]:
    """A line for each job that has not ended, Heliostat's and others."""
    return [
        f"{row['submission_id'] or row['job_id']}  {row['status'].lower()}  {row['entrypoint']}"
        for row in call_api(dashboard, "GET", "/api/jobs/", timeout_s=10)
        if row["status"] in ("PENDING", "RUNNING")
    ]


def cost_line(nodes: Iterable[NodeStatus]) -> str:
    """The cost of all nodes; nodes without a price are counted apart, not as free."""
    nodes = list(nodes)
    known = [node.usd_per_hour for node in nodes if node.usd_per_hour is not None]
    if not known:
        return "cost: unknown, no node has a price"
    line = f"cost: ${sum(known):.2f} per hour"
    unknown = len(nodes) - len(known)
    return line + (f" for {len(known)} nodes; unknown for {unknown}" if unknown else "")
