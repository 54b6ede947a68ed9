"""The record of what a run has cost so far: an append-only file of JSON lines.

Each entry holds the amount accumulated under its `id` so far. Only the newest entry of an id
counts, and a total is the sum over ids. Therefore entries can be repeated and come in any order. A
process that starts again uses new ids. A process that is killed leaves at most a partial last line.
"""

import json
import threading
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
    """The amount accumulated under one id."""

    id: str
    """Unique over all processes."""
    run: str
    """Key of the run, sweep or trial that pays."""
    kind: Kind
    """wall: a command was running. busy: part of a node worked for the run. idle: the run held part
    of a node that did no work. energy: a device's joules."""
    begin: float
    end: float
    """Unix time, for display only: nothing is computed from it, since clocks get adjusted."""
    seconds: float
    """Seconds of a monotonic clock, times the fraction of the node."""
    node: str = ""
    device: str = ""
    usd: float | None = None
    """None when the price is unknown, and for wall and energy."""
    usage: dict[str, Any] | None = None
    """For energy: the fields of `EnergyUsage`."""
    kg_co2e: float | None = None
    """For energy; None when unknown."""


@dataclass(frozen=True)
class CostTotals:
    """The sum of ledger entries."""

    wall_s: float
    """Seconds in which a command was running."""
    busy_s: float
    idle_s: float
    """Node-seconds."""
    usd: float | None
    """Includes idle time; None when no price is known."""
    idle_usd: float | None
    unpriced_s: float
    """Node-seconds that `usd` lacks because the node has no known price."""
    energy: EnergyTotal
    kg_co2e: float | None
    unknown_carbon: bool
    """Whether some joules have no known carbon intensity."""

    @property
    def kwh(self) -> float | None:
        return None if self.energy.joules is None else self.energy.joules / 3.6e6


def total_costs(entries: Iterable[LedgerEntry]) -> CostTotals:
    """The sum over ids; of several entries with one id, the one with most seconds counts."""
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
    """The totals of each run or trial that pays, by its key."""
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
    """The ledger file of one run or sweep. One process writes at a time; others may read.

    Threads may share it: a sweep's billing thread reads it while the driver ends the sweep.
    """

    def __init__(self, path: Path) -> None:
        """Open the file at `path`, or create it. Raises ClusterError if it is damaged."""
        self._lock = threading.Lock()
        self._entries: dict[str, LedgerEntry] = {}
        self._by_run: dict[str, dict[str, LedgerEntry]] = {}
        self._totals: CostTotals | None = None
        self._totals_by_run: dict[str, CostTotals] = {}
        """What was computed since the last change; a run whose entries changed has none."""
        self._file = path.open("a+b")
        truncate_partial_line(self._file.fileno())
        for entry in read_entries(path):
            self._keep(entry)

    def append(self, entries: Iterable[LedgerEntry]) -> None:
        """Append changed entries. On return they survive the death of this process."""
        with self._lock:
            for entry in entries:
                if self._entries.get(entry.id) != entry:
                    self._keep(entry)
                    line = json.dumps(asdict(entry), separators=(",", ":"))
                    self._file.write(line.encode() + b"\n")
            self._file.flush()

    def totals(self) -> CostTotals:
        """The totals of all entries in the file."""
        with self._lock:
            if self._totals is None:
                self._totals = total_costs(self._entries.values())
            return self._totals

    def totals_by_run(self) -> dict[str, CostTotals]:
        """The totals of each run or trial that pays, by its key.

        Those of a run are the same object until one of its entries changes.
        """
        with self._lock:
            for run in self._by_run.keys() - self._totals_by_run.keys():
                self._totals_by_run[run] = total_costs(self._by_run[run].values())
            return dict(self._totals_by_run)

    def close(self) -> None:
        self._file.close()

    def _keep(self, entry: LedgerEntry) -> None:
        before = self._entries.get(entry.id)
        if before is not None and before.run != entry.run:
            del self._by_run[before.run][entry.id]
            self._totals_by_run.pop(before.run, None)
        self._entries[entry.id] = entry
        self._by_run.setdefault(entry.run, {})[entry.id] = entry
        self._totals = None
        self._totals_by_run.pop(entry.run, None)


def read_entries(path: Path) -> Iterator[LedgerEntry]:
    """The entries of a file, which another process may be appending to.

    Raises ClusterError, which names the line, if a line is not an entry.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # partially written: the writer is at it, or was killed
                return
            try:
                yield LedgerEntry(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ClusterError(f"{path}:{number}: is no entry: {error}") from None
