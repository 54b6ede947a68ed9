"""Learning rates by step, groups of weights, and the update rules."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cluster.base.config import validate
from trainers.modeling.optimizer import build_optimizer, learning_rate, set_learning_rate
from trainers.spec import OptimizerSpec

NAMES = st.sampled_from(["constant", "linear", "cosine"])


def rates(total_steps: int, **schedule: Any) -> list[float]:
    spec = validate(OptimizerSpec, {"lr": 0.5, "schedule": schedule})
    return [learning_rate(spec, step, total_steps) for step in range(total_steps)]


class TestLearningRate:
    @pytest.mark.parametrize(
        ("name", "wanted"),
        [
            ("constant", [0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
            ("linear", [0.25, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1]),
            ("cosine", [0.25, 0.5, 0.5, 0.44142136, 0.3, 0.15857864, 0.1]),
        ],
    )
    def test_seven_steps(self, name: str, wanted: list[float]) -> None:
        assert rates(7, name=name, warmup=0.3, final=0.2) == pytest.approx(wanted)

    @given(
        name=NAMES,
        total_steps=st.integers(2, 300),
        warmup=st.floats(0, 0.9),
        final=st.floats(0, 1),
    )
    def test_rises_linearly_to_the_peak_and_falls_to_the_end(
        self, name: str, total_steps: int, warmup: float, final: float
    ) -> None:
        found = rates(total_steps, name=name, warmup=warmup, final=final)
        rising = round(warmup * total_steps)
        assert found[:rising] == pytest.approx([0.5 * (i + 1) / rising for i in range(rising)])
        falling = found[rising:]
        assert all(b <= a + 1e-12 for a, b in itertools.pairwise(falling))
        if name == "constant":
            assert set(falling) <= {0.5}
        elif len(falling) >= 2:
            assert falling[0] == 0.5
            assert falling[-1] == pytest.approx(0.5 * final)

    @pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
    @pytest.mark.parametrize("warmup", [0.0, 0.05, 0.99])
    def test_a_run_of_one_step_learns(self, name: str, warmup: float) -> None:
        assert rates(1, name=name, warmup=warmup) == [0.5]

    @given(name=NAMES, total_steps=st.integers(1, 50), warmup=st.floats(0, 0.999))
    def test_no_step_is_negative_or_above_the_peak(
        self, name: str, total_steps: int, warmup: float
    ) -> None:
        assert all(0 <= rate <= 0.5 for rate in rates(total_steps, name=name, warmup=warmup))


class Everything(nn.Module):
    """A weight of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.linear = nn.Linear(4, 4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.layer_norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_only_matrices_and_kernels_decay(name: str) -> None:
    """With gradients of zero, decay is all that moves a weight."""
    torch.manual_seed(0)
    model = Everything()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1.0
    spec = OptimizerSpec.model_validate(
        {"name": name, "lr": 0.1, "weight_decay": 0.5, "momentum": 0.0}
    )
    optimizer = build_optimizer(spec, model)
    before = weights(model)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.step()
    after = weights(model)
    decayed = {"embedding.weight", "conv.weight", "linear.weight"}
    for key, value in before.items():
        factor = 1 - 0.1 * 0.5 if key in decayed else 1.0
        torch.testing.assert_close(after[key], value * factor, msg=key)


def test_frozen_weights_are_left_out() -> None:
    model = Everything()
    optimizer = build_optimizer(OptimizerSpec(), model)
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in model.parameters() if weight.requires_grad}


def test_a_model_without_matrices_or_without_biases() -> None:
    for model in (nn.LayerNorm(3), nn.Linear(3, 3, bias=False)):
        optimizer = build_optimizer(OptimizerSpec(), model)
        assert [len(group["params"]) for group in optimizer.param_groups] in ([1], [2])


class Parabola(nn.Module):
    """Its gradient is 2 x."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))

    def path(self, spec: OptimizerSpec, steps: int) -> list[list[float]]:
        optimizer = build_optimizer(spec, self)
        seen = []
        for _ in range(steps):
            self.x.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(self.x.tolist())
        self.kept = [key for state in optimizer.state.values() for key in state]
        return seen


def test_sgd_without_momentum_is_gradient_descent() -> None:
    model = Parabola()
    path = model.path(OptimizerSpec(name="sgd", lr=0.25, momentum=0.0), 3)
    assert path == [[1.5, -0.5], [0.75, -0.25], [0.375, -0.125]]
    assert "momentum_buffer" not in model.kept


def test_sgd_with_momentum_is_nesterovs() -> None:
    """x <- x - lr (g + m v), v <- m v + g, with v = g at first (Sutskever et al., ICML 2013)."""
    path = Parabola().path(OptimizerSpec(name="sgd", lr=0.1, momentum=0.5), 3)
    x, v = 3.0, 0.0
    for found, _ in path:
        g = 2 * x
        v = 0.5 * v + g
        x -= 0.1 * (g + 0.5 * v)
        assert found == pytest.approx(x)


def test_adamw_is_that_of_the_paper() -> None:
    """Loshchilov and Hutter, ICLR 2019, algorithm 2; a vector has no decay."""
    path = Parabola().path(OptimizerSpec(lr=0.1, betas=(0.8, 0.95), weight_decay=0.3), 4)
    x, m, v = 3.0, 0.0, 0.0
    for t, (found, _) in enumerate(path, start=1):
        g = 2 * x
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        x -= 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)) ** 0.5 + 1e-8)
        assert found == pytest.approx(x)


def test_the_rate_is_set_for_all_weights() -> None:
    optimizer = build_optimizer(OptimizerSpec(), Everything())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


class Complex(nn.Module):
    """Complex weights of every shape, one of them with a gradient that is a lazy conjugate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 2, dtype=torch.cdouble).T)
        self.vector = nn.Parameter(torch.randn(3, dtype=torch.cdouble))
        self.number = nn.Parameter(torch.randn((), dtype=torch.cdouble))
        self.real = nn.Parameter(torch.randn(3, dtype=torch.double))
        self.late = nn.Parameter(torch.randn(3, dtype=torch.cdouble))

    def give_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for name, weight in self.named_parameters():
            value = torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
            value = torch.empty_like(weight).copy_(value)  # of the weight's own strides
            weight.grad = None if name == "late" and step == 0 else value.conj().detach()


@pytest.mark.parametrize(
    "spec",
    [
        {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.3},
        {"name": "sgd", "lr": 0.1, "momentum": 0.5, "weight_decay": 0.3},
        {"name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.3},
    ],
)
def test_complex_weights_are_updated_as_pytorchs_plain_loops_do(spec: dict[str, Any]) -> None:
    ours, plain = Complex(), Complex()
    rule = OptimizerSpec.model_validate(spec)
    optimizer = build_optimizer(rule, ours)
    assert type(optimizer).__name__ == {"adamw": "AdamW", "sgd": "SGD"}[rule.name]
    groups = [
        {"params": [plain.matrix], "weight_decay": 0.3},
        {"params": [plain.vector, plain.number, plain.real, plain.late], "weight_decay": 0.0},
    ]
    other: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=0.1, betas=rule.betas, foreach=False)
        if rule.name == "adamw"
        else torch.optim.SGD(
            groups, lr=0.1, momentum=rule.momentum, nesterov=rule.momentum > 0, foreach=False
        )
    )
    for step in range(4):
        for model, steps in ((ours, optimizer), (plain, other)):
            model.give_gradients(step)
            if model is plain:  # its loops know no lazy conjugates
                for weight in model.parameters():
                    weight.grad = None if weight.grad is None else weight.grad.resolve_conj()
            steps.step()
            steps.zero_grad()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, plain.get_parameter(name), rtol=1e-12, atol=1e-12)
        for part, value in optimizer.state[weight].items():
            wanted = other.state[plain.get_parameter(name)][part]
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    assert all(weight.grad is None for weight in ours.parameters())


def test_a_weight_may_get_its_first_gradient_late() -> None:
    """PyTorch's fused SGD knows no momentum for it, and fails."""
    first, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    model = nn.ParameterList([first, late])
    optimizer = build_optimizer(OptimizerSpec(name="sgd", lr=0.1, momentum=0.5), model)
    first.grad = torch.ones(2)
    optimizer.step()
    late.grad = torch.ones(2)
    optimizer.step()
    v = [1.0, 0.5 + 1.0]
    assert first.tolist() == pytest.approx([1 - sum(0.1 * (1 + 0.5 * each) for each in v)] * 2)
    assert late.tolist() == pytest.approx([1 - 0.1 * (1 + 0.5)] * 2)
