"""The order of samples is a function of the position, on any number of workers."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainers.counter_rng import combine_seeds
from trainers.data import sampling
from trainers.data.sampling import SampleStream, epoch_permutation, shard_bounds


class TestEpochPermutation:
    @given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6), samples=st.integers(1, 300))
    def test_an_epoch_is_a_permutation(self, seed: int, epoch: int, samples: int) -> None:
        order = epoch_permutation(seed, epoch, samples)
        assert sorted(order.tolist()) == list(range(samples))
        assert torch.equal(order, epoch_permutation(seed, epoch, samples))

    @pytest.mark.parametrize("samples", [7, 30_000, 100_003])
    def test_the_width_of_its_indices_does_not_change_it(self, samples: int) -> None:
        """Runs of earlier versions, with 64 bits for each index, go on in the same order."""
        generator = torch.Generator().manual_seed(combine_seeds(3, 5))
        wide = torch.randperm(samples, generator=generator)
        assert torch.equal(epoch_permutation(3, 5, samples), wide)
        assert torch.equal(epoch_permutation(3, 5, samples, torch.int32).long(), wide)

    def test_epochs_and_seeds_differ(self) -> None:
        orders = [epoch_permutation(seed, epoch, 50) for seed in range(5) for epoch in range(5)]
        assert len({tuple(order.tolist()) for order in orders}) == 25

    @given(count=st.integers(0, 1000), world=st.integers(1, 20))
    def test_shares_are_contiguous_and_even(self, count: int, world: int) -> None:
        shares = [shard_bounds(count, rank, world) for rank in range(world)]
        assert shares[0][0] == 0
        assert shares[-1][1] == count
        assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
        sizes = [stop - start for start, stop in shares]
        assert max(sizes) - min(sizes) <= 1


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """samples, global batch, world size, seed"""
    world = draw(st.integers(1, 5))
    global_batch = draw(st.integers(world, 40))
    return draw(st.integers(1, 60)), global_batch, world, draw(st.integers(0, 2**31 - 1))


def stream(
    samples: int, global_batch: int, seed: int, rank: int = 0, world: int = 1
) -> SampleStream:
    split = {"x": torch.arange(samples), "y": torch.arange(samples)[:, None] * 10}
    return SampleStream(split, seed, global_batch, rank, world)


class TestSampleStream:
    @settings(max_examples=60, deadline=None)
    @given(run=runs(), steps=st.lists(st.integers(0, 30), min_size=1, max_size=8))
    @example(run=(60, 16, 4, 0), steps=[3, 4, 2, 30, 0])
    @example(run=(3, 40, 5, 0), steps=[0, 1, 0])  # a batch of many epochs
    def test_any_number_of_workers_sees_the_same_global_batches(
        self, run: tuple[int, int, int, int], steps: list[int]
    ) -> None:
        """For any steps, in any order."""
        samples, global_batch, world, seed = run
        ranks = [stream(samples, global_batch, seed, rank, world) for rank in range(world)]
        for step in steps:
            shares = [rank.batch(step) for rank in ranks]
            positions, batch = stream(samples, global_batch, seed).batch(step)
            assert positions.tolist() == list(range(step * global_batch, (step + 1) * global_batch))
            assert torch.equal(torch.cat([share[0] for share in shares]), positions)
            for column in batch:
                joined = torch.cat([share[1][column] for share in shares])
                assert torch.equal(joined, batch[column])
            assert torch.equal(batch["y"][:, 0], batch["x"] * 10)

    @settings(max_examples=60, deadline=None)
    @given(run=runs(), epochs=st.integers(1, 3))
    def test_every_epoch_has_every_sample_once(
        self, run: tuple[int, int, int, int], epochs: int
    ) -> None:
        samples, global_batch, _, seed = run
        batches = stream(samples, global_batch, seed)
        steps = -(-epochs * samples // global_batch)
        seen = torch.cat([batches.batch(step)[1]["x"] for step in range(steps)])
        for epoch in range(epochs):
            order = seen[epoch * samples : (epoch + 1) * samples]
            assert torch.equal(order, epoch_permutation(seed, epoch, samples))

    def test_a_batch_is_a_copy(self) -> None:
        """Augmentation in place must not reach the mapped data set."""
        split = {"x": torch.zeros(8)}
        _, batch = SampleStream(split, seed=0, global_batch=8).batch(0)
        batch["x"] += 1
        assert split["x"].sum() == 0

    def test_streams_in_the_same_epoch_share_its_order(self) -> None:
        """64 slots of 10 million samples would otherwise hold 64 orders of 40 MB."""
        streams = [stream(90, 30, seed=11) for _ in range(64)]
        for each in streams:
            each.batch(2)
        assert len({id(each._epoch_order(0)) for each in streams}) == 1
        assert streams[0]._epoch_order(0).nbytes == 4 * 90
        streams[0].batch(3)
        assert streams[0]._epoch_order(1) is not streams[1]._epoch_order(0)
        assert streams[2]._epoch_order(1) is streams[0]._epoch_order(1)
        assert stream(90, 30, seed=12)._epoch_order(0) is not streams[3]._epoch_order(0)

    def test_an_order_that_no_stream_holds_is_forgotten(self) -> None:
        one = stream(80, 30, seed=13)
        one.batch(0)
        assert (13, 0, 80) in sampling._orders_in_use
        one.batch(6)
        assert (13, 0, 80) not in sampling._orders_in_use
        assert (13, 2, 80) in sampling._orders_in_use
        del one
        assert (13, 2, 80) not in sampling._orders_in_use
