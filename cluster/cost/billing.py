"""Which part of which node a run holds, and what it comes to, from one tick to the next.

A node's price is shared by those who use it, as they use it: who has a quarter of it, and
nobody else is there, pays a quarter as busy and the rest as idle; next to another quarter it
pays a half. Between two uses, and until it is gone, a node is idle at the cost of the run that
used it last, unless somebody else uses it. So is all the time from the moment that it came up,
or the run began, until the run first used it, and the node that the command itself is on.
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
"""Seconds from one tick to the next, and between what the meters send. Counters of GPUs change
ten times a second; a budget is exceeded by what is spent in one period, and a save."""
METER_TIMEOUT_S = 5 * BILLING_INTERVAL_S
"""A meter that was not heard for so long has gone with its process."""


@dataclass(frozen=True)
class NodeAllocation:
    """A node as Ray shows it now."""

    id: str
    host: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    """Resource -> how much it has."""
    reserved: Mapping[str, float]
    """Resource -> how much is reserved, by anybody."""
    own_reserved: Mapping[str, float]
    """Resource -> how much is reserved by the command whose bill it is; meters may know more."""

    def fraction(self, amounts: Mapping[str, float]) -> float:
        """The part of it that such amounts are: of what they take most of."""
        shares = [n / self.total[name] for name, n in amounts.items() if self.total.get(name)]
        return min(1.0, max(shares, default=0.0))


@dataclass(frozen=True)
class UsageReport:
    """What a meter says of itself."""

    session: str
    """Unlike any other meter's."""
    run: str
    node: str
    """Ray's id of its node."""
    reserved: Mapping[str, float]
    """Resource -> how much of the node its run has."""
    number: int
    """Counts its posts."""
    begin: float
    seconds: float
    usages: list[dict[str, Any]]
    """Fields of `meter.Usage`, since the meter was made."""
    ended: bool = False


@dataclass
class _LastReport:
    report: UsageReport
    received_s: float


@dataclass
class _NodeCharge:
    """What a run has come to hold of a node, busy or idle."""

    entry: LedgerEntry
    usd: float = 0.0
    seconds: float = 0.0
    unpriced: bool = False


class Biller:
    """Writes into a ledger what a run or sweep holds and uses. Not thread-safe."""

    def __init__(
        self,
        key: str,
        ledger: Ledger,
        rate: Callable[[NodeAllocation], NodeRate],
        own_node: str,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`own_node` is the node that the command is on; `clock` must not be set by anyone."""
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
        """Sessions of meters that have ended."""
        self._charges: dict[tuple[str, str, str], _NodeCharge] = {}
        self._entries: dict[str, LedgerEntry] = {}

    def tick(self, nodes: Iterable[NodeAllocation], reports: Iterable[UsageReport]) -> None:
        """Charge the time since the last tick. `posts` are the newest ones of all meters."""
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
            at_work = self._active_reports(node.id, now)
            worked = [(post, elapsed_s) for post in at_work]
            worked += [(post, min(s, elapsed_s)) for post, s in ended if post.node == node.id]
            if (worked or node.fraction(node.own_reserved)) and node.id not in self._used_nodes:
                self._used_nodes.add(node.id)
                waited_s = max(0.0, now - max(seen, self._start_s) - elapsed_s)
                self._charge(node, self._key, "idle", waited_s * self._held_fraction(node, at_work))
            if node.id in self._used_nodes:
                held_s = self._held_fraction(node, at_work) * elapsed_s
                self._charge_node(node, worked, held_s, elapsed_s)
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
        """The meters that have ended, each with the seconds since it was heard before."""
        ended = []
        for post in reports:
            if post.session in self._ended_sessions:
                continue
            known = self._last_reports.get(post.session)
            if known is None or post.number > known.report.number:
                self._last_reports[post.session] = _LastReport(post, now)
                self._record_energy(post)
                if post.ended:
                    del self._last_reports[post.session]
                    self._ended_sessions.add(post.session)
                    ended.append((post, post.seconds - (known.report.seconds if known else 0.0)))
        return ended

    def _active_reports(self, node: str, now: float) -> list[UsageReport]:
        return [
            heard.report
            for heard in self._last_reports.values()
            if heard.report.node == node and now - heard.received_s <= METER_TIMEOUT_S
        ]

    @staticmethod
    def _held_fraction(node: NodeAllocation, active: Iterable[UsageReport]) -> float:
        """The part of the node that is the run's to pay, idle or not."""
        own = max(
            node.fraction(node.own_reserved), sum(node.fraction(post.reserved) for post in active)
        )
        anybody = node.fraction(node.reserved)
        if own:
            return own / max(own, anybody)
        return 0.0 if anybody else 1.0

    def _charge_node(
        self,
        node: NodeAllocation,
        active: list[tuple[UsageReport, float]],
        held_s: float,
        elapsed_s: float,
    ) -> None:
        """Who `worked` for how many seconds, and the rest of what is held."""
        own_s = sum(node.fraction(post.reserved) * seconds for post, seconds in active)
        # What Ray lets overlap costs no more than the node.
        scale = min(1.0, elapsed_s / own_s) if own_s else 1.0
        for post, seconds in active:
            self._charge(node, post.run, "busy", node.fraction(post.reserved) * seconds * scale)
        self._charge(node, self._key, "idle", max(0.0, held_s - own_s * scale))

    def _charge(self, node: NodeAllocation, run: str, kind: Any, seconds: float) -> None:
        if not seconds:
            return
        known = self._charges.get((run, node.id, kind))
        if known is None:
            name = f"{self._session}/{run}/{node.id}/{kind}"
            known = _NodeCharge(LedgerEntry(name, run, kind, self._now(), 0.0, 0.0, node=node.host))
            self._charges[run, node.id, kind] = known
        usd_per_h = self._rate(node).usd_per_h
        known.seconds += seconds
        known.usd += (usd_per_h or 0.0) * seconds / 3600
        known.unpriced |= usd_per_h is None
        self._entries[known.entry.id] = replace(
            known.entry,
            end=self._now(),
            seconds=known.seconds,
            usd=None if known.unpriced else known.usd,
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
