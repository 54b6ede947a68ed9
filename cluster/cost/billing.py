"""Charges a run or sweep for the parts of nodes that it holds, from one tick to the next.

A node's price is shared by its users in proportion to what they use: the only user of a node, with
a quarter of its resources, pays one quarter as busy and the rest as idle; next to another user with
a quarter, each pays half. While no one uses a node, the run that used it last pays for it as idle,
until the node is gone or another run uses it. A run also pays, as idle, for a node's time between
its start (or the run's start, if later) and its first use, and for the node of the command itself.
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.cost.energy_meter import EnergyUsage
from cluster.cost.ledger import Ledger, LedgerEntry
from cluster.cost.node_rates import NodeRate

BILLING_INTERVAL_S = 2.0
"""Seconds between ticks, and between the reports of a meter. Energy counters of GPUs change ten
times a second. A budget is exceeded by the cost of one interval and of the final checkpoint."""
METER_TIMEOUT_S = 5 * BILLING_INTERVAL_S
"""A meter without a report for this long has died with its process."""


@dataclass(frozen=True)
class NodeAllocation:
    """A node, and who has reserved its resources, as Ray shows it now."""

    id: str
    host: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    """Resource -> amount that the node has."""
    reserved: Mapping[str, float]
    """Resource -> amount reserved by anyone."""
    own_reserved: Mapping[str, float]
    """Resource -> amount reserved by the command that is billed; meters may report more."""

    def fraction(self, amounts: Mapping[str, float]) -> float:
        """The fraction of the node that `amounts` take, by the resource they take most of."""
        fractions = [n / self.total[name] for name, n in amounts.items() if self.total.get(name)]
        return min(1.0, max(fractions, default=0.0))


@dataclass(frozen=True)
class UsageReport:
    """A meter's message to the process that bills the run."""

    session: str
    """Unique for each meter."""
    run: str
    node: str
    """Ray's id of the meter's node."""
    reserved: Mapping[str, float]
    """Resource -> amount of the node that the run has reserved."""
    number: int
    """Counts the reports of this meter."""
    begin: float
    seconds: float
    usages: list[dict[str, Any]]
    """Fields of `EnergyUsage`, since the meter was created."""
    ended: bool = False


@dataclass
class _LastReport:
    report: UsageReport
    received_s: float


@dataclass
class _NodeCharge:
    """The accumulated cost of one run on one node, busy or idle."""

    entry: LedgerEntry
    usd: float = 0.0
    seconds: float = 0.0
    unpriced: bool = False


class Biller:
    """Writes the node cost and the energy of a run or sweep to its ledger. Not thread-safe."""

    def __init__(
        self,
        key: str,
        ledger: Ledger,
        rate: Callable[[NodeAllocation], NodeRate],
        own_node: str,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`own_node` is the node on which the command runs; `clock` is monotonic."""
        self._key, self._ledger, self._rate = key, ledger, rate
        self._clock, self._now = clock, now
        self._session = uuid.uuid4().hex[:12]
        self._start_s = self._last_s = clock()
        self._begin, self._wall_s = now(), 0.0
        self._first_seen_s: dict[str, float] = {}
        self._used_nodes: set[str] = {own_node}
        self._nodes: dict[str, NodeAllocation] = {}
        self._last_reports: dict[str, _LastReport] = {}
        self._ended_sessions: set[str] = set()
        self._charges: dict[tuple[str, str, str], _NodeCharge] = {}
        self._entries: dict[str, LedgerEntry] = {}

    def tick(self, nodes: Iterable[NodeAllocation], reports: Iterable[UsageReport]) -> None:
        """Charge the time since the last tick. `reports` are the newest ones of all meters."""
        now = self._clock()
        elapsed_s = max(0.0, now - self._last_s)
        self._last_s = now
        present = {node.id: node for node in nodes}
        self._nodes |= present
        ended = self._accept_reports(reports, now)
        for node in present.values():
            seen = self._first_seen_s.setdefault(
                node.id, now if self._first_seen_s else self._start_s
            )
            running = self._active_reports(node.id, now)
            active = [(report, elapsed_s) for report in running]
            active += [(last, min(s, elapsed_s)) for last, s in ended if last.node == node.id]
            if (active or node.fraction(node.own_reserved)) and node.id not in self._used_nodes:
                self._used_nodes.add(node.id)
                waited_s = max(0.0, now - max(seen, self._start_s) - elapsed_s)
                self._charge(node, self._key, "idle", waited_s * self._held_fraction(node, running))
            if node.id in self._used_nodes:
                held_s = self._held_fraction(node, running) * elapsed_s
                self._charge_node(node, active, held_s, elapsed_s)
        self._wall_s += elapsed_s
        wall = f"{self._session}/wall"
        self._entries[wall] = LedgerEntry(
            wall, self._key, "wall", self._begin, self._now(), self._wall_s
        )
        self._ledger.append(self._entries.values())
        self._entries.clear()

    def _accept_reports(
        self, reports: Iterable[UsageReport], now: float
    ) -> list[tuple[UsageReport, float]]:
        """The last reports of meters that ended, with the seconds since their previous reports."""
        ended = []
        for report in reports:
            if report.session in self._ended_sessions:
                continue
            last = self._last_reports.get(report.session)
            if last is None or report.number > last.report.number:
                self._last_reports[report.session] = _LastReport(report, now)
                self._record_energy(report)
                if report.ended:
                    del self._last_reports[report.session]
                    self._ended_sessions.add(report.session)
                    before_s = last.report.seconds if last else 0.0
                    ended.append((report, report.seconds - before_s))
        return ended

    def _active_reports(self, node: str, now: float) -> list[UsageReport]:
        return [
            last.report
            for last in self._last_reports.values()
            if last.report.node == node and now - last.received_s <= METER_TIMEOUT_S
        ]

    @staticmethod
    def _held_fraction(node: NodeAllocation, active: Iterable[UsageReport]) -> float:
        """The fraction of the node that the run pays for, idle or not."""
        own = max(
            node.fraction(node.own_reserved), sum(node.fraction(each.reserved) for each in active)
        )
        everyone = node.fraction(node.reserved)
        if own:
            return own / max(own, everyone)
        return 0.0 if everyone else 1.0

    def _charge_node(
        self,
        node: NodeAllocation,
        active: list[tuple[UsageReport, float]],
        held_s: float,
        elapsed_s: float,
    ) -> None:
        """Charge each active run for its seconds, and the rest of the held time as idle."""
        own_s = sum(node.fraction(report.reserved) * seconds for report, seconds in active)
        # Overlapping reservations cost no more than the node.
        scale = min(1.0, elapsed_s / own_s) if own_s else 1.0
        for report, seconds in active:
            busy_s = node.fraction(report.reserved) * seconds * scale
            self._charge(node, report.run, "busy", busy_s)
        self._charge(node, self._key, "idle", max(0.0, held_s - own_s * scale))

    def _charge(self, node: NodeAllocation, run: str, kind: Any, seconds: float) -> None:
        if not seconds:
            return
        charge = self._charges.get((run, node.id, kind))
        if charge is None:
            entry_id = f"{self._session}/{run}/{node.id}/{kind}"
            entry = LedgerEntry(entry_id, run, kind, self._now(), 0.0, 0.0, node=node.host)
            charge = _NodeCharge(entry)
            self._charges[run, node.id, kind] = charge
        usd_per_h = self._rate(node).usd_per_h
        charge.seconds += seconds
        charge.usd += (usd_per_h or 0.0) * seconds / 3600
        charge.unpriced |= usd_per_h is None
        self._entries[charge.entry.id] = replace(
            charge.entry,
            end=self._now(),
            seconds=charge.seconds,
            usd=None if charge.unpriced else charge.usd,
        )

    def _record_energy(self, report: UsageReport) -> None:
        node = self._nodes.get(report.node)
        for fields in report.usages:
            usage = EnergyUsage(**fields)
            entry = LedgerEntry(
                id=f"{report.session}/{usage.device}/{usage.covers}",
                run=report.run,
                kind="energy",
                begin=report.begin,
                end=self._now(),
                seconds=usage.seconds,
                node=node.host if node else report.node,
                device=usage.device,
                usage=fields,
                kg_co2e=self._rate(node).kg_co2e(usage.joules) if node else None,
            )
            self._entries[entry.id] = entry
