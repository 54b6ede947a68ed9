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
from cluster.node.preemption_agent import (
    PID_FILE,
    local_raylets,
    log_event,
    replace_running_instance,
)

AUTOSCALER_FILE = Path("~/ray_bootstrap_config.yaml")
"""What Ray's launcher leaves on the head for its autoscaler; it is JSON."""
POLL_S = 5.0
FAILURE_WINDOW_S = 60.0
"""A launch that failed longer ago says nothing: the autoscaler tries again every few seconds."""
LAUNCH_TIMEOUT_S = 60.0
"""How long the cloud may take to answer a launch."""
RETRY_SPOT_AFTER_S = 1800.0
"""How long new nodes are on demand before spot is tried again."""


@dataclass
class LaunchHistory:
    """How the launches of one type go, from one look to the next."""

    node_ids: frozenset[str] = frozenset()
    pending_launches: int = 0
    """Launches that the cloud has not answered yet."""
    failing_since: float | None = None
    """Since when none has come of those asked for (Unix time)."""
    last_error: str = ""
    ignore_before: float = 0.0
    """What failed before (Unix time) does not count any more."""

    def update(self, status: Any, node_type: str, now: float) -> None:
        """Take note of what the autoscaler says (a `ClusterStatus` of Ray's)."""
        every = (*status.active_nodes, *status.idle_nodes, *status.pending_nodes)
        nodes = frozenset(
            node.instance_id for node in every if node.ray_node_type_name == node_type
        )
        if nodes - self.node_ids:
            self.forget_failures(now)
        self.node_ids = nodes
        failed = [
            launch
            for launch in status.failed_launches
            if launch.ray_node_type_name == node_type
            and launch.failed_ts_s > max(self.ignore_before, now - FAILURE_WINDOW_S)
        ]
        waits = [
            launch.request_ts_s
            for launch in status.pending_launches
            if launch.ray_node_type_name == node_type
        ]
        self.pending_launches = len(waits)
        trouble = [launch.failed_ts_s for launch in failed]
        trouble += [asked for asked in waits if asked < now - LAUNCH_TIMEOUT_S]
        if not trouble:
            self.failing_since = None
        elif self.failing_since is None:
            self.failing_since = min(trouble)
        if failed:
            self.last_error = str(failed[-1].details)

    def forget_failures(self, now: float) -> None:
        """Let bygones be bygones."""
        self.ignore_before, self.failing_since = now, None


@dataclass
class SpotFallbackPair:
    """A spot type and the on-demand type that stands in for it."""

    spot: str
    on_demand: str
    switch_after_s: float
    on_demand_since: float | None = None
    """When on demand took over (Unix time); None while spot is asked."""
    histories: dict[str, LaunchHistory] = field(default_factory=dict)

    def switch_if_due(self, types: Mapping[str, Any], status: Any, now: float) -> str | None:
        """Whose turn it is; the line to say where that has changed."""
        for kind in (self.spot, self.on_demand):
            self.histories.setdefault(kind, LaunchHistory()).update(status, kind, now)
        asked = self.spot if self.on_demand_since is None else self.on_demand
        other = self.on_demand if self.on_demand_since is None else self.spot
        since, reason = self.histories[asked].failing_since, self.histories[asked].last_error
        line = None
        if since is not None and now - since >= self.switch_after_s:
            why = f" ({reason})" if reason else ""
            line = f"{_describe(asked, types)} has been unavailable for {now - since:.0f} s{why}"
        elif self.on_demand_since is not None and now - self.on_demand_since >= RETRY_SPOT_AFTER_S:
            line = f"spot is tried again after {now - self.on_demand_since:.0f} s"
        if line is None:
            return None
        self.on_demand_since = now if self.on_demand_since is None else None
        for supply in self.histories.values():
            supply.forget_failures(now)
        return f"{line}; new nodes are {_describe(other, types)}"

    def on_demand_limits(self, types: Mapping[str, Any]) -> dict[str, int]:
        """What the autoscaler's file is to say of the on-demand type now."""
        spot, on_demand = self.histories[self.spot], self.histories[self.on_demand]
        most = here = (
            len(on_demand.node_ids) + on_demand.pending_launches
        )  # to have fewer would end some
        least = 0
        if self.on_demand_since is not None:
            most = max(here, types[self.spot].get("max_workers", 0) - len(spot.node_ids))
            least = max(0, types[self.spot].get("min_workers", 0) - len(spot.node_ids))
        theirs = types[self.spot].get("priority", 0)
        priority = min(theirs, types[self.on_demand].get("priority", 0))
        if self.on_demand_since is not None:
            priority = theirs + 1
        return {"max_workers": most, "min_workers": least, "priority": priority}


def find_pairs(config: Mapping[str, Any], after_s: float, now: float) -> Iterator[SpotFallbackPair]:
    """The spot types of an autoscaler's file for which another one stands in, as they stand."""
    types = config["available_node_types"]
    for name, kind in types.items():
        spot = kind.get("labels", {}).get(FALLBACK_FOR)
        if spot in types:
            took_over = kind.get("priority", 0) > types[spot].get("priority", 0)
            yield SpotFallbackPair(spot, name, after_s, now if took_over else None)


class SpotFallback:
    """Keeps the autoscaler's file as it should be; `step` is called again and again."""

    def __init__(
        self, config: Path, after_s: float, status: Callable[[], Any], clock: Callable[[], float]
    ) -> None:
        self._path, self._status, self._clock = config, status, clock
        self._pairs = list(find_pairs(json.loads(config.read_text()), after_s, clock()))

    def poll_once(self) -> None:
        """Look once, say what has changed, and write the file where it has to change."""
        status, now = self._status(), self._clock()
        config = json.loads(self._path.read_text())
        types = config["available_node_types"]
        changed = False
        for pair in self._pairs:
            line = pair.switch_if_due(types, status, now)
            if line:
                log_event(line)
            place, kind = pair.on_demand_limits(types), types[pair.on_demand]
            changed |= any(kind.get(key, 0) != value for key, value in place.items())
            kind |= place
        if changed:
            write_atomic(self._path, json.dumps(config))


def _describe(kind: str, types: Mapping[str, Any]) -> str:
    price = types[kind].get("labels", {}).get(USD_PER_HOUR)
    return f"{kind} at {f'${price}/h' if price else 'an unknown price'}"


def main(after_s: float) -> None:
    """Watch for ever; the cluster's head has to be this machine."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    replace_running_instance(PID_FILE.expanduser().with_name("fallback.pid"))
    heads = [raylet.gcs_address for raylet in local_raylets()]
    if not heads:
        sys.exit("there is no Ray on this machine")
    fallback = SpotFallback(
        AUTOSCALER_FILE.expanduser(), after_s, lambda: get_cluster_status(heads[0]), time.time
    )
    log_event(f"on demand takes over where spot has been unavailable for {after_s:g} s")
    while True:
        try:
            fallback.poll_once()
        except (OSError, RuntimeError, ValueError) as error:  # the head is busy, or being set up
            log_event(f"no look at the cluster: {type(error).__name__}: {error}".splitlines()[0])
        time.sleep(POLL_S)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cluster.node.spot_fallback SECONDS")
    main(float(sys.argv[1]))
