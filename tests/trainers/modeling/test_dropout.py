"""Dropout masks are a function of (seed, position, draw) alone, and random."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from trainers.counter_rng import (
    SampleRandom,
    advance_keys,
    device_rng_state,
    drop_threshold,
    dropout_mask,
)
from trainers.devices import Cpu
from trainers.modeling.dropout import DropoutRate, key_dropout_by_sample

CPU = torch.device("cpu")
POSITIONS = st.lists(st.integers(0, 2**48), min_size=1, max_size=12)


class Twice(nn.Module):
    """Two dropout modules, of which one is called twice."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.first, self.second = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x), self.first(x), self.second(x)], 1)


def dropped(
    network: nn.Module, x: Tensor, positions: list[int] | Tensor | None = None, seed: int = 0
) -> Tensor:
    """The network's output for samples `x` at `positions` of the run."""
    network = copy.deepcopy(network)
    rng = key_dropout_by_sample(network)
    where = torch.arange(len(x)) if positions is None else torch.as_tensor(positions)
    with rng.seeded_by(SampleRandom(seed, where)):
        result: Tensor = network(x)
    return result


class TestAFunctionOfThePosition:
    @settings(deadline=None)
    @given(seed=st.integers(0, 2**31 - 1), positions=POSITIONS, data=st.data())
    def test_does_not_depend_on_other_samples_of_the_batch(
        self, seed: int, positions: list[int], data: st.DataObject
    ) -> None:
        """Any choice of samples, in any order and with repetitions, drops the same elements."""
        places = st.integers(0, len(positions) - 1)
        chosen = data.draw(st.lists(places, min_size=1, max_size=12))
        x = torch.rand(len(positions), 3, 5) + 1
        whole = dropped(Twice(), x, positions, seed)
        part = dropped(Twice(), x[chosen], [positions[i] for i in chosen], seed)
        assert torch.equal(whole[chosen], part)

    @pytest.mark.parametrize("size", [1, 3, 4, 12])
    def test_does_not_depend_on_the_micro_batch(self, size: int) -> None:
        x = torch.ones(12, 7)
        rng = key_dropout_by_sample(network := Twice())
        parts = []
        for positions in torch.arange(12).split(size):
            with rng.seeded_by(SampleRandom(0, positions)):
                parts.append(network(x[positions]))
        assert torch.equal(torch.cat(parts), dropped(Twice(), x))

    def test_rows_of_a_sample_may_be_flattened_into_the_batch(self) -> None:
        """[B, T, C] and [B * T, C] are the same."""
        x = torch.ones(4, 6, 5)
        assert torch.equal(
            dropped(nn.Dropout(0.5), x.flatten(0, 1), list(range(4))),
            dropped(nn.Dropout(0.5), x).flatten(0, 1),
        )

    def test_masks_are_high_bits_of_splitmix64(self) -> None:
        """The formula must not change: every recorded run depends on it."""
        keys_B = advance_keys(SampleRandom(42, torch.tensor([0, 1, 2**40])).keys_B)
        assert torch.equal(
            dropout_mask(keys_B, drop_threshold(0.3), 50),
            torch.tensor([[element(key, e) > 0.3 for e in range(50)] for key in keys_B.tolist()]),
        )
        start = (keys_B - SampleRandom(42, torch.tensor([0, 1, 2**40])).keys_B).unique()
        assert start.item() % 2**64 == 0xD1342543DE82EF95


def element(key: int, e: int) -> float:
    """Output `e` of splitmix64 from state `key`, as a signed integer brought to [0, 1)."""
    x = (key + e * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return ((x ^ x >> 31) + 2**63) % 2**64 / 2**64


def test_calls_modules_steps_and_seeds_differ() -> None:
    x = torch.ones(64, 100)
    masks = [*dropped(Twice(), x).unbind(1), *dropped(Twice(), x, torch.arange(64, 128)).unbind(1)]
    masks += dropped(Twice(), x, seed=1).unbind(1)
    bits = torch.stack([(mask != 0).flatten().double() for mask in masks])
    assert (torch.corrcoef(bits) - torch.eye(9)).abs().max() < 0.06  # 5 / sqrt(6400)


class TestDistribution:
    @pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9, 0.999])
    def test_the_share_that_is_dropped(self, p: float) -> None:
        gone = int(
            (
                ~dropout_mask(SampleRandom(3, torch.arange(1000)).keys_B, drop_threshold(p), 500)
            ).sum()
        )
        assert stats.binomtest(gone, 500_000, p).pvalue > 1e-3

    def test_rates_of_zero_and_one(self) -> None:
        x = torch.rand(50, 50)
        assert torch.equal(dropped(nn.Dropout(0.0), x), x)
        assert torch.equal(dropped(nn.Dropout(1.0), x), torch.zeros(50, 50))

    @pytest.mark.parametrize("lag", [1, 2, 64])
    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_neighbours_are_not_correlated(self, p: float, lag: int) -> None:
        keys_B = SampleRandom(5, torch.arange(20_000)).keys_B
        bits = dropout_mask(keys_B, drop_threshold(p), 70).double().numpy()
        samples = np.corrcoef(bits[:-lag].flatten(), bits[lag:].flatten())[0, 1]
        elements = np.corrcoef(bits[:, :-lag].flatten(), bits[:, lag:].flatten())[0, 1]
        later = dropout_mask(advance_keys(keys_B), drop_threshold(p), 70).double().numpy()
        draws = np.corrcoef(bits[:, :-lag].flatten(), later[:, lag:].flatten())[0, 1]
        # The standard error is at most 1 / sqrt(20,000 * 6) = 0.003.
        assert max(abs(samples), abs(elements), abs(draws)) < 0.012

    def test_the_count_that_a_sample_keeps_is_binomial(self) -> None:
        counts = dropout_mask(
            SampleRandom(9, torch.arange(20_000)).keys_B, drop_threshold(0.3), 40
        ).sum(1)
        found = np.bincount(counts, minlength=41)
        expected = stats.binom.pmf(np.arange(41), 40, 0.7) * 20_000
        common = expected > 10
        expected = expected[common] * found[common].sum() / expected[common].sum()
        assert stats.chisquare(found[common], expected).pvalue > 1e-3

    def test_elements_that_stay_are_scaled_to_keep_the_mean(self) -> None:
        x = torch.ones(200, 500, dtype=torch.float64)
        y = dropped(nn.Dropout(0.2), x)
        assert set(y.unique().tolist()) == {0.0, 1.25}
        assert y.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Dropout1d, (3,)), (nn.Dropout2d, (3, 2)), (nn.Dropout3d, (3, 2, 2))],
)
def test_dropout_of_whole_channels(
    module: Callable[..., nn.Module], shape: tuple[int, ...]
) -> None:
    y = dropped(module(0.5), torch.ones(16, 30, *shape)).flatten(2)
    assert torch.equal(y.amin(2), y.amax(2))
    assert 0.4 < (y[..., 0] == 0).double().mean() < 0.6


class TestInANetwork:
    def test_names_state_and_hooks_stay(self) -> None:
        network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout2d()))
        network[2].register_module("again", network[1])
        names, keys = [n for n, _ in network.named_modules()], [*network.state_dict()]
        seen: list[int] = []
        network[1].register_forward_hook(lambda *_: seen.append(1))
        key_dropout_by_sample(network)
        network(torch.ones(2, 2, 2, 2))
        assert seen == [1, 1]
        assert names == [n for n, _ in network.named_modules()]
        assert keys == [*network.state_dict()]
        assert repr(network[1]) == "SampleDropout(p=0.5, inplace=False)"
        assert isinstance(network[1], nn.Dropout)

    def test_a_copy_draws_for_itself(self) -> None:
        rng = key_dropout_by_sample(network := Twice())
        other = copy.deepcopy(network)
        assert other.first.rng is other.second.rng
        with rng.seeded_by(SampleRandom(0, torch.arange(4))):
            before = device_rng_state(Cpu())
            other(torch.ones(4, 9))
            assert not before.equal(device_rng_state(Cpu())), "nobody has told the copy its samples"

    def test_evaluation_drops_nothing_and_counts_nothing(self) -> None:
        rng = key_dropout_by_sample(network := Twice())
        x = torch.rand(4, 9)
        with rng.seeded_by(SampleRandom(0, torch.arange(4))):
            assert torch.equal(network.eval()(x), torch.stack([x, x, x], 1))
            found = network.train()(x)
        assert torch.equal(found, dropped(Twice(), x))

    @pytest.mark.parametrize(
        ("module", "shape"),
        [(nn.Dropout(), (5, 3)), (nn.Dropout(), ()), (nn.Dropout3d(), (4, 3, 2, 2))],
    )
    def test_inputs_that_are_not_samples_are_left_to_torch(
        self, module: nn.Module, shape: tuple[int, ...]
    ) -> None:
        before = device_rng_state(Cpu())
        dropped(module, torch.ones(shape), list(range(4)))
        assert not before.equal(device_rng_state(Cpu()))

    def test_a_subclass_keeps_its_own_forward(self) -> None:
        class Own(nn.Dropout):
            def forward(self, input: Tensor) -> Tensor:
                return input + 1

        assert torch.equal(dropped(Own(), torch.zeros(2, 2)), torch.ones(2, 2))

    def test_in_place_or_not_is_the_same(self) -> None:
        network = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.5, inplace=True))
        x = torch.rand(3, 4)
        expected = dropped(nn.Sequential(network[0], nn.Dropout(0.5)), x)
        assert torch.equal(dropped(network, x), expected)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_the_mask_does_not_depend_on_the_dtype(self, dtype: torch.dtype) -> None:
        x = torch.ones(8, 33)
        found = dropped(nn.Dropout(0.1), x.to(dtype))
        assert found.dtype == dtype
        assert torch.equal(found != 0, dropped(nn.Dropout(0.1), x) != 0)

    def test_gradients_are_those_of_a_product_with_the_mask(self) -> None:
        x = torch.rand(4, 9, requires_grad=True)
        y = dropped(nn.Dropout(0.5), x)
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, (y != 0) * 2.0)


def test_a_rate_for_each_of_several_models_at_once() -> None:
    """As `torch.func.vmap` over hyperparameters needs it."""
    rng = key_dropout_by_sample(module := nn.Dropout())
    rates, x = [0.0, 0.3, 1.0], torch.rand(4, 50)
    thresholds, scales = zip(*(DropoutRate.from_probability(p) for p in rates), strict=True)

    def at(threshold: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        module.p = DropoutRate(threshold, scale)  # type: ignore[assignment]
        with rng.seeded_by(SampleRandom(0, torch.arange(4))):
            result: Tensor = module(x)
        return result

    numbers = (torch.tensor(thresholds), torch.tensor(scales))
    found = torch.func.vmap(at, in_dims=(0, 0, None))(*numbers, x)
    for p, y in zip(rates, found, strict=True):
        torch.testing.assert_close(y, dropped(nn.Dropout(p), x))


@pytest.mark.slow
def test_compiled_once_for_all_steps_and_all_calls() -> None:
    """Also where the graph is broken between the draws, and the pieces are compiled alike."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            torch._dynamo.graph_break()
            result: Tensor = self.dropout(self.dropout(y))
            return result

    torch._dynamo.reset()
    network = nn.Sequential(*[Block() for _ in range(3)])
    rng, compiled = key_dropout_by_sample(network), torch.compile(network)
    for step in range(4):
        x = torch.ones(6, 8, requires_grad=True)
        random = SampleRandom(0, torch.arange(6) + 6 * step)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            with rng.seeded_by(random):
                found = compiled(x)
            with rng.seeded_by(random):
                expected = network(x)
        torch.testing.assert_close(found, expected)
        assert torch.equal(found == 0, expected == 0)


def test_a_tensor_parallel_activation(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = torch.rand(4, 9)
        spread = DTensor.from_local(x, mesh, [Replicate()])
        found = dropped(nn.Dropout(0.5), spread)
        assert isinstance(found, DTensor)
        assert torch.equal(found.to_local(), dropped(nn.Dropout(0.5), x))
    finally:
        torch.distributed.destroy_process_group()
