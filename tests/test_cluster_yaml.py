"""The shipped cluster file, judged by Ray's own launcher before any money is spent."""

from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.config import read_yaml

CLUSTER_YAML = Path(__file__).parent.parent / "cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return read_yaml(CLUSTER_YAML)


def test_it_passes_rays_own_schema(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


def test_a_misspelt_key_would_not(config: dict[str, Any]) -> None:
    config["available_node_types"]["head"]["min_worker"] = 0
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(config))


def test_no_door_is_open_to_the_world(config: dict[str, Any]) -> None:
    commands = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert "0.0.0.0" not in commands
    assert "RAY_AUTH_MODE=token" in " ".join(config["setup_commands"])
    ranges = [
        source["CidrIp"]
        for rule in config["provider"]["security_group"]["IpPermissions"]
        for source in rule["IpRanges"]
    ]
    assert ranges
    assert "0.0.0.0/0" not in ranges


def test_workers_are_spot_and_go_when_idle(config: dict[str, Any]) -> None:
    worker = config["available_node_types"]["gpu_spot"]
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert worker["min_workers"] == 0
    assert config["idle_timeout_minutes"] <= 15
