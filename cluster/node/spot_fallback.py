"""Replaces spot nodes by on-demand nodes while spot is unavailable. Runs on the head.

    python -m cluster.node.spot_fallback SECONDS

Ray's autoscaler asks for a spot instance for ever, even if the cloud never has one: it cannot
replace a node type by another. But it reads its file anew before each decision. So each spot type
has an on-demand twin in the file, rendered without nodes (`max_workers: 0`) and with the label
`heliostat.io/fallback-for`. When spot has been unavailable for SECONDS, this program raises the
twin's `max_workers` and priority in the file; later it lowers them again. Running nodes are never
ended by that, and the spot type's entry stays as it is. The file's own `max_workers` limits both
types together to what the user allowed.

Work on an on-demand node stays there until it ends: moving it would cost more than it saves.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.base.files import write_atomic
from cluster.base.labels import FALLBACK_FOR, USD_PER_HOUR
from cluster.connection.ray_internals import HEAD_CLUSTER_FILE, autoscaler_status
from cluster.node.host_program import HOST_FOLDER, log_to_stdout, replace_running_instance
from cluster.node.raylets import local_raylets

POLL_S = 5.0
FAILURE_WINDOW_S = 60.0
"""Launches that failed longer ago are ignored: the autoscaler repeats them every few seconds."""
LAUNCH_TIMEOUT_S = 60.0
"""How long the cloud may take to answer a launch."""
RETRY_SPOT_AFTER_S = 1800.0
"""How long new nodes are on demand before spot is tried again."""

logger = logging.getLogger(__name__)


@dataclass
class LaunchHistory:
    """Whether launches of one node type succeed, from one poll to the next."""

    node_ids: frozenset[str] = frozenset()
    pending_launches: int = 0
    """Launches that the cloud has not answered yet."""
    failing_since: float | None = None
    """Since when no requested node has come (Unix time); None while launches succeed."""
    last_error: str = ""
    ignore_before: float = 0.0
    """Failures before this Unix time do not count."""

    def update(self, status: Any, node_type: str, now: float) -> None:
        """Read the autoscaler's state, a `ClusterStatus` of Ray's autoscaler v2."""
        nodes = (*status.active_nodes, *status.idle_nodes, *status.pending_nodes)
        ids = frozenset(node.instance_id for node in nodes if node.ray_node_type_name == node_type)
        if ids - self.node_ids:
            self.forget_failures(now)
        self.node_ids = ids
        failed = [
            launch
            for launch in status.failed_launches
            if launch.ray_node_type_name == node_type
            and launch.failed_ts_s > max(self.ignore_before, now - FAILURE_WINDOW_S)
        ]
        pending_since = [
            launch.request_ts_s
            for launch in status.pending_launches
            if launch.ray_node_type_name == node_type
        ]
        self.pending_launches = len(pending_since)
        failures = [launch.failed_ts_s for launch in failed]
        failures += [since for since in pending_since if since < now - LAUNCH_TIMEOUT_S]
        if not failures:
            self.failing_since = None
        elif self.failing_since is None:
            self.failing_since = min(failures)
        if failed:
            self.last_error = str(failed[-1].details)

    def forget_failures(self, now: float) -> None:
        """Count only failures from now on."""
        self.ignore_before, self.failing_since = now, None


@dataclass
class SpotFallbackPair:
    """A spot type and the on-demand type that replaces it."""

    spot: str
    on_demand: str
    switch_after_s: float
    on_demand_since: float | None = None
    """Unix time of the switch to on demand; None while new nodes are spot."""
    histories: dict[str, LaunchHistory] = field(default_factory=dict)

    def switch_if_due(self, types: Mapping[str, Any], status: Any, now: float) -> str | None:
        """Choose the type of new nodes; returns a line for the log if that has changed."""
        for node_type in (self.spot, self.on_demand):
            history = self.histories.setdefault(node_type, LaunchHistory())
            history.update(status, node_type, now)
        current = self.spot if self.on_demand_since is None else self.on_demand
        other = self.on_demand if self.on_demand_since is None else self.spot
        since, error = self.histories[current].failing_since, self.histories[current].last_error
        line = None
        if since is not None and now - since >= self.switch_after_s:
            reason = f" ({error})" if error else ""
            line = f"{_describe(current, types)} has been unavailable for {now - since:.0f} s"
            line += reason
        elif self.on_demand_since is not None and now - self.on_demand_since >= RETRY_SPOT_AFTER_S:
            line = f"spot is tried again after {now - self.on_demand_since:.0f} s"
        if line is None:
            return None
        self.on_demand_since = now if self.on_demand_since is None else None
        for history in self.histories.values():
            history.forget_failures(now)
        return f"{line}; new nodes are {_describe(other, types)}"

    def on_demand_limits(self, types: Mapping[str, Any]) -> dict[str, int]:
        """The fields of the on-demand type in the autoscaler's file, as they must be now."""
        spot, on_demand = self.histories[self.spot], self.histories[self.on_demand]
        spot_entry = types[self.spot]
        # Fewer than there are would end some.
        existing = len(on_demand.node_ids) + on_demand.pending_launches
        spot_priority = spot_entry.get("priority", 0)
        if self.on_demand_since is None:
            priority = min(spot_priority, types[self.on_demand].get("priority", 0))
            return {"max_workers": existing, "min_workers": 0, "priority": priority}
        return {
            "max_workers": max(existing, spot_entry.get("max_workers", 0) - len(spot.node_ids)),
            "min_workers": max(0, spot_entry.get("min_workers", 0) - len(spot.node_ids)),
            "priority": spot_priority + 1,
        }


def find_pairs(
    config: Mapping[str, Any], switch_after_s: float, now: float
) -> Iterator[SpotFallbackPair]:
    """The spot types of an autoscaler's file that have an on-demand twin."""
    types = config["available_node_types"]
    for name, entry in types.items():
        spot = entry.get("labels", {}).get(FALLBACK_FOR)
        if spot in types:
            switched = entry.get("priority", 0) > types[spot].get("priority", 0)
            yield SpotFallbackPair(spot, name, switch_after_s, now if switched else None)


class SpotFallback:
    """Keeps the autoscaler's file up to date; `poll_once` is to be called again and again."""

    def __init__(
        self, config: Path, after_s: float, status: Callable[[], Any], clock: Callable[[], float]
    ) -> None:
        """`status` reads the autoscaler's state; `clock` returns the Unix time."""
        self._path, self._status, self._clock = config, status, clock
        self._pairs = list(find_pairs(json.loads(config.read_text()), after_s, clock()))

    def poll_once(self) -> None:
        """Read the state, log changes, and write the file if it has to change."""
        status, now = self._status(), self._clock()
        config = json.loads(self._path.read_text())
        types = config["available_node_types"]
        changed = False
        for pair in self._pairs:
            line = pair.switch_if_due(types, status, now)
            if line:
                logger.info("%s", line)
            limits, entry = pair.on_demand_limits(types), types[pair.on_demand]
            changed |= any(entry.get(key, 0) != value for key, value in limits.items())
            entry |= limits
        if changed:
            write_atomic(self._path, json.dumps(config))


def _describe(node_type: str, types: Mapping[str, Any]) -> str:
    price = types[node_type].get("labels", {}).get(USD_PER_HOUR)
    return f"{node_type} at {f'${price}/h' if price else 'an unknown price'}"


def main(after_s: float) -> None:
    """Poll until this process is ended. This machine must be the cluster's head."""
    log_to_stdout()
    replace_running_instance((HOST_FOLDER / "fallback.pid").expanduser())
    gcs_addresses = [raylet.gcs_address for raylet in local_raylets()]
    if not gcs_addresses:
        sys.exit("there is no Ray on this machine")
    file = HEAD_CLUSTER_FILE.expanduser()
    fallback = SpotFallback(file, after_s, lambda: autoscaler_status(gcs_addresses[0]), time.time)
    logger.info("on demand takes over when spot has been unavailable for %g s", after_s)
    while True:
        try:
            fallback.poll_once()
        except (OSError, RuntimeError, ValueError) as error:  # the head is busy, or starting
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.info("the cluster's state is not available: %s", first_line)
        time.sleep(POLL_S)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m cluster.node.spot_fallback SECONDS")
    main(float(sys.argv[1]))
