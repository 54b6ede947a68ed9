"""What a cluster is doing: its nodes, their devices, what runs, and what it costs per hour."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.base.labels import USD_PER_HOUR
from cluster.connection.job_server_client import call_api

if TYPE_CHECKING:
    from rich.console import Console

DEVICES = ("GPU", "TPU", "HPU", "neuron_cores")


@dataclass(frozen=True)
class NodeStatus:
    address: str
    node_type: str
    """The node type of the cluster's file."""
    is_head: bool
    resources: Mapping[str, float]
    usd_per_hour: float | None
    """None where nobody said what it costs."""

    def devices(self) -> str:
        """Its accelerators with their kind, as `4 x A100`."""
        kinds = [name.rpartition(":")[2] for name in self.resources if "accelerator_type:" in name]
        counts = [(self.resources[name], name) for name in DEVICES if name in self.resources]
        return ", ".join(f"{count:g} x {(kinds or [name])[0]}" for count, name in counts) or "-"


def list_nodes(dashboard: str) -> list[NodeStatus]:
    """The nodes that take part, the head first."""
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
    """An amount; memory comes as a text such as `1.5 GiB`."""
    try:
        return float(value)
    except ValueError:
        number, _, unit = str(value).partition(" ")
        return float(number) * float(1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit))


def list_running_jobs(dashboard: str) -> list[str]:
    """What was submitted and has not ended, whoever submitted it; a line each."""
    return [
        f"{row['submission_id'] or row['job_id']}  {row['status'].lower()}  {row['entrypoint']}"
        for row in call_api(dashboard, "GET", "/api/jobs/", timeout_s=10)
        if row["status"] in ("PENDING", "RUNNING")
    ]


def cost_line(nodes: Iterable[NodeStatus]) -> str:
    """What the nodes cost together; what is unknown is not counted as nothing."""
    nodes = list(nodes)
    known = [node.usd_per_hour for node in nodes if node.usd_per_hour is not None]
    if not known:
        return "cost: unknown, no node has a price"
    line = f"cost: ${sum(known):.2f} per hour"
    unknown = len(nodes) - len(known)
    return line + (f" for {len(known)} nodes; unknown for {unknown}" if unknown else "")


def print_status(console: "Console", dashboard: str) -> None:
    """Print nodes, jobs and cost."""
    from rich.table import Table

    nodes, jobs = list_nodes(dashboard), list_running_jobs(dashboard)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("node", "type", "CPUs", "devices", "memory", "$/h"):
        table.add_column(title)
    for node in nodes:
        table.add_row(
            node.address,
            node.node_type,
            f"{node.resources.get('CPU', 0):g}",
            node.devices(),
            f"{node.resources.get('memory', 0) / 2**30:.1f} GiB",
            "unknown" if node.usd_per_hour is None else f"{node.usd_per_hour:.3f}",
        )
    console.print(f"{len(nodes)} nodes")
    console.print(table)
    for line in jobs or ["nothing runs"]:
        console.print(line, markup=False)
    console.print(cost_line(nodes))
