"""Adds up the energy of one node's devices, and records how each joule is known.

There is one meter per node. Devices are identified by UUID, so that a device counts once when two
processes share it. A device that cannot be measured is estimated, and marked as estimated. Time
without any reading counts as `unknown_s`, never as 0 joules.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cluster.cost.power_sources import (
    MEASURED_METHODS,
    PowerSource,
    Reading,
    estimate_from_utilisation,
)

MAX_GAP_S = 120.0
"""Two power readings further apart say nothing about the time between; two counter readings do."""


@dataclass
class EnergyUsage:
    """Energy that one device has used since the meter was created."""

    device: str
    covers: str
    """gpu, cpu, dram or host."""
    seconds: float = 0.0
    """Seconds under observation."""
    unknown_s: float = 0.0
    """Seconds among them without any reading."""
    low_j: float = 0.0
    high_j: float = 0.0
    """Bounds of the joules."""
    by_method: dict[str, float] = field(default_factory=dict)
    """Method -> joules."""

    @property
    def joules(self) -> float:
        return sum(self.by_method.values())


@dataclass(frozen=True)
class EnergyTotal:
    """Energy of several devices together, and how it is known."""

    joules: float | None
    """None when nothing is known."""
    low_j: float
    high_j: float
    """Bounds of the joules, for the devices in `coverage`."""
    measured_share: float
    """Measured joules over all joules."""
    method: str
    """The methods joined by +, the one with most joules first; `unknown` without any."""
    coverage: str
    """The kinds of device that are counted (gpu, cpu, dram, host), joined by +."""
    unknown_share: float
    """Device-seconds without a reading over all device-seconds."""

    @property
    def estimated(self) -> bool:
        return self.measured_share < 1

    def __str__(self) -> str:
        """One line of text."""
        if self.joules is None:
            return "unknown"
        text = f"{joules_text(self.joules)} of {self.coverage} by {self.method}"
        if self.estimated:
            span = f"{joules_text(self.low_j)} to {joules_text(self.high_j)}"
            text += f", an estimate ({span}; {self.measured_share:.0%} measured)"
        if self.unknown_share:
            text += f"; {self.unknown_share:.0%} of the time unknown"
        return text


def joules_text(joules: float) -> str:
    """Joules as text, in kWh from 0.1 kWh on."""
    return f"{joules:,.4g} J" if joules < 3.6e5 else f"{joules / 3.6e6:,.4g} kWh"


def total_energy(usages: Iterable[EnergyUsage]) -> EnergyTotal:
    """The energy of all devices together."""
    usages = list(usages)
    by_method: dict[str, float] = {}
    for usage in usages:
        for method, joules in usage.by_method.items():
            by_method[method] = by_method.get(method, 0.0) + joules
    joules = sum(by_method.values())
    measured = sum(part for method, part in by_method.items() if method in MEASURED_METHODS)
    seconds = sum(usage.seconds for usage in usages)
    known = [usage for usage in usages if usage.by_method]
    return EnergyTotal(
        joules=joules if by_method else None,
        low_j=sum(usage.low_j for usage in usages),
        high_j=sum(usage.high_j for usage in usages),
        measured_share=measured / joules if joules else float(by_method.keys() <= MEASURED_METHODS),
        method="+".join(sorted(by_method, key=lambda m: (-by_method[m], m))) or "unknown",
        coverage="+".join(sorted({usage.covers for usage in known})) or "nothing",
        unknown_share=sum(usage.unknown_s for usage in usages) / seconds if seconds else 0.0,
    )


def usages_to_data(usages: Iterable[EnergyUsage]) -> list[dict[str, Any]]:
    """Plain data, for messages and files."""
    return [asdict(usage) for usage in usages]


def usages_from_data(data: Iterable[Mapping[str, Any]]) -> list[EnergyUsage]:
    """The inverse of `usages_to_data`."""
    return [EnergyUsage(**each) for each in data]


class EnergyMeter:
    """Adds up energy from one `sample` to the next. Not thread-safe."""

    def __init__(
        self,
        sources: Sequence[PowerSource],
        clock: Callable[[], float],
        expected: Iterable[Reading] = (),
    ) -> None:
        """`clock` is monotonic, in seconds. If two sources read one device, the first counts.

        `expected` devices certainly exist: if no source reads them, their energy is estimated from
        their power limit, or counts as unknown without one.
        """
        self._sources, self._clock = sources, clock
        self._used: dict[tuple[str, str], EnergyUsage] = {}
        self._last = {(reading.device, str(reading.covers)): reading for reading in expected}
        self._last_s = clock()
        self.problems: dict[str, str] = {}
        """Class name of each source that failed at its last reading -> the error."""
        self.sample()

    @property
    def usages(self) -> list[EnergyUsage]:
        """Energy of each device, from the meter's creation to the last sample."""
        return list(self._used.values())

    def sample(self) -> None:
        """Add the energy since the last sample. Takes milliseconds and never raises."""
        now = self._clock()
        elapsed_s = max(0.0, now - self._last_s)  # in case the clock is not monotonic
        self._last_s = now
        readings = self._read()
        for key in self._last.keys() | readings.keys():
            before = self._last.get(key)
            after = readings.get(key) or _reading_after_loss(before)
            assert after is not None
            usage = self._used.setdefault(key, EnergyUsage(*key))
            if before is not None:
                _add_energy(usage, before, after, elapsed_s)
            self._last[key] = after

    def _read(self) -> dict[tuple[str, str], Reading]:
        found: dict[tuple[str, str], Reading] = {}
        for source in self._sources:
            kind = type(source).__name__
            try:
                readings = source.read()
                self.problems.pop(kind, None)
            except Exception as error:  # no driver, no permission, or the device vanished
                self.problems[kind] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            for reading in readings:
                found.setdefault((reading.device, reading.covers), reading)
        return found


def _reading_after_loss(before: Reading | None) -> Reading | None:
    """Stands for the reading of a device that its driver no longer shows."""
    if before is None:
        return None
    if before.covers == "gpu":
        return replace(
            estimate_from_utilisation(before.device, before.limit_w, None),
            run_share=before.run_share,
        )
    return Reading(before.device, before.covers, before.method, run_share=before.run_share)


def _add_energy(usage: EnergyUsage, before: Reading, after: Reading, elapsed_s: float) -> None:
    usage.seconds += elapsed_s
    found = _energy_from_counters(before, after)
    if found is None and elapsed_s <= MAX_GAP_S:
        found = _energy_from_power(before, after, elapsed_s)
    if found is None:
        usage.unknown_s += elapsed_s
        return
    method, low, joules, high = found
    usage.by_method[method] = usage.by_method.get(method, 0.0) + joules * after.run_share
    usage.low_j += low * after.run_share
    usage.high_j += high * after.run_share


EnergyBounds = tuple[str, float, float, float]
"""Method; lowest, likeliest and highest joules."""


def _energy_from_counters(before: Reading, after: Reading) -> EnergyBounds | None:
    if before.counter_j is None or after.counter_j is None:
        return None
    joules = after.counter_j - before.counter_j
    if joules < 0:  # it wrapped around, or its driver was reloaded
        if after.wraparound_j is None:
            return None
        joules += after.wraparound_j
    return after.method, joules, joules, joules


def _energy_from_power(before: Reading, after: Reading, elapsed_s: float) -> EnergyBounds | None:
    """Trapezoid between two readings, with the readings as bounds."""
    if after.power_w is None:
        return None
    if after.method == "tdp_util_estimate":  # this is a mean since the last reading
        low, high = after.low_w or 0.0, after.high_w or after.power_w
        return after.method, low * elapsed_s, after.power_w * elapsed_s, high * elapsed_s
    first = after.power_w if before.power_w is None else before.power_w
    low, high = sorted((first, after.power_w))
    return after.method, low * elapsed_s, (first + after.power_w) / 2 * elapsed_s, high * elapsed_s
