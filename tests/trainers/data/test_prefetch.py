"""The feed gives what `Batches.at` gives, with and without its thread, which never outlives it."""

import math
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainers.data.prefetch import PlacedBatch, microbatch_slice, prefetch_batches
from trainers.data.sampling import SampleStream, to_device

CPU = torch.device("cpu")
GPU = pytest.param(
    torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
)


def stream(
    samples: int = 50, global_batch: int = 12, rank: int = 1, world: int = 2
) -> SampleStream:
    split = {
        "pixels": torch.arange(samples * 6, dtype=torch.uint8).reshape(samples, 2, 3),
        "half": torch.arange(samples).to(torch.float16) / 8,
        "label": torch.arange(samples),
    }
    return SampleStream(split, 3, global_batch, rank, world)


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def same(ours: PlacedBatch, theirs: PlacedBatch) -> bool:
    pairs = [(ours[0], theirs[0]), *((ours[1][name], theirs[1][name]) for name in theirs[1])]
    return ours[1].keys() == theirs[1].keys() and all(
        a.dtype == b.dtype and torch.equal(a.cpu(), b) for a, b in pairs
    )


class Watched(SampleStream):
    """Remembers which threads it was asked from, and can fail at a step."""

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__({"x": torch.arange(40)}, 0, 4)
        self.fails_at = fails_at
        self.threads: set[str] = set()

    def places(self, step: int) -> tuple[Tensor, Tensor]:
        self.threads.add(threading.current_thread().name)
        if step == self.fails_at:
            raise OSError(f"step {step} cannot be read")
        return super().positions_and_indices(step)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert running() == []


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("ahead", [None, 0, 1, 3])
@pytest.mark.parametrize("rounds", [1, 2, 4, 6, 7])
def test_it_gives_the_steps_of_its_batches(
    device: torch.device, ahead: int | None, rounds: int
) -> None:
    """In float64, over three epochs, beginning in the middle; a share of 6 in so many rounds."""
    fed = prefetch_batches(stream(), device, torch.float64, 3, 14, rounds, ahead)
    for step in range(3, 14):
        positions, batch = stream().batch(step)
        batch = to_device(batch, CPU, torch.float64)
        for number in range(rounds):
            part, _ = microbatch_slice(6, number, rounds)
            expected = positions[part], {name: values[part] for name, values in batch.items()}
            found = next(fed)
            assert found[0].device.type == device.type
            assert same(found, expected)
    assert next(fed, None) is None


@given(samples=st.integers(1, 50), rounds=st.integers(1, 60))
def test_every_sample_counts_once_and_no_micro_batch_is_empty(samples: int, rounds: int) -> None:
    counting: list[int] = []
    for number in range(rounds):
        part, counted = microbatch_slice(samples, number, rounds)
        assert len(range(samples)[part]) == max(1, counted)
        assert counted <= math.ceil(samples / rounds)
        counting += range(samples)[part][:counted]
    assert counting == list(range(samples))


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_is_given_out_is_never_written_again(ahead: int) -> None:
    everything = list(prefetch_batches(stream(), CPU, torch.float32, 0, 20, 2, ahead))
    labels = torch.cat([batch["label"] for _, batch in everything])
    expected = torch.cat([stream().batch(step)[1]["label"] for step in range(20)])
    assert torch.equal(labels, expected)


def test_a_cpu_needs_no_thread() -> None:
    batches = Watched()
    assert len(list(prefetch_batches(batches, CPU, torch.float32, 0, 5))) == 5
    assert batches.threads == {threading.current_thread().name}


def test_the_thread_prepares_and_stays_ahead_by_no_more_than_it_may() -> None:
    batches = Watched()
    asked: list[int] = []
    places = batches.places
    batches.places = lambda step: asked.append(step) or places(step)  # type: ignore[method-assign]
    fed = prefetch_batches(batches, CPU, torch.float32, 0, 10, prefetch=2)
    for step in range(4):
        next(fed)
        assert max(asked, default=0) <= step + 2
    fed.close()
    assert len(batches.threads) == 1
    assert threading.current_thread().name not in batches.threads


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_fault_is_raised_at_its_own_step(ahead: int) -> None:
    fed = prefetch_batches(Watched(fails_at=3), CPU, torch.float32, 0, 10, prefetch=ahead)
    assert len([next(fed) for _ in range(3)]) == 3
    with pytest.raises(OSError, match="step 3 cannot be read"):
        next(fed)
    assert running() == []


@pytest.mark.parametrize("end", ["closed", "dropped", "exhausted"])
def test_the_thread_ends_with_the_feed(end: str) -> None:
    fed = prefetch_batches(Watched(), CPU, torch.float32, 0, 3, prefetch=2)
    next(fed)
    assert len(running()) == 1
    if end == "closed":
        fed.close()
    elif end == "dropped":
        del fed
    else:
        assert len(list(fed)) == 2
    assert running() == []
