"""Activation checkpointing changes the memory between forward and backward, and nothing else."""

import copy
import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from cluster.base.errors import SpecError
from trainers.counter_rng import SampleRandom, seed_device
from trainers.devices import Cpu
from trainers.modeling.activation_checkpointing import checkpoint_activations
from trainers.modeling.dropout import DropoutRng, key_dropout_by_sample
from trainers.spec import RunSpec, resolve
from trainers.workloads.vision.workload import Vision


class Block(nn.Module):
    """Draws twice from one module; `native` draws from the device's generator too."""

    def __init__(self, native: bool) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 64), nn.Linear(64, 8)
        self.dropout, self.native = nn.Dropout(0.3), native

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        y = self.dropout(F.relu(self.wide(x)))
        y = F.dropout(y, 0.1, self.training and self.native)
        return x + scale * self.dropout(self.narrow(y))


class Network(nn.Module):
    def __init__(self, native: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(native) for _ in range(4)])
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(self.dropout(x), scale=0.5)
        return self.dropout(x)


def pair(native: bool = False, compiled: bool = False) -> list[tuple[nn.Module, DropoutRng]]:
    """The same network without and with activation checkpointing."""
    plain = Network(native).double()
    other = copy.deepcopy(plain)
    both = [(plain, key_dropout_by_sample(plain)), (other, key_dropout_by_sample(other))]
    checkpoint_activations(other.blocks, both[1][1], compiled)
    return both


def step(
    network: nn.Module, rng: DropoutRng, number: int, call: Callable[..., Tensor] | None = None
) -> tuple[Tensor, int]:
    """All gradients of a step, and the bytes that it kept for its backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    network.zero_grad()
    x = torch.linspace(-1, 1, 160, dtype=torch.float64).reshape(20, 8)
    seed_device(Cpu(), number)
    with rng.seeded_by(SampleRandom(0, torch.arange(20) + 20 * number)):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = (network if call is None else call)(x).square().sum()
        loss.backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return torch.cat([loss.detach()[None], *gradients]), sum(kept.values())


@pytest.mark.parametrize("native", [False, True])
def test_the_same_gradients_from_less_memory(native: bool) -> None:
    plain, recomputed = pair(native)
    for number in range(3):
        expected, all_bytes = step(*plain, number)
        found, kept_bytes = step(*recomputed, number)
        assert torch.equal(found, expected)
        assert kept_bytes < all_bytes / 2


def test_a_compiled_network_gives_the_same_gradients() -> None:
    torch._dynamo.reset()
    plain, (network, rng) = pair(compiled=True)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for number in range(3):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found, _ = step(network, rng, number, compiled)
        torch.testing.assert_close(found, step(*plain, number)[0])


def test_gradients_of_gradients() -> None:
    """The graph is walked twice, the first time in the middle of the draws of a step."""
    results = []
    for network, rng in pair():
        x = torch.linspace(-1, 1, 160, dtype=torch.float64).reshape(20, 8).requires_grad_()
        with rng.seeded_by(SampleRandom(0, torch.arange(20))):
            y = network(x)
            slope = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
            (network(x) + slope).square().sum().backward()
        results.append([p.grad for p in network.parameters()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_names_state_hooks_and_copies_stay() -> None:
    (plain, _), (network, _) = pair()
    assert [*network.state_dict()] == [*plain.state_dict()]
    assert [n for n, _ in network.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert isinstance(network.blocks[0], Block)
    network.load_state_dict(plain.state_dict())
    other = copy.deepcopy(network)
    for weight in other.parameters():
        nn.init.zeros_(weight)
    x = torch.ones(2, 8, dtype=torch.float64)
    assert torch.equal(other.eval()(x), x)
    assert not torch.equal(network.eval()(x), x)


class Tracking(nn.Module):
    """Has all kinds of state that a forward pass may change."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.spectral = spectral_norm(nn.Linear(8, 8))
        self.calls, self.mean, self.history = 0, torch.zeros(8), [0.0]
        self.register_buffer("codes", torch.linspace(0, 1, 8))
        self.register_buffer("late", None)
        self.untouched = nn.Buffer(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + torch.tanh(self.spectral(self.norm(self.layer(x)))) / self.calls
        x = x * (1 + self.codes * self.untouched) + self.mean * len(self.history)
        self.codes.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.mean = 0.5 * self.mean + x.detach().mean(0)
        self.history.append(x.detach().sum().item())
        if self.late is None:
            self.register_buffer("late", torch.ones(8, dtype=x.dtype))
        if random.random() < 0.5:
            x = x * self.late
        return x * (1 + np.random.rand())


class Tower(nn.Module):
    """Calls its second block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Tracking(), Tracking()])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[1]):
            x = block(x)
        return x


def test_state_is_changed_once_and_gradients_are_those_of_the_state_before() -> None:
    """Running statistics, power iterations, codes, counters, lists, late buffers, random draws."""
    results = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = Tower().double()
        if recomputed:
            checkpoint_activations(network.blocks, DropoutRng())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        random.seed(1)
        np.random.seed(1)
        for number in range(4):
            x = torch.linspace(-1, 1, 160, dtype=torch.float64).reshape(20, 8) * (number + 1)
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
        blocks: list[Any] = [*network.blocks]
        plain = [(block.calls, block.history, block.mean.tolist()) for block in blocks]
        draws = random.random(), np.random.rand()
        results.append((network.state_dict(), plain, draws))
    assert results[0][1:] == results[1][1:]
    assert results[0][0].keys() == results[1][0].keys()
    for name, value in results[0][0].items():
        assert torch.equal(results[1][0][name], value), name


def test_state_is_changed_once_by_a_compiled_network() -> None:
    class Block(nn.Sequential):
        pass

    torch._dynamo.reset()
    norms = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = Block(nn.Linear(8, 8), nn.BatchNorm1d(8)).double()
        if recomputed:
            checkpoint_activations([network], DropoutRng(), compiled=True)
        call = torch.compile(network, backend="aot_eager") if recomputed else network
        call(torch.linspace(-1, 1, 160, dtype=torch.float64).reshape(20, 8)).sum().backward()
        norms.append(network[1])
    torch.testing.assert_close(norms[1].running_mean, norms[0].running_mean)
    torch.testing.assert_close(norms[1].running_var, norms[0].running_var)


def test_values_that_a_forward_pass_leaves_alone_are_not_kept() -> None:
    block = nn.Sequential(nn.Linear(8, 8), Table())
    checkpoint_activations([block], DropoutRng())
    before = len(kept_copies(1 << 14))
    output = block(torch.ones(2, 8))
    assert len(kept_copies(1 << 14)) == before
    output.sum().backward()


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(1 << 14, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table[0]


def kept_copies(rows: int) -> list[Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is Tensor and t.shape[:1] == (rows,)]


def test_a_model_without_blocks_is_refused() -> None:
    message = r"^train\.activation_checkpointing: the model has no blocks .* method blocks$"
    with pytest.raises(SpecError, match=message):
        checkpoint_activations([], DropoutRng())


def test_the_shipped_network_has_blocks() -> None:
    spec, workload = resolve({"workload": "vision", "model": {"blocks": [2, 1]}}, RunSpec)
    assert isinstance(workload, Vision)
    assert not spec.train.activation_checkpointing
    assert len(workload.blocks(workload.build())) == 3
