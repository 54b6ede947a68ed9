"""Which Ray is used when none is named, and what a submitted job finds there."""

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
def test_no_ray_is_none(tmp_path: Path, text: str | None) -> None:
    note = tmp_path / "note"
    if text is not None:
        note.write_text(text)
    assert not local_ray_answers(note)


def test_one_that_was_killed_leaves_its_address_behind(tmp_path: Path) -> None:
    note = tmp_path / "note"
    with socket.create_server(("127.0.0.1", 0)) as server:
        note.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert local_ray_answers(note)
    assert not local_ray_answers(note)


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


def test_a_start_frees_what_earlier_starts_of_its_job_still_hold(ray_cluster: str) -> None:
    """And nothing of another job's. The earlier one lives on: Ray has not heard of its end."""

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


def test_relative_places_of_a_job_do_not_go_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (submission_metadata(), base_folder()) == (None, tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"heliostat.name": "a"}}')
    monkeypatch.setenv("HELIOSTAT_STORAGE", "/shared")
    assert (submission_metadata(), base_folder()) == ({"heliostat.name": "a"}, Path("/shared"))
    monkeypatch.delenv("HELIOSTAT_STORAGE")
    assert base_folder() == Path.home()
