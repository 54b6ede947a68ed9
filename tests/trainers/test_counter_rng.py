"""Random numbers are a function of (seed, position, draw, element), and are random."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainers.counter_rng import (
    SampleRandom,
    combine_seeds,
    drop_threshold,
    dropout_mask,
    seed_device,
)
from trainers.devices import Cpu

SEEDS = st.integers(0, 2**31 - 1)
POSITIONS = st.lists(st.integers(0, 2**48), min_size=1, max_size=12)


def uniform(seed: int, positions: list[int] | torch.Tensor, *shape: int) -> torch.Tensor:
    return SampleRandom(seed, torch.as_tensor(positions)).uniform(*shape)


class TestSampleRandom:
    @settings(deadline=None)
    @given(seed=SEEDS, positions=POSITIONS, data=st.data())
    def test_a_sample_does_not_depend_on_its_batch(
        self, seed: int, positions: list[int], data: st.DataObject
    ) -> None:
        """Any selection of samples, in any order and with repetitions, gets the same rows."""
        places = st.integers(0, len(positions) - 1)
        chosen = data.draw(st.lists(places, min_size=1, max_size=12))
        whole = SampleRandom(seed, torch.tensor(positions))
        part = SampleRandom(seed, torch.tensor(positions)[chosen])
        for shape in ((), (3,), (2, 2)):
            assert torch.equal(whole.uniform(*shape)[chosen], part.uniform(*shape))
            assert torch.equal(whole.normal(*shape)[chosen], part.normal(*shape))

    def test_the_elements_of_a_draw_do_not_depend_on_its_shape(self) -> None:
        wide = uniform(3, [5, 6], 4, 6)
        assert torch.equal(wide.reshape(2, 24), uniform(3, [5, 6], 24))
        assert torch.equal(wide.reshape(2, 24)[:, :5], uniform(3, [5, 6], 5))

    def test_frozen_numbers(self) -> None:
        """Every recorded run depends on the formula."""
        found = (uniform(42, [0, 1, 2**40], 2) * 2**24).to(torch.int64)
        assert found.tolist() == [[5244447, 10861296], [9130442, 2923083], [12185863, 8201067]]


def test_a_compiled_mask_is_the_same() -> None:
    """Inductor must not compute the counters of the elements in C++ that relies on overflow."""
    keys_B = SampleRandom(3, torch.arange(18)).keys_B
    compiled = torch.compile(dropout_mask, fullgraph=True, dynamic=False)
    threshold = drop_threshold(0.5)
    assert compiled(keys_B, threshold, 8).equal(dropout_mask(keys_B, threshold, 8))


def test_draws_seeds_positions_and_elements_all_differ() -> None:
    random = SampleRandom(0, torch.arange(100))
    several = [random.uniform(50), random.uniform(50), uniform(1, torch.arange(100), 50)]
    values = torch.stack([*several, uniform(0, torch.arange(100, 200), 50)]).flatten()
    # 20,000 of 2**24 values: about 12 pairs are equal by chance.
    assert len(values) - len(values.unique()) < 40


class TestDistribution:
    @pytest.mark.parametrize("layout", ["positions", "elements", "draws"])
    def test_uniform_in_0_1_along_every_index(self, layout: str) -> None:
        if layout == "positions":
            values = uniform(7, torch.arange(200_000))
        elif layout == "elements":
            values = uniform(7, [123], 200_000)[0]
        else:
            random = SampleRandom(7, torch.arange(100))
            values = torch.stack([random.uniform() for _ in range(2000)], 1).flatten()
        assert values.dtype == torch.float32
        assert values.min() >= 0
        assert values.max() < 1
        assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
        for bits in (8, 24):  # the high bits, and the lowest ones
            cells = (values.double() * 2**bits).long() % 256
            assert stats.chisquare(np.bincount(cells, minlength=256)).pvalue > 1e-3

    @pytest.mark.parametrize("lag", [1, 2, 64])
    def test_neighbours_are_not_correlated(self, lag: int) -> None:
        values = uniform(5, torch.arange(20_000), 4)
        along_positions = np.corrcoef(values[:-lag].flatten(), values[lag:].flatten())[0, 1]
        first, second = uniform(5, torch.arange(80_000)), uniform(5 + lag, torch.arange(80_000))
        across_seeds = np.corrcoef(first, second)[0, 1]
        # The standard error of both is about 1 / sqrt(80,000) = 0.0035.
        assert abs(along_positions) < 0.015
        assert abs(across_seeds) < 0.015

    def test_pairs_of_draws_fill_the_square(self) -> None:
        random = SampleRandom(9, torch.arange(100_000))
        x, y = random.uniform(), random.uniform()
        counts, _, _ = np.histogram2d(x, y, bins=16, range=[[0, 1], [0, 1]])
        assert stats.chisquare(counts.flatten()).pvalue > 1e-3

    def test_normal(self) -> None:
        values = SampleRandom(11, torch.arange(100_000)).normal(2)
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
        flat = values.flatten().double().numpy()
        assert stats.kstest(flat, "norm").pvalue > 1e-3
        assert abs(flat.mean()) < 0.01
        assert abs(flat.std() - 1) < 0.01
        assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.015


class TestCombineSeeds:
    @pytest.mark.parametrize(
        ("parts", "seed"),
        [
            ((0,), 8147104208329303767),
            ((1, 2), 8108304748106729788),
            ((2**31 - 1, 10**9), 5788700793897620361),
        ],
    )
    def test_frozen_values(self, parts: tuple[int, ...], seed: int) -> None:
        assert combine_seeds(*parts) == seed

    def test_no_collisions(self) -> None:
        pairs = {combine_seeds(seed, step) for seed in range(300) for step in range(300)}
        singles = {combine_seeds(seed) for seed in range(10_000)}
        assert len(pairs) == 90_000
        assert len(singles) == 10_000
        assert not pairs & singles

    @given(parts=st.lists(st.integers(0, 2**63), min_size=1, max_size=4))
    def test_every_generator_accepts_the_seed(self, parts: list[int]) -> None:
        seed = combine_seeds(*parts)
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)


def test_seed_device_seeds_torch() -> None:
    drawn = []
    for _ in range(2):
        seed_device(Cpu(), 5)
        drawn.append(torch.rand(3))
    manual = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], manual)
