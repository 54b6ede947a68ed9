"""The devices and cost of nodes; tests/rack asks a real cluster."""

from cluster.lifecycle.status import NodeStatus, cost_line


def node(usd_per_hour: float | None = None, **resources: float) -> NodeStatus:
    return NodeStatus("10.0.0.1", "gpu", False, resources, usd_per_hour)


def test_a_node_without_a_price_is_not_counted_as_free() -> None:
    assert cost_line([node(0.2), node(1.0)]) == "cost: $1.20 per hour"
    assert cost_line([node(0.2), node()]) == "cost: $0.20 per hour for 1 nodes; unknown for 1"
    assert cost_line([node()]) == "cost: unknown, no node has a price"


def test_devices_are_named_by_their_model() -> None:
    assert node(CPU=8, GPU=4, **{"accelerator_type:A100": 1}).devices() == "4 x A100"
    assert node(CPU=8, TPU=1).devices() == "1 x TPU"
    assert node(CPU=8).devices() == "-"
