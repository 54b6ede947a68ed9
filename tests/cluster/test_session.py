"""Which Ray is used when none is named."""

import socket
from pathlib import Path

import pytest

from cluster.session import ray_runs_here


@pytest.mark.parametrize("text", [None, "", "nonsense", "127.0.0.1:x"])
def test_no_ray_is_none(tmp_path: Path, text: str | None) -> None:
    note = tmp_path / "note"
    if text is not None:
        note.write_text(text)
    assert not ray_runs_here(note)


def test_one_that_was_killed_leaves_its_address_behind(tmp_path: Path) -> None:
    note = tmp_path / "note"
    with socket.create_server(("127.0.0.1", 0)) as server:
        note.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        assert ray_runs_here(note)
    assert not ray_runs_here(note)
