"""Ray's nodes are found by the command lines of their processes."""

from pathlib import Path

import pytest

from cluster.node.raylets import NODE_IP_VAR, Raylet, local_raylets


def process(proc: Path, pid: int, *words: str) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cmdline").write_bytes("\0".join((*words, "")).encode())


def test_raylets_are_found_among_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(NODE_IP_VAR, raising=False)
    process(tmp_path, 7, "python", "--node_id=no")
    for pid, node in ((8, "a"), (9, "b")):
        flags = (f"--node_id={node}", f"--node_ip_address=10.0.0.{pid}", "--gcs-address=h:6379")
        process(tmp_path, pid, "/ray/core/src/raylet", "--labels={}", *flags, "plain")
    (tmp_path / "10").mkdir()  # it has ended
    first, second = Raylet(8, "a", "10.0.0.8", "h:6379"), Raylet(9, "b", "10.0.0.9", "h:6379")
    assert sorted(local_raylets(tmp_path), key=lambda raylet: raylet.pid) == [first, second]
    monkeypatch.setenv(NODE_IP_VAR, "10.0.0.9")
    assert list(local_raylets(tmp_path)) == [second]
