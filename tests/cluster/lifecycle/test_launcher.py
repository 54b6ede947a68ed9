"""Checks of a cluster's file before it is launched; tests/rack runs the launcher on hosts."""

from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from cluster.lifecycle.launcher import minimum_node_count, up

HOME = Path(__file__).parents[3]


def test_the_head_is_one_of_the_minimum_nodes() -> None:
    local = {"provider": {"type": "local", "worker_ips": ["1.1.1.1", "1.1.1.2"]}}
    assert minimum_node_count(local) == 3
    assert minimum_node_count({**local, "min_workers": 1}) == 2
    kinds = {"head": {}, "spot": {"min_workers": 2}, "dear": {"min_workers": 1}}
    cloud = {"provider": {"type": "aws"}, "head_node_type": "head", "available_node_types": kinds}
    assert minimum_node_count(cloud) == 4


def test_a_file_of_another_version_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (HOME / "cluster.yaml").read_text()
    older = text.replace("cluster.lifecycle.aws_ssh_ingress", "cluster.doors")
    (tmp_path / "cluster.yaml").write_text(older)
    place = r"head_setup_commands\.0: there is no module cluster\.doors in this version; render"
    with pytest.raises(SpecError, match=place):
        up(tmp_path / "cluster.yaml", print)
    assert not (tmp_path / ".ray").exists()
