"""The instances that a file for Ray's launcher asks for, and what they cost per hour."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.base.labels import FALLBACK_FOR
from cluster.cost.catalog import Instance, find_instance


@dataclass(frozen=True)
class PricedNodeType:
    """One node type of a launcher file, with its price."""

    path: str
    """Dotted path of the instance type in the file."""
    name: str
    instance: str
    spot: bool
    catalog_entry: Instance | None
    """None if the catalogue does not have the instance."""

    @property
    def usd_per_h(self) -> float | None:
        """Price in the snapshot; the on-demand price if the spot price is unknown."""
        if self.catalog_entry is None:
            return None
        usd = self.catalog_entry.usd(self.spot)
        return self.catalog_entry.usd_per_h if usd is None else usd


def priced_node_types(config: Mapping[str, Any]) -> list[PricedNodeType]:
    """The node types of a file, the head's first; none for provider `local`."""
    provider = config["provider"]
    if provider["type"] not in _READERS:
        return []
    region = provider.get("region") or provider.get("location")
    head = config["head_node_type"]
    found = []
    for name, node_type in config["available_node_types"].items():
        key, instance, spot = _READERS[provider["type"]](node_type.get("node_config", {}))
        path = f"available_node_types.{name}.node_config.{key}"
        entry = find_instance(provider["type"], instance, region)
        found.append(PricedNodeType(path, name, instance, spot, entry))
    return sorted(found, key=lambda node_type: node_type.name != head)


def hourly_cost_lines(config: Mapping[str, Any]) -> list[str]:
    """The lowest and highest cost per hour, and the price of each node type with its source."""
    node_types = priced_node_types(config)
    if not node_types:
        return ["price: unknown, the hosts are your own"]
    unknown = [node_type.instance for node_type in node_types if node_type.usd_per_h is None]
    if unknown:
        return [f"price: unknown for {', '.join(sorted(set(unknown)))}"]
    least, most = _bounds(config, node_types)
    lines = [
        f"price: ${least:.2f} an hour at least, ${most:.2f} at most, "
        "for machines only: disks and traffic come on top"
    ]
    return lines + [_price_line(node_type) for node_type in node_types]


def _price_line(node_type: PricedNodeType) -> str:
    entry = node_type.catalog_entry
    assert entry is not None
    market = "spot" if node_type.spot else "on demand"
    if node_type.spot and entry.spot_usd_per_h is None:
        market = "spot, at the on-demand price since the one for spot is unknown"
    day = f"{entry.date:%Y-%m-%d}" if entry.date else "undated"
    return (
        f"price: {node_type.name}: {node_type.instance} ${node_type.usd_per_h:.4g} an hour "
        f"{market}, in {entry.region}, {day}, {entry.source}"
    )


def _bounds(config: Mapping[str, Any], node_types: list[PricedNodeType]) -> tuple[float, float]:
    """Cost per hour with the fewest workers, and with as many of the most expensive as allowed."""
    head, *workers = node_types
    sections = config["available_node_types"]
    left = config.get("max_workers", 0)
    least = most = head.usd_per_h or 0.0
    workers.sort(key=lambda worker: worker.usd_per_h or 0.0, reverse=True)
    for worker in workers:
        section, usd = sections[worker.name], worker.usd_per_h or 0.0
        # A fallback type can have as many nodes as the spot type that it replaces.
        limited_by = sections.get(section.get("labels", {}).get(FALLBACK_FOR), section)
        count = min(limited_by.get("max_workers", left), left)
        least += section.get("min_workers", 0) * usd
        most += count * usd
        left -= count
    return least, most


def _aws(node: Mapping[str, Any]) -> tuple[str, str, bool]:
    market = node.get("InstanceMarketOptions", {}).get("MarketType")
    return "InstanceType", str(node.get("InstanceType", "")), market == "spot"


def _gcp(node: Mapping[str, Any]) -> tuple[str, str, bool]:
    scheduling = node.get("scheduling", {})
    parts = scheduling if isinstance(scheduling, list) else [scheduling]  # a list in Ray's examples
    spot = any(part.get("provisioningModel") == "SPOT" or part.get("preemptible") for part in parts)
    return "machineType", str(node.get("machineType", "")), spot


def _azure(node: Mapping[str, Any]) -> tuple[str, str, bool]:
    asked = node.get("azure_arm_parameters", {})
    spot = asked.get("priority") == "Spot"
    return "azure_arm_parameters.vmSize", str(asked.get("vmSize", "")), spot


_READERS = {"aws": _aws, "gcp": _gcp, "azure": _azure}
