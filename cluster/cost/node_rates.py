"""A node's price per hour and the carbon intensity of its electricity, each with its source.

The first known price counts:
1. `cost.usd_per_h` in the spec;
2. the node's label `heliostat.io/usd-per-hour`, unless it repeats the snapshot;
3. the user's price file, by the node's host name;
4. by the labels that name the node's instance: the user's price, today's, or the snapshot's.
"""

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from cluster.base.config import Spec
from cluster.base.errors import SpecError
from cluster.base.labels import INSTANCE, MARKET, ON_DEMAND, PROVIDER, REGION, SPOT, USD_PER_HOUR
from cluster.cost.carbon import PUE, carbon_intensity
from cluster.cost.catalog import Instance, instances
from cluster.cost.user_prices import OwnedMachine, UserPrices, apply_user_prices

RAY_MARKET, RAY_REGION = "ray.io/market-type", "ray.io/availability-region"
"""Labels that Ray sets on some providers; ours take precedence."""


class CostSpec(Spec):
    """A node's price and emissions where the catalogue has none or wrong ones."""

    usd_per_h: Annotated[float, Field(ge=0)] | None = None
    """US dollars per hour and node; from the price list when not given."""
    g_co2e_per_kwh: Annotated[float, Field(ge=0)] | None = None
    """Grams of CO2 equivalent per kWh of electricity; from the node's region when not given."""
    pue: Annotated[float, Field(ge=1)] | None = None
    """Power usage effectiveness: energy of the building over that of its machines. When not given,
    the figure that the provider publishes, or 1."""


@dataclass(frozen=True)
class NodeRate:
    """A node's price, and the emissions of its electricity."""

    usd_per_h: float | None
    """None when unknown."""
    price_source: str
    """The price and its source as text, or why it is unknown."""
    g_co2e_per_kwh: float | None
    """Of electricity at the building's meter, before `pue`; None when unknown."""
    carbon_source: str
    """The carbon intensity, the PUE and their sources as text."""
    pue: float

    def kg_co2e(self, energy_j: float) -> float | None:
        """Emissions for `energy_j` joules used by the machine, with PUE."""
        if self.g_co2e_per_kwh is None:
            return None
        return energy_j / 3.6e6 * self.pue * self.g_co2e_per_kwh / 1000


def age_text(date: datetime.date | None, today: datetime.date) -> str:
    """The age of a price as text."""
    if date is None:
        return "of unknown age"
    days = (today - date).days
    return f"of {date}, {days} day{'' if days == 1 else 's'} old" if days > 0 else f"of {date}"


def price_text(instance: Instance, spot: bool, today: datetime.date | None = None) -> str:
    """An instance's price with its source and age, in one line."""
    usd = instance.usd(spot)
    market = "spot" if spot else "on demand"
    if usd is None:
        return f"{instance.key} {market}: price unknown ({instance.source})"
    age = f", {age_text(instance.date, today or datetime.date.today())}"
    if instance.source.startswith("your price file"):
        age = ""
    return f"{instance.key} {market}: ${usd:,.4g}/h ({instance.source}{age})"


def node_rate(
    host: str,
    labels: Mapping[str, str],
    cost: CostSpec,
    user_prices: UserPrices,
    known: Iterable[Instance] | None = None,
    today: datetime.date | None = None,
) -> NodeRate:
    """The rate of the node `host` with these Ray labels. `host` is "" for a node not started yet.

    `known` are the instances at today's prices; None means the snapshot. Raises SpecError if the
    price label is not a number.
    """
    today = today or datetime.date.today()
    machine = user_prices.find_machine(host) if host else None
    usd, price = _price(host, labels, cost, user_prices, machine, known, today)
    intensity, carbon = _carbon_intensity(labels, cost, machine)
    pue, pue_from = _pue(labels, cost, machine)
    if intensity is not None:
        carbon += f"; PUE {pue:g} ({pue_from})"
    return NodeRate(usd, price, intensity, carbon, pue)


def _price(
    host: str,
    labels: Mapping[str, str],
    cost: CostSpec,
    user_prices: UserPrices,
    machine: tuple[str, OwnedMachine] | None,
    known: Iterable[Instance] | None,
    today: datetime.date,
) -> tuple[float | None, str]:
    if cost.usd_per_h is not None:
        return cost.usd_per_h, f"${cost.usd_per_h:g}/h (cost.usd_per_h)"
    spot = labels.get(MARKET, labels.get(RAY_MARKET, ON_DEMAND)) == SPOT
    if USD_PER_HOUR in labels:
        usd = _usd_from_label(labels[USD_PER_HOUR], host)
        snapshot = _instance_from_labels(labels, instances())
        if snapshot is None or f"{snapshot.usd(spot) or 0:g}" != f"{usd:g}":
            return usd, f"${usd:g}/h (label {USD_PER_HOUR})"
    if machine is not None:
        name, owned = machine
        return owned.usd_per_h, f"{name}: ${owned.usd_per_h:.4g}/h (your price file)"
    if INSTANCE not in labels:
        return None, f"price of {host} unknown: no label, no row in your price file"
    priced = apply_user_prices(user_prices, instances() if known is None else known)
    instance = _instance_from_labels(labels, priced)
    if instance is None:
        return None, f"price of {labels[INSTANCE]} unknown: not in the price list"
    text, region = price_text(instance, spot, today), _region_of(labels)
    if region and instance.region != region:
        text += f", taken for {region}"
    return instance.usd(spot), text


def _provider_of(labels: Mapping[str, str]) -> str:
    """The node's provider: from its label, otherwise from its instance."""
    instance = _instance_from_labels(labels, instances())
    return labels.get(PROVIDER, instance.provider if instance else "")


def _region_of(labels: Mapping[str, str]) -> str:
    return labels.get(REGION, labels.get(RAY_REGION, ""))


def _instance_from_labels(labels: Mapping[str, str], known: Iterable[Instance]) -> Instance | None:
    """The instance that the labels name, in the labels' region if the list has it there."""
    name, provider = labels.get(INSTANCE), labels.get(PROVIDER)
    same = [each for each in known if each.name == name and provider in (None, each.provider)]
    in_region = [each for each in same if each.region == _region_of(labels)]
    return next(iter(in_region or same), None)


def _usd_from_label(text: str, host: str) -> float:
    try:
        usd = float(text)
    except ValueError:
        usd = -1.0
    if not 0 <= usd < float("inf"):
        raise SpecError(f"node {host}: label {USD_PER_HOUR} must be a number (got {text!r})")
    return usd


def _carbon_intensity(
    labels: Mapping[str, str], cost: CostSpec, machine: tuple[str, OwnedMachine] | None
) -> tuple[float | None, str]:
    if cost.g_co2e_per_kwh is not None:
        return cost.g_co2e_per_kwh, f"{cost.g_co2e_per_kwh:g} g CO2e/kWh (cost.g_co2e_per_kwh)"
    if machine is not None and machine[1].g_co2e_per_kwh is not None:
        grams = machine[1].g_co2e_per_kwh
        return grams, f"{grams:g} g CO2e/kWh (your price file)"
    found = carbon_intensity(_provider_of(labels), _region_of(labels))
    return (found.g_co2e_per_kwh, str(found)) if found else (None, "carbon of its grid unknown")


def _pue(
    labels: Mapping[str, str], cost: CostSpec, machine: tuple[str, OwnedMachine] | None
) -> tuple[float, str]:
    if cost.pue is not None:
        return cost.pue, "cost.pue"
    if machine is not None:
        return machine[1].pue, "your price file"
    return PUE.get(_provider_of(labels), (1.0, "unknown, so without overhead"))
