"""The node types of cluster.yaml under Ray's autoscaler, with nodes that are processes of one host.

Ray's provider for tests starts a raylet instead of a machine, so the test sees the autoscaler's
decisions from the types' resources, limits and priorities.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rack import CHECKOUT, Rack

from cluster.base.config import read_yaml

pytestmark = pytest.mark.cluster

HEAD = "f" * 51 + "00000"
"""The provider's id for the head."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
START = (
    f"RAY_FAKE_CLUSTER=1 RAY_enable_autoscaler_v2=1 RAY_CLOUD_INSTANCE_ID={HEAD} "
    f"RAY_OVERRIDE_NODE_ID_FOR_TESTING={HEAD} AUTOSCALER_UPDATE_INTERVAL_S=1 "
    "ray start --head --num-cpus=0 --object-store-memory=80000000 "
    "--autoscaling-config=/root/autoscaler.json"
)
WORK = """
import pathlib, time
import ray

def workers():
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    return sorted(node["Labels"].get("heliostat.io/market", "?") for node in alive)

def until(count):
    end = time.monotonic() + 300
    while len(workers()) != count:
        assert time.monotonic() < end, workers()
        time.sleep(0.2)
    print(count, "->", *workers(), flush=True)

@ray.remote(num_gpus=1, num_cpus=1)
def work():
    while not pathlib.Path("/root/enough").exists():
        time.sleep(0.1)
    return ray.get_runtime_context().get_node_id()

ray.init(address="auto", log_to_driver=False)
until(0)
asked = [work.remote() for _ in range(3)]
until(3)
pathlib.Path("/root/enough").touch()
print("ran on", len(set(ray.get(asked))))
until(0)
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Rack]:
    with Rack(tmp_path / "rack", {"solo": "10.77.9.10"}, "10.77.9.1") as rack:
        rack.boot("solo")
        yield rack


def autoscaling() -> dict[str, Any]:
    """cluster.yaml for that provider, with its node types, sizes and upscaling speed."""
    config = read_yaml(CHECKOUT / "cluster.yaml")
    types = config["available_node_types"]
    config["head_node_type"] = "ray.head.default"  # the provider's name for it
    types[config["head_node_type"]] = types.pop("head")
    for entry in types.values():
        entry["node_config"] = {}
        entry["resources"]["object_store_memory"] = 80_000_000
    commands = (key for key in config if key.endswith("_commands"))
    empty: dict[str, Any] = {
        **{key: [] for key in commands},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
    }
    kept = ("max_workers", "available_node_types", "head_node_type")
    return {
        **empty,
        **{key: config[key] for key in kept},
        "cluster_name": "fake",
        "idle_timeout_minutes": 0.1,  # not the 10 of the file
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "launch_multiple": True,
            "head_node_id": HEAD,
        },
    }


def test_three_spot_workers_start_for_three_tasks_and_end_when_idle(host: Rack) -> None:
    (host.disk("solo") / "root/autoscaler.json").write_text(json.dumps(autoscaling()))
    (host.disk("solo") / "root/work.py").write_text(WORK)
    host.run("solo", START)
    lines = host.run("solo", "python /root/work.py", timeout_s=900).stdout.splitlines()
    lines = [line for line in lines if line.startswith(("0 ->", "3 ->", "ran on"))]
    assert lines == ["0 ->", "3 -> spot spot spot", "ran on 3", "0 ->"]
