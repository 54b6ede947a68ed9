"""The forward pass as one module, and the blocks that are units of sharding and recomputing."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.trainers.modeling.users_models import (
    Dataclasses,
    Methods,
    NestedLists,
    Repeated,
    Tied,
)
from trainers.modeling.forward import Forward, outermost_blocks, separate_blocks


def names(network: nn.Module, blocks: list[nn.Module]) -> list[str]:
    known = {module: name for name, module in network.named_modules()}
    return [known[block] for block in blocks]


@pytest.mark.parametrize(
    ("kind", "outermost", "separate"),
    [
        (NestedLists, ["downs.0.0", "downs.0.1", "downs.1.0", "downs.1.1"], ...),
        (Repeated, ["blocks.0", "blocks.1"], ...),
        (Tied, ["blocks.0", "blocks.1", "blocks.2"], ["blocks.1"]),
        (Dataclasses, ["blocks.0", "blocks.1"], ...),
        (Methods, [], ...),
    ],
)
def test_blocks_are_found_once(kind: Any, outermost: list[str], separate: Any) -> None:
    workload = kind(None, None)
    network = workload.build()
    found = outermost_blocks(workload, network)
    assert names(network, found) == outermost
    apart = separate_blocks(found, network)
    assert names(network, apart) == (outermost if separate is ... else separate)


def test_a_block_that_shares_a_weight_with_the_rest_is_not_apart() -> None:
    network = nn.ModuleDict({"head": nn.Linear(4, 4), "block": nn.Linear(4, 4)})
    network["block"].weight = network["head"].weight
    assert separate_blocks([network["block"]], network) == []


def test_containers_stand_for_their_members() -> None:
    class Chosen(NestedLists):
        def blocks(self, model: nn.Module) -> list[nn.Module]:
            return [nn.ModuleDict({"list": model.downs}), model.downs[0][0]]  # type: ignore[index]

    workload = Chosen(None, None)
    network = workload.build()
    assert names(network, outermost_blocks(workload, network)) == [
        *("downs.0.0", "downs.0.1", "downs.1.0", "downs.1.1")
    ]


def test_losses_or_the_output() -> None:
    workload = Methods(None, None)
    network = workload.build()
    forward = Forward(workload, network)
    batch = {"x": torch.randn(5, 8), "y": torch.randn(5, 3)}
    output = workload.forward(network, batch)
    assert torch.equal(forward(batch, with_loss=False), output)
    assert torch.equal(forward(batch), workload.loss(output, batch))
    assert [*forward.network.state_dict()] == [*network.state_dict()]
