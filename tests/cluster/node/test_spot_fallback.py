"""On-demand nodes replace spot nodes that stay unavailable, and the log says so."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo

from cluster.node.spot_fallback import RETRY_SPOT_AFTER_S, SpotFallback

SPOT, ON_DEMAND, AFTER_S = "gpu-spot", "gpu-on-demand", 300.0
CONFIG = {
    "max_workers": 4,
    "available_node_types": {
        "head": {"node_config": {}},
        SPOT: {
            "max_workers": 4,
            "min_workers": 1,
            "labels": {"heliostat.io/usd-per-hour": "0.3621"},
        },
        ON_DEMAND: {
            "max_workers": 0,
            "labels": {
                "heliostat.io/fallback-for": SPOT,
                "heliostat.io/usd-per-hour": "0.8048",
            },
        },
    },
}


def node(kind: str, name: str) -> NodeInfo:
    return NodeInfo("g6.xlarge", kind, name, "10.0.0.1")


def launch(kind: str, when: float, failed: bool) -> LaunchRequest:
    state = LaunchRequest.Status.FAILED if failed else LaunchRequest.Status.PENDING
    details = "InsufficientInstanceCapacity" if failed else None
    return LaunchRequest(
        "g6.xlarge", kind, 1, state, int(when), int(when) if failed else None, details
    )


class Autoscaler:
    """An autoscaler's state and file, with a clock of its own."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "config.json"
        self.file.write_text(json.dumps(CONFIG))
        self.now = 1_800_000_000.0
        self.status = ClusterStatus()
        self.fallback = self.start()

    def start(self) -> SpotFallback:
        return SpotFallback(self.file, AFTER_S, lambda: self.status, lambda: self.now)

    def poll(self, after_s: float = 0.0) -> dict[str, Any]:
        """The on-demand type's entry after another poll."""
        self.now += after_s
        self.fallback.poll_once()
        types = json.loads(self.file.read_text())["available_node_types"]
        assert types[SPOT] == CONFIG["available_node_types"][SPOT]  # type: ignore[index]
        return {
            key: types[ON_DEMAND].get(key, 0) for key in ("max_workers", "min_workers", "priority")
        }

    def fail(self, kind: str, for_s: float) -> dict[str, Any]:
        """Launches of a type fail every ten seconds, for `for_s` seconds."""
        found = self.poll()
        for _ in range(int(for_s // 10)):
            self.now += 10
            self.status.failed_launches.append(launch(kind, self.now, failed=True))
            found = self.poll()
        return found


@pytest.fixture
def autoscaler(tmp_path: Path) -> Autoscaler:
    return Autoscaler(tmp_path)


IDLE = {"max_workers": 0, "min_workers": 0, "priority": 0}


def test_on_demand_takes_over_and_the_price_is_logged(
    autoscaler: Autoscaler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    autoscaler.status.active_nodes.append(node(SPOT, "a"))
    assert autoscaler.fail(SPOT, AFTER_S) == IDLE
    assert not caplog.messages
    assert autoscaler.fail(SPOT, 10) == {"max_workers": 3, "min_workers": 0, "priority": 1}
    assert caplog.messages[-1].endswith(
        "gpu-spot at $0.3621/h has been unavailable for 300 s (InsufficientInstanceCapacity); "
        "new nodes are gpu-on-demand at $0.8048/h"
    )
    autoscaler.status.active_nodes.clear()  # the existing one is preempted too
    assert autoscaler.poll(5) == {"max_workers": 4, "min_workers": 1, "priority": 1}


def test_an_unanswered_launch_counts_as_failed(autoscaler: Autoscaler) -> None:
    autoscaler.status.pending_launches.append(launch(SPOT, autoscaler.now, failed=False))
    assert autoscaler.poll(AFTER_S - 1) == IDLE
    assert autoscaler.poll(1)["max_workers"] == 4


@pytest.mark.parametrize("relief", ["a node comes", "nothing is requested any more"])
def test_a_short_shortage_changes_nothing(autoscaler: Autoscaler, relief: str) -> None:
    autoscaler.fail(SPOT, AFTER_S - 50)
    if relief == "a node comes":
        autoscaler.status.pending_nodes.append(node(SPOT, "b"))
        autoscaler.poll()
    else:
        autoscaler.poll(after_s=100)
    assert autoscaler.fail(SPOT, AFTER_S - 50) == IDLE


def test_spot_is_tried_again_without_ending_nodes(
    autoscaler: Autoscaler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    autoscaler.fail(SPOT, AFTER_S + 10)
    autoscaler.status.active_nodes += [node(ON_DEMAND, "c"), node(ON_DEMAND, "d")]
    assert autoscaler.poll(10)["max_workers"] == 4
    assert autoscaler.poll(RETRY_SPOT_AFTER_S) == {
        "max_workers": 2,
        "min_workers": 0,
        "priority": 0,
    }
    assert "spot is tried again" in caplog.text
    autoscaler.status.active_nodes.pop()
    assert autoscaler.poll(10)["max_workers"] == 1
    autoscaler.status.active_nodes.pop()
    assert autoscaler.poll(10) == IDLE


def test_if_both_are_unavailable_they_alternate(
    autoscaler: Autoscaler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    autoscaler.fail(SPOT, AFTER_S + 10)
    assert autoscaler.fail(ON_DEMAND, AFTER_S + 10)["max_workers"] == 0
    assert "new nodes are gpu-spot at $0.3621/h" in caplog.text


def test_a_restart_continues_from_the_file(autoscaler: Autoscaler) -> None:
    """`ray up` writes the file again, and starts the program again."""
    autoscaler.fail(SPOT, AFTER_S + 10)
    autoscaler.fallback = autoscaler.start()
    assert autoscaler.poll(5)["max_workers"] == 4
    autoscaler.file.write_text(json.dumps(CONFIG))
    assert autoscaler.poll(5)["max_workers"] == 4
