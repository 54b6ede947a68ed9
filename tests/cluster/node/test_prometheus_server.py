"""The command that starts Prometheus, and the dashboard beside Ray's."""

import json
from pathlib import Path

import pytest

from cluster.node.prometheus_server import install_dashboard, prometheus_command


def test_prometheus_listens_on_the_loopback_interface_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "prometheus"
    program.parent.mkdir()
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    command = prometheus_command(tmp_path, tmp_path / "session")
    assert command is not None
    assert command[0] == str(program)
    assert "--web.listen-address=127.0.0.1:9090" in command
    assert json.loads(install_dashboard(tmp_path / "session").read_text())["uid"] == "heliostat"
