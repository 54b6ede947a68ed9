"""What a run over shapes alone tells of a model: see also `count_flops` in test_throughput."""

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from trainers import Batch, Workload, table
from trainers.engine.dropout import key_dropout_by_sample
from trainers.engine.dry_run import DryRun, dry_run


class Model(Workload):
    """Any network, with the mean of squares as its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(None, None)
        self.network = network

    def dataset(self) -> dict[str, pa.Table]:
        return {"train": table(), "val": table()}

    def build(self) -> nn.Module:
        return self.network

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["x"])

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return output.flatten(1).square().mean(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.idle, self.frozen = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.wide, self.long = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = self.wide(self.up(x_BTC))
        return self.long(self.frozen(x_BTC).flatten(0, 1)).view(x_BTC.shape)


def run(network: nn.Module, *shape: int) -> DryRun:
    result = dry_run(Model(network), network, {"x": torch.randn(shape)})
    assert result is not None
    return result


def test_parameters_without_a_gradient_are_named_but_not_frozen_ones() -> None:
    assert run(Net(), 2, 3, 4).unused_parameters == {"idle.weight", "idle.bias"}
    assert run(nn.Linear(4, 1), 2, 4).unused_parameters == set()


def test_shared_weights_are_used_if_one_of_their_names_is() -> None:
    network = Net()
    network.idle.weight = network.up.weight
    assert run(network, 2, 3, 4).unused_parameters == {"idle.bias"}


def test_shapes_of_dropout_are_those_of_a_sample() -> None:
    """Of [B, T, C] and of [B * T, C] alike."""
    network = Net()
    key_dropout_by_sample(network)
    for batch in (2, 5):
        assert run(network, batch, 3, 4).dropout_shapes == {
            "wide": {(1, 3, 8)},
            "long": {(3, 8)},
        }


def test_a_model_that_asks_for_values_is_not_known() -> None:
    class Routed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            chosen = x.sum(1) > 0
            return super().forward(x[chosen]) if chosen.any() else x

    network = Routed(4, 4)
    assert dry_run(Model(network), network, {"x": torch.randn(2, 4)}) is None
