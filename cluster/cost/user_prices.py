"""What the user knows better than the price list: negotiated prices, and machines of one's own.

It stands in a YAML file: the one that HELIOSTAT_PRICES names, else
`~/.config/heliostat/prices.yaml`, else there is none:

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
    """What the user pays for an instance, in place of what the list says."""

    usd_per_h: Positive | None = None
    """US dollars an hour on demand."""
    spot_usd_per_h: Positive | None = None
    """US dollars an hour on spot."""
    discount: Annotated[float, Field(gt=0, lt=1)] | None = None
    """What is taken off the list's prices, as a share of them."""

    @model_validator(mode="after")
    def _one_way(self) -> "PriceOverride":
        priced = self.usd_per_h is not None or self.spot_usd_per_h is not None
        if priced == (self.discount is not None):
            raise ValueError("must have either prices or a discount")
        return self


class OwnedMachine(Spec):
    """A machine of the user's own: what it cost, spread over its life, and its electricity."""

    hosts: Annotated[list[str], Field(min_length=1)]
    """Names of such hosts, or patterns such as lab-*."""
    vcpus: Positive
    """Hardware threads."""
    memory_gib: Positive
    accelerator: str = ""
    """Ray's name for the devices in it, such as A100."""
    accelerators: Annotated[int, Field(ge=0)] = 0
    """How many."""
    bought_usd: NonNegative
    """What it cost, without interest."""
    life_years: Positive
    """Years over which that is written off."""
    use: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of those years in which it computes; only these hours can pay for it."""
    power_w: Positive
    """What all of it draws while it computes."""
    usd_per_kwh: NonNegative
    """Price of electricity."""
    g_co2e_per_kwh: NonNegative | None = None
    """Grams of CO2 equivalent per kWh of that electricity."""
    pue: Annotated[float, Field(ge=1)] = 1.0
    """Energy of the whole room over that of the machine: cooling costs, too."""

    @property
    def usd_per_h(self) -> float:
        """Depreciation and electricity of an hour of computing."""
        written_off = self.bought_usd / (self.life_years * HOURS_PER_YEAR * self.use)
        return written_off + self.power_w / 1000 * self.pue * self.usd_per_kwh


class UserPrices(Spec):
    """The user's price file."""

    instances: dict[str, PriceOverride] = {}
    """provider/name or provider/region/name, as in aws/p5.48xlarge -> what it costs."""
    machines: dict[str, OwnedMachine] = {}
    """Name of a kind of machine -> what it is."""

    def find_machine(self, host: str) -> tuple[str, OwnedMachine] | None:
        """The kind of machine that this host is, with its name."""
        for name, machine in self.machines.items():
            if any(fnmatch.fnmatchcase(host, pattern) for pattern in machine.hosts):
                return name, machine
        return None


def read_user_prices(path: Path | None = None) -> UserPrices:
    """The user's price file, empty when there is none.

    Raises SpecError for what is wrong in it, or when HELIOSTAT_PRICES names no file.
    """
    named = os.environ.get("HELIOSTAT_PRICES")
    if path is None and named:
        path = Path(named)
    if path is None:
        path = Path("~/.config/heliostat/prices.yaml").expanduser()
        if not path.exists():
            return UserPrices()
    try:
        own = validate(UserPrices, read_yaml(path))
        apply_user_prices(own, instances())
    except SpecError as error:
        lines = str(error).splitlines()
        where = f"{path}: "
        named_already = (line if line.startswith(str(path)) else where + line for line in lines)
        raise SpecError("\n".join(named_already)) from None
    return own


def apply_user_prices(user_prices: UserPrices, known: Iterable[Instance]) -> tuple[Instance, ...]:
    """The machines of the list at the user's prices, and after them the user's own machines.

    Raises SpecError where the file names an instance that the list does not have.
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
    """The exact one first: it counts where both are given."""
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
