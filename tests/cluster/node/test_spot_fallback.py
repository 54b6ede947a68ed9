"""Spot that stays away: who is asked instead, from when on, and what is said."""

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
    why = "InsufficientInstanceCapacity" if failed else None
    return LaunchRequest("g6.xlarge", kind, 1, state, int(when), int(when) if failed else None, why)


class World:
    """An autoscaler as the fallback sees it, with a clock of its own."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "config.json"
        self.file.write_text(json.dumps(CONFIG))
        self.now = 1_800_000_000.0
        self.status = ClusterStatus()
        self.fallback = self.start()

    def start(self) -> SpotFallback:
        return SpotFallback(self.file, AFTER_S, lambda: self.status, lambda: self.now)

    def look(self, after_s: float = 0.0) -> dict[str, Any]:
        """The on-demand type's entry after another look."""
        self.now += after_s
        self.fallback.poll_once()
        types = json.loads(self.file.read_text())["available_node_types"]
        assert types[SPOT] == CONFIG["available_node_types"][SPOT]  # type: ignore[index]
        return {
            key: types[ON_DEMAND].get(key, 0) for key in ("max_workers", "min_workers", "priority")
        }

    def fail(self, kind: str, for_s: float) -> dict[str, Any]:
        """Launches of a type fail every ten seconds for so long."""
        found = self.look()
        for _ in range(int(for_s // 10)):
            self.now += 10
            self.status.failed_launches.append(launch(kind, self.now, failed=True))
            found = self.look()
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


IDLE = {"max_workers": 0, "min_workers": 0, "priority": 0}


def test_on_demand_takes_over_and_the_price_is_said(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world.status.active_nodes.append(node(SPOT, "a"))
    assert world.fail(SPOT, AFTER_S) == IDLE
    assert not caplog.messages
    assert world.fail(SPOT, 10) == {"max_workers": 3, "min_workers": 0, "priority": 1}
    assert caplog.messages[-1].endswith(
        "gpu-spot at $0.3621/h has been unavailable for 300 s (InsufficientInstanceCapacity); "
        "new nodes are gpu-on-demand at $0.8048/h"
    )
    world.status.active_nodes.clear()  # the one that was there is reclaimed too
    assert world.look(5) == {"max_workers": 4, "min_workers": 1, "priority": 1}


def test_a_launch_that_is_never_answered_counts(world: World) -> None:
    world.status.pending_launches.append(launch(SPOT, world.now, failed=False))
    assert world.look(AFTER_S - 1) == IDLE
    assert world.look(1)["max_workers"] == 4


@pytest.mark.parametrize("relief", ["a node comes", "nobody asks any more"])
def test_spot_that_is_only_short_for_a_while_is_kept(world: World, relief: str) -> None:
    world.fail(SPOT, AFTER_S - 50)
    if relief == "a node comes":
        world.status.pending_nodes.append(node(SPOT, "b"))
        world.look()
    else:
        world.look(after_s=100)
    assert world.fail(SPOT, AFTER_S - 50) == IDLE


def test_spot_is_tried_again_and_no_node_is_ended_by_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world.fail(SPOT, AFTER_S + 10)
    world.status.active_nodes += [node(ON_DEMAND, "c"), node(ON_DEMAND, "d")]
    assert world.look(10)["max_workers"] == 4
    assert world.look(RETRY_SPOT_AFTER_S) == {"max_workers": 2, "min_workers": 0, "priority": 0}
    assert "spot is tried again" in caplog.text
    world.status.active_nodes.pop()
    assert world.look(10)["max_workers"] == 1
    world.status.active_nodes.pop()
    assert world.look(10) == IDLE


def test_where_neither_is_to_be_had_both_are_asked_in_turn(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world.fail(SPOT, AFTER_S + 10)
    assert world.fail(ON_DEMAND, AFTER_S + 10)["max_workers"] == 0
    assert "new nodes are gpu-spot at $0.3621/h" in caplog.text


def test_a_restart_goes_on_from_what_the_file_says(world: World) -> None:
    """`ray up` writes the file anew, and starts the program anew."""
    world.fail(SPOT, AFTER_S + 10)
    world.fallback = world.start()
    assert world.look(5)["max_workers"] == 4
    world.file.write_text(json.dumps(CONFIG))
    assert world.look(5)["max_workers"] == 4
