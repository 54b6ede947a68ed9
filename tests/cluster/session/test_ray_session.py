"""What a driver does when it connects to Ray."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

HOLDS = """
import sys
import ray
from ray.util.placement_group import placement_group
ray.init(log_to_driver=False)
group = placement_group([{"CPU": 1}])
ray.get(group.ready())
print(group.id.hex(), flush=True)
sys.stdin.read()
"""
CONNECTS = """
import ray
from cluster.session.ray_session import ray_session
with ray_session():
    table = ray.util.placement_group_table()
    print({group: info["state"] for group, info in table.items()})
"""


def test_an_attempt_removes_placement_groups_of_earlier_attempts(ray_cluster: str) -> None:
    """Not those of other jobs. The earlier driver still runs, as for a Ray that missed its end."""

    def driver(code: str, name: str) -> subprocess.Popen[str]:
        metadata = {"metadata": {"heliostat.name": name}}
        environment = {
            **os.environ,
            "RAY_ADDRESS": ray_cluster,
            "RAY_AUTH_MODE": "token",
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(metadata),
            "PYTHONPATH": str(Path(__file__).parents[3]),
        }
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, text=True
        )

    holders = [driver(HOLDS, name) for name in ("a", "b")]
    try:
        first, other = [holder.stdout.readline().strip() for holder in holders if holder.stdout]
        states = ast.literal_eval(driver(CONNECTS, "a").communicate(timeout=600)[0])
        assert (states[first], states[other]) == ("REMOVED", "CREATED")
    finally:
        for holder in holders:
            holder.communicate()
