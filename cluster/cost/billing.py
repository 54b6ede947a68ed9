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

from cluster.cost.energy_meter import Usage
from cluster.cost.ledger import Entry, Ledger
from cluster.cost.node_rates import Rate

PERIOD_S = 2.0
"""Seconds from one tick to the next, and between what the meters send. Counters of GPUs change
ten times a second; a budget is exceeded by what is spent in one period, and a save."""
SILENCE_S = 5 * PERIOD_S
"""A meter that was not heard for so long has gone with its process."""


@dataclass(frozen=True)
class Node:
    """A node as Ray shows it now."""

    id: str
    host: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    """Resource -> how much it has."""
    used: Mapping[str, float]
    """Resource -> how much is reserved, by anybody."""
    ours: Mapping[str, float]
    """Resource -> how much is reserved by the command whose bill it is; meters may know more."""

    def share(self, amounts: Mapping[str, float]) -> float:
        """The part of it that such amounts are: of what they take most of."""
        shares = [n / self.total[name] for name, n in amounts.items() if self.total.get(name)]
        return min(1.0, max(shares, default=0.0))


@dataclass(frozen=True)
class Post:
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
class _Heard:
    post: Post
    at: float


@dataclass
class _Held:
    """What a run has come to hold of a node, busy or idle."""

    entry: Entry
    usd: float = 0.0
    seconds: float = 0.0
    unpriced: bool = False


class Bill:
    """Writes into a ledger what a run or sweep holds and uses. Not thread-safe."""

    def __init__(
        self,
        key: str,
        ledger: Ledger,
        rate: Callable[[Node], Rate],
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
        self._seen: dict[str, float] = {}
        self._used: set[str] = {own_node}
        self._nodes: dict[str, Node] = {}
        self._heard: dict[str, _Heard] = {}
        self._over: set[str] = set()
        """Sessions of meters that have ended."""
        self._held: dict[tuple[str, str, str], _Held] = {}
        self._entries: dict[str, Entry] = {}

    def tick(self, nodes: Iterable[Node], posts: Iterable[Post]) -> None:
        """Charge the time since the last tick. `posts` are the newest ones of all meters."""
        now = self._clock()
        elapsed_s = max(0.0, now - self._last_s)
        self._last_s = now
        present = {node.id: node for node in nodes}
        self._nodes |= present
        ended = self._listen(posts, now)
        for node in present.values():
            seen = self._seen.setdefault(node.id, now if self._seen else self._start_s)
            at_work = self._at_work(node.id, now)
            worked = [(post, elapsed_s) for post in at_work]
            worked += [(post, min(s, elapsed_s)) for post, s in ended if post.node == node.id]
            if (worked or node.share(node.ours)) and node.id not in self._used:
                self._used.add(node.id)
                waited_s = max(0.0, now - max(seen, self._start_s) - elapsed_s)
                self._charge(node, self._key, "idle", waited_s * self._holds(node, at_work))
            if node.id in self._used:
                held_s = self._holds(node, at_work) * elapsed_s
                self._charge_node(node, worked, held_s, elapsed_s)
        self._wall_s += elapsed_s
        wall = f"{self._session}/wall"
        self._entries[wall] = Entry(wall, self._key, "wall", self._begin, self._now(), self._wall_s)
        self._ledger.put(self._entries.values())
        self._entries.clear()

    def _listen(self, posts: Iterable[Post], now: float) -> list[tuple[Post, float]]:
        """The meters that have ended, each with the seconds since it was heard before."""
        ended = []
        for post in posts:
            if post.session in self._over:
                continue
            known = self._heard.get(post.session)
            if known is None or post.number > known.post.number:
                self._heard[post.session] = _Heard(post, now)
                self._note_energy(post)
                if post.ended:
                    del self._heard[post.session]
                    self._over.add(post.session)
                    ended.append((post, post.seconds - (known.post.seconds if known else 0.0)))
        return ended

    def _at_work(self, node: str, now: float) -> list[Post]:
        return [
            heard.post
            for heard in self._heard.values()
            if heard.post.node == node and now - heard.at <= SILENCE_S
        ]

    @staticmethod
    def _holds(node: Node, at_work: Iterable[Post]) -> float:
        """The part of the node that is the run's to pay, idle or not."""
        own = max(node.share(node.ours), sum(node.share(post.reserved) for post in at_work))
        anybody = node.share(node.used)
        if own:
            return own / max(own, anybody)
        return 0.0 if anybody else 1.0

    def _charge_node(
        self, node: Node, worked: list[tuple[Post, float]], held_s: float, elapsed_s: float
    ) -> None:
        """Who `worked` for how many seconds, and the rest of what is held."""
        own_s = sum(node.share(post.reserved) * seconds for post, seconds in worked)
        # What Ray lets overlap costs no more than the node.
        scale = min(1.0, elapsed_s / own_s) if own_s else 1.0
        for post, seconds in worked:
            self._charge(node, post.run, "busy", node.share(post.reserved) * seconds * scale)
        self._charge(node, self._key, "idle", max(0.0, held_s - own_s * scale))

    def _charge(self, node: Node, run: str, kind: Any, seconds: float) -> None:
        if not seconds:
            return
        known = self._held.get((run, node.id, kind))
        if known is None:
            name = f"{self._session}/{run}/{node.id}/{kind}"
            known = _Held(Entry(name, run, kind, self._now(), 0.0, 0.0, node=node.host))
            self._held[run, node.id, kind] = known
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

    def _note_energy(self, post: Post) -> None:
        node = self._nodes.get(post.node)
        for fields in post.usages:
            usage = Usage(**fields)
            entry = Entry(
                id=f"{post.session}/{usage.device}/{usage.covers}",
                run=post.run,
                kind="energy",
                begin=post.begin,
                end=self._now(),
                seconds=usage.seconds,
                node=node.host if node else post.node,
                device=usage.device,
                usage=fields,
                kg_co2e=self._rate(node).kg_co2e(usage.joules) if node else None,
            )
            self._entries[entry.id] = entry
