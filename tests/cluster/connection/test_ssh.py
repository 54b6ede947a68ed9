"""SSH targets of a cluster's file; tests/rack opens tunnels."""

from pathlib import Path

import pytest

from cluster.base.errors import ClusterError, SpecError
from cluster.connection.ssh import SshTarget, on_premises_targets, read_launcher_file, tunnel_to

LOCAL = {
    "provider": {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]},
    "auth": {"ssh_user": "me", "ssh_private_key": "~/key"},
}


def test_the_head_is_first_and_may_have_an_external_address() -> None:
    assert list(on_premises_targets(LOCAL)) == ["10.0.0.1", "10.0.0.2"]
    outside = {**LOCAL, "provider": {**LOCAL["provider"], "external_head_ip": "192.0.2.1"}}
    assert on_premises_targets(outside)["10.0.0.1"] == SshTarget("192.0.2.1", "me", "~/key")


def test_a_file_without_a_cluster_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("workload: digits")
    with pytest.raises(SpecError, match="not a cluster for `ray up`, has no 'cluster_name'"):
        read_launcher_file(file)


def test_failed_ssh_is_one_line() -> None:
    with (
        pytest.raises(ClusterError, match=r"^ssh to 127\.0\.0\.1: .+$"),
        tunnel_to(SshTarget("127.0.0.1", "nobody-here", "/nowhere/key")),
    ):
        pass
