"""Which Ray is used without an address, and what a submitted job does when it connects."""

import ast
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.connection.ray_connection import base_folder, local_ray_answers, submission_metadata


@pytest.mark.parametrize("text", [None, "", "nonsense", "127.0.0.1:x"])
def test_without_a_valid_address_no_ray_answers(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "ray_current_cluster"
    if text is not None:
        file.write_text(text)
    assert not local_ray_answers(file)


def test_a_killed_ray_does_not_answer_at_the_address_it_left(tmp_path: Path) -> None:
    file = tmp_path / "ray_current_cluster"
    with socket.create_server(("127.0.0.1", 0)) as server:
        file.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert local_ray_answers(file)
    assert not local_ray_answers(file)


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
from cluster.connection.ray_connection import ray_session
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


def test_relative_paths_of_a_job_refer_to_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (submission_metadata(), base_folder()) == (None, tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"heliostat.name": "a"}}')
    monkeypatch.setenv("HELIOSTAT_STORAGE", "/shared")
    assert (submission_metadata(), base_folder()) == ({"heliostat.name": "a"}, Path("/shared"))
    monkeypatch.delenv("HELIOSTAT_STORAGE")
    assert base_folder() == Path.home()
