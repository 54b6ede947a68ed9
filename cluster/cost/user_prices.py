"""The user's price file: negotiated prices, and the cost of machines that the user owns.

The file is the one that HELIOSTAT_PRICES names, otherwise `~/.config/heliostat/prices.yaml`, if it
exists:

    instances:
      aws/p5.48xlarge: {discount: 0.3}              # 30 % off every price, in all regions
      aws/us-east-1/g5.xlarge: {usd_per_h: 0.70}
    machines:
      lab:
        hosts: [lab-*]
        vcpus: 64
        memory_gib: 512
        bought_usd: 30000
        life_years: 4
        power_w: 1500
        usd_per_kwh: 0.25
"""

import fnmatch
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from cluster.base.config import Spec, did_you_mean, read_yaml, validate
from cluster.base.errors import SpecError
from cluster.cost.catalog import Instance, instances

HOURS_PER_YEAR = 8766.0

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class PriceOverride(Spec):
    """What the user pays for an instance instead of the list price."""

    usd_per_h: Positive | None = None
    """US dollars per hour on demand."""
    spot_usd_per_h: Positive | None = None
    """US dollars per hour on spot."""
    discount: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction that is taken off the list prices."""

    @model_validator(mode="after")
    def _one_way(self) -> "PriceOverride":
        priced = self.usd_per_h is not None or self.spot_usd_per_h is not None
        if priced == (self.discount is not None):
            raise ValueError("must have either prices or a discount")
        return self


class OwnedMachine(Spec):
    """A machine that the user owns: its price, spread over its life, and its electricity."""

    hosts: Annotated[list[str], Field(min_length=1)]
    """Host names, or patterns such as lab-*."""
    vcpus: Positive
    """Hardware threads."""
    memory_gib: Positive
    accelerator: str = ""
    """Ray's name for its accelerators, such as A100."""
    accelerators: Annotated[int, Field(ge=0)] = 0
    """Number of accelerators."""
    bought_usd: NonNegative
    """Purchase price, without interest."""
    life_years: Positive
    """Years over which it is depreciated."""
    use: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of those years in which it computes; only these hours can pay for it."""
    power_w: Positive
    """Power of the whole machine while it computes."""
    usd_per_kwh: NonNegative
    """Price of electricity."""
    g_co2e_per_kwh: NonNegative | None = None
    """Grams of CO2 equivalent per kWh of that electricity."""
    pue: Annotated[float, Field(ge=1)] = 1.0
    """Power usage effectiveness: energy of the room, with cooling, over that of the machine."""

    @property
    def usd_per_h(self) -> float:
        """Depreciation and electricity for one hour of computing."""
        depreciation = self.bought_usd / (self.life_years * HOURS_PER_YEAR * self.use)
        return depreciation + self.power_w / 1000 * self.pue * self.usd_per_kwh


class UserPrices(Spec):
    """The user's price file."""

    instances: dict[str, PriceOverride] = {}
    """provider/name or provider/region/name, such as aws/p5.48xlarge -> its price."""
    machines: dict[str, OwnedMachine] = {}
    """Name of a kind of machine -> its description."""

    def find_machine(self, host: str) -> tuple[str, OwnedMachine] | None:
        """The kind of machine of this host, with its name; None if the file has none."""
        for name, machine in self.machines.items():
            if any(fnmatch.fnmatchcase(host, pattern) for pattern in machine.hosts):
                return name, machine
        return None


def read_user_prices(path: Path | None = None) -> UserPrices:
    """The user's price file, empty when there is none.

    Raises SpecError for mistakes in it, or when HELIOSTAT_PRICES names a missing file.
    """
    configured = os.environ.get("HELIOSTAT_PRICES")
    if path is None and configured:
        path = Path(configured)
    if path is None:
        path = Path("~/.config/heliostat/prices.yaml").expanduser()
        if not path.exists():
            return UserPrices()
    try:
        prices = validate(UserPrices, read_yaml(path))
        apply_user_prices(prices, instances())
    except SpecError as error:
        lines = str(error).splitlines()
        named = (line if line.startswith(str(path)) else f"{path}: {line}" for line in lines)
        raise SpecError("\n".join(named)) from None
    return prices


def apply_user_prices(user_prices: UserPrices, known: Iterable[Instance]) -> tuple[Instance, ...]:
    """The listed instances at the user's prices, followed by the user's own machines.

    Raises SpecError if the price file names an instance that is not in the list.
    """
    known = tuple(known)
    names = {name for each in known for name in _price_keys(each)}
    for name in user_prices.instances:
        if name not in names:
            near = did_you_mean(name, [n for n in names if n.startswith(name.partition("/")[0])])
            raise SpecError(f"instances.{name}: no such instance{near}")
    priced = []
    for each in known:
        found = [
            user_prices.instances[name]
            for name in _price_keys(each)
            if name in user_prices.instances
        ]
        priced.append(_with_override(each, found[0]) if found else each)
    machines = [_as_instance(name, machine) for name, machine in user_prices.machines.items()]
    return (*priced, *machines)


def _price_keys(instance: Instance) -> tuple[str, str]:
    """Its keys in the price file. The exact key comes first: it wins where both are given."""
    return instance.key, f"{instance.provider}/{instance.name}"


def _with_override(instance: Instance, price_override: PriceOverride) -> Instance:
    if price_override.discount is not None:
        left = 1 - price_override.discount

        def less(usd: float | None) -> float | None:
            return None if usd is None else usd * left

        return replace(
            instance,
            usd_per_h=less(instance.usd_per_h),
            spot_usd_per_h=less(instance.spot_usd_per_h),
            spot_min_usd_per_h=less(instance.spot_min_usd_per_h),
            source=f"{instance.source}, less your discount of {price_override.discount:.0%}",
        )
    spot = price_override.spot_usd_per_h or instance.spot_usd_per_h
    return replace(
        instance,
        usd_per_h=price_override.usd_per_h or instance.usd_per_h,
        spot_usd_per_h=spot,
        spot_min_usd_per_h=price_override.spot_usd_per_h or instance.spot_min_usd_per_h,
        source="your price file",
        date=None,
    )


def _as_instance(name: str, machine: OwnedMachine) -> Instance:
    return Instance(
        provider="own",
        region="",
        name=name,
        accelerator=machine.accelerator,
        ray_accelerator_type=machine.accelerator,
        accelerators=machine.accelerators,
        accelerator_memory_bytes=None,
        vcpus=machine.vcpus,
        memory_bytes=round(machine.memory_gib * 2**30),
        usd_per_h=machine.usd_per_h,
        spot_usd_per_h=None,
        spot_min_usd_per_h=None,
        source="your price file: depreciation and electricity",
        date=None,
        note="",
    )
