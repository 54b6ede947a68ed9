"""What a driver asks about its connection to Ray."""

import socket
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
