"""What a file for Ray's launcher asks the provider for, and what that costs an hour."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.base.labels import FALLBACK_FOR
from cluster.cost.catalog import Instance, find_instance


@dataclass(frozen=True)
class PricedNodeType:
    """One node type of a file, as the provider sells it."""

    path: str
    """Where in the file it is named."""
    name: str
    instance: str
    spot: bool
    catalog_entry: Instance | None
    """None where the catalogue does not know it."""

    @property
    def usd_per_h(self) -> float | None:
        """By the snapshot; spot at the on-demand price where there is none for it."""
        if self.catalog_entry is None:
            return None
        usd = self.catalog_entry.usd(self.spot)
        return self.catalog_entry.usd_per_h if usd is None else usd


def priced_node_types(config: Mapping[str, Any]) -> list[PricedNodeType]:
    """The node types of a file for a cloud, the head's first; none for hosts of one's own."""
    provider = config["provider"]
    if provider["type"] not in _READERS:
        return []
    region = provider.get("region") or provider.get("location")
    head = config["head_node_type"]
    found = []
    for title, kind in config["available_node_types"].items():
        key, instance, spot = _READERS[provider["type"]](kind.get("node_config", {}))
        place = f"available_node_types.{title}.node_config.{key}"
        known = find_instance(provider["type"], instance, region)
        found.append(PricedNodeType(place, title, instance, spot, known))
    return sorted(found, key=lambda offer: offer.name != head)


def hourly_cost_lines(config: Mapping[str, Any]) -> list[str]:
    """Dollars an hour at rest and at most, and where the prices are from; a line each."""
    every = priced_node_types(config)
    if not every:
        return ["price: unknown, hosts of your own"]
    unknown = [offer.instance for offer in every if offer.usd_per_h is None]
    if unknown:
        return [f"price: unknown, there is none of {', '.join(sorted(set(unknown)))}"]
    least, most = _bounds(config, every)
    lines = [
        f"price: ${least:.2f} an hour at least, ${most:.2f} at most, "
        "machines alone: disks and traffic come on top"
    ]
    for offer in every:
        known = offer.catalog_entry
        assert known is not None
        kind = "spot" if offer.spot else "on demand"
        if offer.spot and known.spot_usd_per_h is None:
            kind = "spot, at the on-demand price since the one for spot is unknown"
        day = f"{known.date:%Y-%m-%d}" if known.date else "undated"
        lines.append(
            f"price: {offer.name}: {offer.instance} ${offer.usd_per_h:.4g} an hour {kind}, "
            f"in {known.region}, {day}, {known.source}"
        )
    return lines


def _bounds(config: Mapping[str, Any], every: list[PricedNodeType]) -> tuple[float, float]:
    """The head with all minimum workers, and with as many of the dearest as may be."""
    head, *workers = every
    types = config["available_node_types"]
    left = config.get("max_workers", 0)
    least = most = head.usd_per_h or 0.0
    for offer in sorted(workers, key=lambda offer: offer.usd_per_h or 0.0, reverse=True):
        kind, usd = types[offer.name], offer.usd_per_h or 0.0
        stands_in_for = types.get(kind.get("labels", {}).get(FALLBACK_FOR), kind)
        count = min(stands_in_for.get("max_workers", left), left)
        least += kind.get("min_workers", 0) * usd
        most += count * usd
        left -= count
    return least, most


def _aws(node: Mapping[str, Any]) -> tuple[str, str, bool]:
    market = node.get("InstanceMarketOptions", {}).get("MarketType")
    return "InstanceType", str(node.get("InstanceType", "")), market == "spot"


def _gcp(node: Mapping[str, Any]) -> tuple[str, str, bool]:
    said = node.get("scheduling", {})
    parts = said if isinstance(said, list) else [said]  # Ray's examples have a list
    spot = any(part.get("provisioningModel") == "SPOT" or part.get("preemptible") for part in parts)
    return "machineType", str(node.get("machineType", "")), spot


def _azure(node: Mapping[str, Any]) -> tuple[str, str, bool]:
    asked = node.get("azure_arm_parameters", {})
    spot = asked.get("priority") == "Spot"
    return "azure_arm_parameters.vmSize", str(asked.get("vmSize", "")), spot


_READERS = {"aws": _aws, "gcp": _gcp, "azure": _azure}
