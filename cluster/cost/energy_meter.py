"""Joules of one node: from what its devices say to what they have used, and how that is known.

One meter per node, keyed by the devices' UUIDs: two processes on one device are one device.
A device that cannot be measured is estimated and says so; one of which nothing is known counts
seconds of `unknown_s`, and never as 0 joules.
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
"""Power that was read longer ago says nothing about the time between; a counter does."""


@dataclass
class EnergyUsage:
    """What one device has used since the meter was made."""

    device: str
    covers: str
    """gpu, cpu, dram or host."""
    seconds: float = 0.0
    """For which it was looked after."""
    unknown_s: float = 0.0
    """Of these, how many nothing is known of."""
    low_j: float = 0.0
    high_j: float = 0.0
    """Between which the joules are."""
    by_method: dict[str, float] = field(default_factory=dict)
    """Method -> joules."""

    @property
    def joules(self) -> float:
        return sum(self.by_method.values())


@dataclass(frozen=True)
class EnergyTotal:
    """Joules of some devices together, and how they are known."""

    joules: float | None
    """None when nothing is known."""
    low_j: float
    high_j: float
    """Between which they are, of what is covered."""
    measured_share: float
    """Joules that were measured over all joules."""
    method: str
    """The methods in order of their joules, joined by +; `unknown` without any."""
    coverage: str
    """What is counted, of gpu, cpu, dram and host, joined by +."""
    unknown_share: float
    """Device-seconds without a figure over all of them: so much is missing."""

    @property
    def estimated(self) -> bool:
        return self.measured_share < 1

    def __str__(self) -> str:
        """For people."""
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
    """Joules, or kWh where there are many."""
    return f"{joules:,.4g} J" if joules < 3.6e5 else f"{joules / 3.6e6:,.4g} kWh"


def total_energy(usages: Iterable[EnergyUsage]) -> EnergyTotal:
    """All of it together."""
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
    """What `as_data` gave."""
    return [EnergyUsage(**each) for each in data]


class EnergyMeter:
    """Adds up what sources say, from one `sample` to the next. Not thread-safe."""

    def __init__(
        self,
        sources: Sequence[PowerSource],
        clock: Callable[[], float],
        expected: Iterable[Reading] = (),
    ) -> None:
        """`clock` gives seconds and must not be set by anyone (`time.monotonic`). Of two sources
        that know a device, the first counts. `expected` devices are there for certain: what no
        source knows of them is estimated by their limit, else it counts as unknown.
        """
        self._sources, self._clock = sources, clock
        self._used: dict[tuple[str, str], EnergyUsage] = {}
        self._last = {(reading.device, str(reading.covers)): reading for reading in expected}
        self._last_s = clock()
        self.problems: dict[str, str] = {}
        """Class of a source that could not be read the last time -> why."""
        self.sample()

    @property
    def usages(self) -> list[EnergyUsage]:
        """Since the meter was made, up to the last sample."""
        return list(self._used.values())

    def sample(self) -> None:
        """Charge the time since the last sample; takes some ms, and never raises."""
        now = self._clock()
        elapsed_s = max(0.0, now - self._last_s)  # a clock may be set back after all
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
            except Exception as error:  # no driver, no rights, no device any more
                self.problems[kind] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            for reading in readings:
                found.setdefault((reading.device, reading.covers), reading)
        return found


def _reading_after_loss(before: Reading | None) -> Reading | None:
    """What can be said of a device that its driver does not show any more."""
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
"""Method; least, likeliest and most joules."""


def _energy_from_counters(before: Reading, after: Reading) -> EnergyBounds | None:
    if before.counter_j is None or after.counter_j is None:
        return None
    joules = after.counter_j - before.counter_j
    if joules < 0:  # it went round, or its driver was loaded anew and it began again
        if after.wraparound_j is None:
            return None
        joules += after.wraparound_j
    return after.method, joules, joules, joules


def _energy_from_power(before: Reading, after: Reading, elapsed_s: float) -> EnergyBounds | None:
    """The trapezoid between two readings; what happened between them lies between them."""
    if after.power_w is None:
        return None
    if after.method == "tdp_util_estimate":  # of the time since the last one, by its nature
        low, high = after.low_w or 0.0, after.high_w or after.power_w
        return after.method, low * elapsed_s, after.power_w * elapsed_s, high * elapsed_s
    first = after.power_w if before.power_w is None else before.power_w
    low, high = sorted((first, after.power_w))
    return after.method, low * elapsed_s, (first + after.power_w) / 2 * elapsed_s, high * elapsed_s
