"""How many nodes a cluster's file asks for; tests/rack runs the launcher on hosts."""

from cluster.lifecycle.launcher import minimum_node_count


def test_the_head_is_one_of_the_minimum_nodes() -> None:
    local = {"provider": {"type": "local", "worker_ips": ["1.1.1.1", "1.1.1.2"]}}
    assert minimum_node_count(local) == 3
    assert minimum_node_count({**local, "min_workers": 1}) == 2
    kinds = {"head": {}, "spot": {"min_workers": 2}, "dear": {"min_workers": 1}}
    cloud = {"provider": {"type": "aws"}, "head_node_type": "head", "available_node_types": kinds}
    assert minimum_node_count(cloud) == 4
