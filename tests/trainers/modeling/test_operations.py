"""Operations against counts made by hand: two for a multiplication with its addition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainers.modeling.operations import OperationCounter

SAMPLES = 4


def count(
    network: nn.Module, x: Tensor, loss: Callable[[Any], Tensor] = lambda y: y.abs().sum()
) -> float | None:
    """FLOPs of a sample, forward and backward."""
    counter = OperationCounter()
    with counter.counting(len(x)):
        value = loss(network(x))
        counter.in_backward = True
        value.backward()
    return counter.per_sample


def data(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape)


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
        mlp = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        block = [Attention(width, 4), nn.LayerNorm(width), *mlp, nn.Dropout(0.1)]
        self.blocks = nn.ModuleList(nn.Sequential(*block) for _ in range(layers))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(x_BTC)


@pytest.mark.parametrize(("context", "width", "layers"), [(64, 32, 2), (16, 64, 3)])
def test_of_a_gpt_are_six_for_a_weight_and_token_and_twelve_for_attention(
    context: int, width: int, layers: int
) -> None:
    """6 N + 12 L T C a token (Chowdhery et al., PaLM, 2022, appendix B)."""
    tokens = torch.zeros(SAMPLES, context, dtype=torch.int64)
    weights = 12 * width**2 * layers + 256 * width
    expected = context * (6 * weights + 12 * layers * context * width)
    assert count(Gpt(256, width, layers), tokens) == expected


def test_attention_with_fewer_heads_of_keys() -> None:
    """Each query of 6 heads meets each key of 2: two products of width 8, and four going back."""

    class Grouped(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            k, v = (torch.randn(SAMPLES, 2, 10, 8, requires_grad=True) for _ in range(2))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    assert count(Grouped(), data(6, 7, 8).requires_grad_()) == 2 * 6 * (6 * 7 * 10 * 8)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    # The layer, the shape of a sample, and its multiplications: places times kernel.
    "plain": (nn.Conv2d(4, 8, 3, padding=1), (4, 10, 10), 100 * 8 * 4 * 9),
    "grouped": (nn.Conv2d(4, 8, 3, padding=1, groups=2), (4, 10, 10), 100 * 8 * 2 * 9),
    "depthwise": (nn.Conv2d(8, 8, 5, groups=8, stride=2), (8, 11, 11), 16 * 8 * 25),
    "one dimension": (nn.Conv1d(6, 9, 4, groups=3), (6, 20), 17 * 9 * 2 * 4),
    "three dimensions": (nn.Conv3d(4, 4, 2, groups=4), (4, 5, 5, 5), 64 * 4 * 8),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5), 25 * 4 * 6 * 9),
    "transposed, grouped": (nn.ConvTranspose1d(4, 6, 3, groups=2), (4, 9), 9 * 4 * 3 * 3),
    "dilated": (nn.Conv1d(2, 3, 3, dilation=2), (2, 12), 8 * 3 * 2 * 3),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("wanted", [False, True])
def test_convolutions(name: str, wanted: bool) -> None:
    """As many again for the gradient of the weight, and for that of the input if it is wanted."""
    layer, shape, products = CONVOLUTIONS[name]
    assert count(layer, data(*shape).requires_grad_(wanted)) == 2 * products * (3 if wanted else 2)


RECURRENT: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # Weights that each step multiplies, by a state of 16 or an input of 8.
    "lstm": (lambda: nn.LSTM(8, 16, batch_first=True), 4 * 16 * (8 + 16)),
    "gru": (lambda: nn.GRU(8, 16, batch_first=True), 3 * 16 * (8 + 16)),
    "rnn": (lambda: nn.RNN(8, 16, batch_first=True), 16 * (8 + 16)),
    "two layers": (
        lambda: nn.LSTM(8, 16, num_layers=2, batch_first=True),
        4 * 16 * (8 + 16) + 4 * 16 * (16 + 16),
    ),
    "both directions": (
        lambda: nn.LSTM(8, 16, bidirectional=True, batch_first=True),
        2 * 4 * 16 * (8 + 16),
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_layers(name: str, dtype: torch.dtype) -> None:
    """Three times the forward pass; a kernel may leave out the gradient of the first state."""
    build, weights = RECURRENT[name]
    steps = 30
    x = data(steps, 8).to(dtype).requires_grad_()
    found = count(build().to(dtype), x, lambda y: y[0].sum())
    assert found is not None
    assert 1 - 1 / steps < found / (6 * steps * weights) <= 1


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    steps, of_input, of_state = 30, 4 * 16 * 8, 4 * 16 * 16
    found = count(nn.LSTM(8, 16, batch_first=True), data(steps, 8), lambda y: y[0].sum())
    assert found == 2 * steps * (2 * of_input + 3 * of_state)


def test_of_a_convolutional_network() -> None:
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, stride=2)
    network = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.Flatten())
    expected = 4 * (3 * 8 * 9) * 32**2 + 6 * (8 * 16 * 9) * 16**2
    assert count(network, data(3, 32, 32)) == expected


def test_frozen_weights_need_no_gradient() -> None:
    network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    network[0].weight.requires_grad_(False)
    assert count(network, data(8)) == 2 * 64 + 4 * 64


def test_complex_products_are_four_real_ones() -> None:
    layer = nn.Linear(8, 8, bias=False, dtype=torch.complex64)
    assert count(layer, data(8).to(torch.complex64)) == 4 * 4 * 64


def test_products_with_vectors() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    assert count(Scores(), data(8)) == 4 * 8


def test_bilinear_layers() -> None:
    """For each pair of inputs and each output."""

    class Pairs(nn.Bilinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, x.flip(1)[:, :5])

    assert count(Pairs(8, 5, 3, bias=False), data(8)) == 4 * 8 * 5 * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_counts_once(reentrant: bool) -> None:
    layer = nn.Linear(8, 8, bias=False)

    class Recomputed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(layer, x, use_reentrant=reentrant)
            return y

    assert count(Recomputed(), data(8).requires_grad_()) == count(layer, data(8).requires_grad_())


def test_gradients_in_the_forward_pass_count() -> None:
    """Forces are the gradient of an energy: two products, and two more for each going back."""

    class Forces(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            energy = super().forward(x).square().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    layer = Forces(8, 8, bias=False)
    assert count(layer, data(8)) == 2 * 64 * (2 + 4)


def test_nothing_is_known_of_sparse_products() -> None:
    adjacency = torch.eye(SAMPLES).to_sparse()

    class Graph(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(adjacency, super().forward(x))

    assert count(Graph(8, 8), data(8)) is None


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "normalised": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)),
        (8,),
    ),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
    "fused attention": (lambda: Attention(8, 2), (5, 8)),
    "convolution": (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 9, 9)),
    "recurrent": (lambda: Recurrent(8, 16, batch_first=True), (5, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_counting_changes_no_result(name: str) -> None:
    """Not in a bit."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    network, x = build(), data(*shape)
    gradients = []
    for counted in (False, True):
        network.zero_grad()
        torch.manual_seed(1)
        if counted:
            count(network, x)
        else:
            network(x).abs().sum().backward()
        gradients.append([weight.grad for weight in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
