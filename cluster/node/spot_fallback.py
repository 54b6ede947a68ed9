"""On-demand nodes where spot stays unavailable, and spot again later: runs on the head.

    python -m cluster.node.spot_fallback SECONDS

Ray's autoscaler asks for a spot instance again and again, however often there is none: it knows of
no type that could take the place of another. But it reads its file anew before each decision. So
beside a spot type there is the same on demand, rendered with no nodes (`max_workers: 0`) and the
labels below. This program gives it room and the higher priority by writing that file, and takes
both away again later. Its nodes are never ended by that, and the spot type's entry stays as it is.
The file's own `max_workers` keeps both together within what the user allowed.

Work that runs on demand stays there to its end: to move it would cost more than it saves.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.base.files import write_atomic
from cluster.base.labels import FALLBACK_FOR, USD_PER_HOUR
from cluster.node.preemption_agent import PLACE, raylets, say, take_over

CONFIG = Path("~/ray_bootstrap_config.yaml")
"""What Ray's launcher leaves on the head for its autoscaler; it is JSON."""
POLL_S = 5.0
RECENT_S = 60.0
"""A launch that failed longer ago says nothing: the autoscaler tries again every few seconds."""
PATIENCE_S = 60.0
"""How long the cloud may take to answer a launch."""
BACK_AFTER_S = 1800.0
"""How long new nodes are on demand before spot is tried again."""


@dataclass
class Supply:
    """How the launches of one type go, from one look to the next."""

    nodes: frozenset[str] = frozenset()
    awaited: int = 0
    """Launches that the cloud has not answered yet."""
    since: float | None = None
    """Since when none has come of those asked for (Unix time)."""
    reason: str = ""
    anew: float = 0.0
    """What failed before (Unix time) does not count any more."""

    def look(self, status: Any, kind: str, now: float) -> None:
        """Take note of what the autoscaler says (a `ClusterStatus` of Ray's)."""
        every = (*status.active_nodes, *status.idle_nodes, *status.pending_nodes)
        nodes = frozenset(node.instance_id for node in every if node.ray_node_type_name == kind)
        if nodes - self.nodes:
            self.begin_anew(now)
        self.nodes = nodes
        failed = [
            launch
            for launch in status.failed_launches
            if launch.ray_node_type_name == kind
            and launch.failed_ts_s > max(self.anew, now - RECENT_S)
        ]
        waits = [
            launch.request_ts_s
            for launch in status.pending_launches
            if launch.ray_node_type_name == kind
        ]
        self.awaited = len(waits)
        trouble = [launch.failed_ts_s for launch in failed]
        trouble += [asked for asked in waits if asked < now - PATIENCE_S]
        if not trouble:
            self.since = None
        elif self.since is None:
            self.since = min(trouble)
        if failed:
            self.reason = str(failed[-1].details)

    def begin_anew(self, now: float) -> None:
        """Let bygones be bygones."""
        self.anew, self.since = now, None


@dataclass
class Pair:
    """A spot type and the on-demand type that stands in for it."""

    spot: str
    on_demand: str
    after_s: float
    switched: float | None = None
    """When on demand took over (Unix time); None while spot is asked."""
    supply: dict[str, Supply] = field(default_factory=dict)

    def decide(self, types: Mapping[str, Any], status: Any, now: float) -> str | None:
        """Whose turn it is; the line to say where that has changed."""
        for kind in (self.spot, self.on_demand):
            self.supply.setdefault(kind, Supply()).look(status, kind, now)
        asked = self.spot if self.switched is None else self.on_demand
        other = self.on_demand if self.switched is None else self.spot
        since, reason = self.supply[asked].since, self.supply[asked].reason
        line = None
        if since is not None and now - since >= self.after_s:
            why = f" ({reason})" if reason else ""
            line = f"{_named(asked, types)} has been unavailable for {now - since:.0f} s{why}"
        elif self.switched is not None and now - self.switched >= BACK_AFTER_S:
            line = f"spot is tried again after {now - self.switched:.0f} s"
        if line is None:
            return None
        self.switched = now if self.switched is None else None
        for supply in self.supply.values():
            supply.begin_anew(now)
        return f"{line}; new nodes are {_named(other, types)}"

    def place(self, types: Mapping[str, Any]) -> dict[str, int]:
        """What the autoscaler's file is to say of the on-demand type now."""
        spot, on_demand = self.supply[self.spot], self.supply[self.on_demand]
        most = here = len(on_demand.nodes) + on_demand.awaited  # to have fewer would end some
        least = 0
        if self.switched is not None:
            most = max(here, types[self.spot].get("max_workers", 0) - len(spot.nodes))
            least = max(0, types[self.spot].get("min_workers", 0) - len(spot.nodes))
        theirs = types[self.spot].get("priority", 0)
        priority = min(theirs, types[self.on_demand].get("priority", 0))
        if self.switched is not None:
            priority = theirs + 1
        return {"max_workers": most, "min_workers": least, "priority": priority}


def pairs(config: Mapping[str, Any], after_s: float, now: float) -> Iterator[Pair]:
    """The spot types of an autoscaler's file for which another one stands in, as they stand."""
    types = config["available_node_types"]
    for name, kind in types.items():
        spot = kind.get("labels", {}).get(FALLBACK_FOR)
        if spot in types:
            took_over = kind.get("priority", 0) > types[spot].get("priority", 0)
            yield Pair(spot, name, after_s, now if took_over else None)


class Fallback:
    """Keeps the autoscaler's file as it should be; `step` is called again and again."""

    def __init__(
        self, config: Path, after_s: float, status: Callable[[], Any], clock: Callable[[], float]
    ) -> None:
        self._path, self._status, self._clock = config, status, clock
        self._pairs = list(pairs(json.loads(config.read_text()), after_s, clock()))

    def step(self) -> None:
        """Look once, say what has changed, and write the file where it has to change."""
        status, now = self._status(), self._clock()
        config = json.loads(self._path.read_text())
        types = config["available_node_types"]
        changed = False
        for pair in self._pairs:
            line = pair.decide(types, status, now)
            if line:
                say(line)
            place, kind = pair.place(types), types[pair.on_demand]
            changed |= any(kind.get(key, 0) != value for key, value in place.items())
            kind |= place
        if changed:
            write_atomic(self._path, json.dumps(config))


def _named(kind: str, types: Mapping[str, Any]) -> str:
    price = types[kind].get("labels", {}).get(USD_PER_HOUR)
    return f"{kind} at {f'${price}/h' if price else 'an unknown price'}"


def main(after_s: float) -> None:
    """Watch for ever; the cluster's head has to be this machine."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    take_over(PLACE.expanduser().with_name("fallback.pid"))
    heads = [raylet.head for raylet in raylets()]
    if not heads:
        sys.exit("there is no Ray on this machine")
    fallback = Fallback(
        CONFIG.expanduser(), after_s, lambda: get_cluster_status(heads[0]), time.time
    )
    say(f"on demand takes over where spot has been unavailable for {after_s:g} s")
    while True:
        try:
            fallback.step()
        except (OSError, RuntimeError, ValueError) as error:  # the head is busy, or being set up
            say(f"no look at the cluster: {type(error).__name__}: {error}".splitlines()[0])
        time.sleep(POLL_S)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cluster.node.spot_fallback SECONDS")
    main(float(sys.argv[1]))
