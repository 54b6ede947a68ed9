"""The properties that the cluster.yaml at the root promises. Whether it is up to date is tested in
tests/cluster/definition/test_launcher_file.py.
"""

from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import read_yaml

CLUSTER_YAML = Path(__file__).parent.parent / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return read_yaml(CLUSTER_YAML)


def test_no_port_is_open_to_the_world(config: dict[str, Any]) -> None:
    commands = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert "0.0.0.0" not in commands
    starts = [line for line in commands.split("export ") if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert "cluster.lifecycle.aws_ssh_ingress" in " ".join(config["head_setup_commands"])
    ranges = [
        source["CidrIp"]
        for rule in config["provider"]["security_group"]["IpPermissions"]
        for source in rule["IpRanges"]
    ]
    assert ranges
    assert "0.0.0.0/0" not in ranges


def test_the_head_is_on_demand_and_workers_are_on_spot_and_end_when_idle(
    config: dict[str, Any],
) -> None:
    head, worker = (config["available_node_types"][kind] for kind in ("head", "gpu"))
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert worker["min_workers"] == 0
    assert config["idle_timeout_minutes"] <= 15
    tags = {each["ResourceType"]: each["Tags"] for each in head["node_config"]["TagSpecifications"]}
    assert tags.keys() == {"instance", "volume"}
