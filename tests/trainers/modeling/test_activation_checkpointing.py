"""Activation checkpointing changes the memory between forward and backward, and nothing else."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def test_blocks_inside_of_blocks_are_left_to_the_outer_ones() -> None:
    calls = []
    inner = nn.Linear(2, 2)
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    outer = nn.Sequential(inner)
    checkpoint_activations([outer, inner, nn.ModuleList([outer])], DropoutRng())
    outer(torch.ones(1, 2)).sum().backward()
    assert len(calls) == 2
    assert type(inner) is nn.Linear


def test_a_model_without_blocks_is_refused() -> None:
    message = r"^train\.activation_checkpointing: the model has no blocks .* method blocks$"
    with pytest.raises(SpecError, match=message):
        checkpoint_activations([], DropoutRng())


def test_the_shipped_network_has_blocks() -> None:
    spec, workload = resolve({"workload": "vision", "model": {"blocks": [2, 1]}}, RunSpec)
    assert isinstance(workload, Vision)
    assert not spec.train.activation_checkpointing
    assert len(workload.blocks(workload.build())) == 3
