"""What a dry run tells of a model: its FLOPs, its unused parameters, the inputs of dropout."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import Batch, Workload, table
from trainers.devices import Cpu
from trainers.modeling.dropout import key_dropout_by_sample
from trainers.modeling.dry_run import DryRun, count_flops, dry_run, skeleton


class Model(Workload):
    """Any network, with the loss of a regression or of the next token."""

    network: nn.Module

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


def flops(network: nn.Module, *shape: int) -> float | None:
    return count_flops(Model(network), network, {"x": torch.randn(2, *shape)})


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        b, t, c = x_BTC.shape
        qkv = self.mix(x_BTC).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x_BTC + self.out(y.transpose(1, 2).reshape(b, t, c))


class Gpt(nn.Module):
    """Blocks of 12 C^2 weights each, and a head tied to the embedding."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.scale = torch.ones(width)  # neither weight nor buffer
        mlp = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        block = [Attention(width, 4), nn.LayerNorm(width), *mlp, nn.Dropout(0.1)]
        self.blocks = nn.ModuleList(nn.Sequential(*block) for _ in range(layers))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embed(tokens_BT) * self.scale + torch.zeros(tokens_BT.shape[1], 1)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(x_BTC)


class TestFlops:
    @pytest.mark.parametrize(("context", "width", "layers"), [(64, 32, 2), (16, 64, 3)])
    def test_of_a_gpt_are_six_for_a_weight_and_token_and_twelve_for_attention(
        self, context: int, width: int, layers: int
    ) -> None:
        """6 N + 12 L T C a token (Chowdhery et al., PaLM, 2022, appendix B)."""
        network = Gpt(256, width, layers)
        batch = {"x": torch.zeros(2, context, dtype=torch.int64)}
        weights = 12 * width**2 * layers + 256 * width
        expected = context * (6 * weights + 12 * layers * context * width)
        assert count_flops(Model(network), network, batch) == expected

    def test_of_a_convolutional_network(self) -> None:
        """Two per weight and place forward, four backward where gradients are needed."""
        first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, stride=2)
        network = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.Flatten())
        expected = 4 * (3 * 8 * 9) * 32**2 + 6 * (8 * 16 * 9) * 16**2
        assert flops(network, 3, 32, 32) == expected

    def test_frozen_weights_need_no_gradient(self) -> None:
        network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        network[0].weight.requires_grad_(False)
        assert flops(network, 8) == 2 * 64 + 4 * 64

    def test_nothing_of_the_run_is_disturbed(self) -> None:
        network = nn.Sequential(
            *(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        ).eval()
        network[0].weight.grad = torch.ones(8, 8)
        batch = {"x": torch.randn(4, 8)}
        before = {name: value.clone() for name, value in network.state_dict().items()}
        x, random = batch["x"].clone(), torch.get_rng_state()
        assert count_flops(Model(network), network, batch)
        after = network.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(batch["x"], x)
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(network[0].weight.grad, torch.ones(8, 8))
        assert network[3].weight.grad is None
        assert not network.training

    def test_no_memory_is_needed(self) -> None:
        """Forty gigabytes of weights."""
        with torch.device("meta"):
            network = nn.Linear(100_000, 100_000, bias=False)
        before = Cpu().memory().peak
        assert flops(network, 100_000) == 4e10
        assert Cpu().memory().peak < before + 200_000_000

    def test_in_double_precision(self) -> None:
        assert flops(nn.Linear(8, 8, bias=False).double(), 8) == 4 * 64

    def test_are_those_of_training_mode(self) -> None:
        class Twice(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                x = super().forward(x)
                return super().forward(x) if self.training else x

        assert flops(Twice(8, 8, bias=False).eval(), 8) == (2 + 4 + 4) * 64

    def test_none_if_control_flow_depends_on_the_data(self) -> None:
        class Branch(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) if x.mean() > 0 else x

        assert flops(Branch(8, 8), 8) is None

    def test_none_if_the_model_raises(self) -> None:
        assert flops(nn.Linear(8, 8), 9) is None


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


def test_a_skeleton_is_as_good_as_the_network() -> None:
    network = Net()
    network.idle.weight = network.up.weight
    key_dropout_by_sample(network)
    outline = skeleton(network)
    assert outline is not None
    assert all(weight.is_meta for weight in outline.parameters())
    assert run(outline, 2, 3, 4) == run(network, 2, 3, 4)


def test_a_model_may_use_tensors_that_it_makes_on_the_cpu() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.from_numpy(np.ones(4, np.float32))

    assert run(Scaled(4, 4), 2, 4).flops_per_sample == flops(nn.Linear(4, 4), 4)
