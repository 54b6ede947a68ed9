"""Who used what, when: an append-only file of JSON lines that says what a run has cost so far.

An entry says how much has come together under its `id` since that began: the newest line of an
id counts, and a total is the sum over ids. So it does not matter how often a line is written,
or in which order; whoever starts anew takes new ids; and a process that is killed leaves all
that it wrote, but for half a line at the end.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.base.errors import ClusterError
from cluster.base.files import truncate_partial_line
from cluster.cost.energy_meter import EnergyTotal, EnergyUsage, total_energy, usages_from_data

Kind = Literal["wall", "busy", "idle", "energy"]


@dataclass(frozen=True)
class LedgerEntry:
    """What has come together under one id."""

    id: str
    """Unlike any other, of whatever process."""
    run: str
    """Key of the run, sweep or trial that pays."""
    kind: Kind
    """wall: a command was at work. busy: a part of a node worked for the run. idle: a part of a
    node was held by it for nothing. energy: a device's joules."""
    begin: float
    end: float
    """Unix time, for people: nothing is computed from it, since clocks are set."""
    seconds: float
    """By a clock that nobody sets. Of half a node, half of them."""
    node: str = ""
    device: str = ""
    usd: float | None = None
    """None when the price is unknown, and for wall and energy."""
    usage: dict[str, Any] | None = None
    """Of energy: the fields of `meter.Usage`."""
    kg_co2e: float | None = None
    """Of energy; None when unknown."""


@dataclass(frozen=True)
class CostTotals:
    """A sum over entries."""

    wall_s: float
    """For how long commands were at work."""
    busy_s: float
    idle_s: float
    """Node-seconds."""
    usd: float | None
    """Idle time included; None when no price is known."""
    idle_usd: float | None
    unpriced_s: float
    """Node-seconds that are not in the dollars, for want of a price."""
    energy: EnergyTotal
    kg_co2e: float | None
    unknown_carbon: bool
    """Whether there are joules of which the carbon is not known."""

    @property
    def kwh(self) -> float | None:
        return None if self.energy.joules is None else self.energy.joules / 3.6e6


def total_costs(entries: Iterable[LedgerEntry]) -> CostTotals:
    """The sum; of several entries with one id, the one with most seconds counts."""
    newest: dict[str, LedgerEntry] = {}
    for entry in entries:
        known = newest.get(entry.id)
        if known is None or entry.seconds >= known.seconds:
            newest[entry.id] = entry
    by_kind: dict[str, list[LedgerEntry]] = {"wall": [], "busy": [], "idle": [], "energy": []}
    for entry in newest.values():
        by_kind[entry.kind].append(entry)
    nodes = by_kind["busy"] + by_kind["idle"]
    used = [entry for entry in by_kind["energy"] if entry.usage]
    return CostTotals(
        wall_s=_seconds(by_kind["wall"]),
        busy_s=_seconds(by_kind["busy"]),
        idle_s=_seconds(by_kind["idle"]),
        usd=_sum(entry.usd for entry in nodes),
        idle_usd=_sum(entry.usd for entry in by_kind["idle"]),
        unpriced_s=_seconds(entry for entry in nodes if entry.usd is None),
        energy=total_energy(usages_from_data(entry.usage for entry in used if entry.usage)),
        kg_co2e=_sum(entry.kg_co2e for entry in used),
        unknown_carbon=any(entry.kg_co2e is None and _joules(entry) for entry in used),
    )


def total_costs_by_run(entries: Iterable[LedgerEntry]) -> dict[str, CostTotals]:
    """The sums of each run or trial that pays, by its key."""
    by_run: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        by_run.setdefault(entry.run, []).append(entry)
    return {run: total_costs(own) for run, own in by_run.items()}


def _joules(entry: LedgerEntry) -> float:
    return EnergyUsage(**(entry.usage or {})).joules


def _seconds(entries: Iterable[LedgerEntry]) -> float:
    return sum(entry.seconds for entry in entries)


def _sum(amounts: Iterable[float | None]) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known else None


class Ledger:
    """The file of one run or sweep. One process writes at a time; others may read."""

    def __init__(self, path: Path) -> None:
        """Go on with the file at `path`, or begin it. Raises ClusterError if it is damaged."""
        self._entries: dict[str, LedgerEntry] = {}
        self._file = path.open("a+b")
        truncate_partial_line(self._file.fileno())
        for entry in read_entries(path):
            self._entries[entry.id] = entry

    def append(self, entries: Iterable[LedgerEntry]) -> None:
        """Returns when they would survive the death of this process."""
        for entry in entries:
            if self._entries.get(entry.id) != entry:
                self._entries[entry.id] = entry
                self._file.write(json.dumps(asdict(entry), separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def totals(self) -> CostTotals:
        """Of all in the file."""
        return total_costs(self._entries.values())

    def totals_by_run(self) -> dict[str, CostTotals]:
        """Of each run or trial that pays, by its key."""
        return total_costs_by_run(self._entries.values())

    def close(self) -> None:
        self._file.close()


def read_entries(path: Path) -> Iterator[LedgerEntry]:
    """The entries of a file that somebody may be writing to.

    Raises ClusterError that names the line where it is no entry.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # it is being written, or its writer was killed
                return
            try:
                yield LedgerEntry(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ClusterError(f"{path}:{number}: is no entry: {error}") from None
