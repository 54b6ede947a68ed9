"""Prefetching yields the batches of `SampleStream.batch`, with and without its thread."""

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
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def are_equal(ours: PlacedBatch, theirs: PlacedBatch) -> bool:
    pairs = [(ours[0], theirs[0]), *((ours[1][name], theirs[1][name]) for name in theirs[1])]
    return ours[1].keys() == theirs[1].keys() and all(
        a.dtype == b.dtype and torch.equal(a.cpu(), b) for a, b in pairs
    )


class Watched(SampleStream):
    """Records the threads that call it, and can fail at a step."""

    def __init__(self, fails_at: int = -1) -> None:
        super().__init__({"x": torch.arange(40)}, 0, 4)
        self.fails_at = fails_at
        self.threads: set[str] = set()

    def positions_and_indices(self, step: int) -> tuple[Tensor, Tensor]:
        self.threads.add(threading.current_thread().name)
        if step == self.fails_at:
            raise OSError(f"step {step} cannot be read")
        return super().positions_and_indices(step)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert running() == []


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("prefetch", [None, 0, 1, 3])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 6, 7])
def test_it_yields_the_batches_of_the_stream(
    device: torch.device, prefetch: int | None, micro_batches: int
) -> None:
    """In float64, over three epochs, from the middle of the first; 6 samples per step."""
    fed = prefetch_batches(stream(), device, torch.float64, 3, 14, micro_batches, prefetch)
    for step in range(3, 14):
        positions, batch = stream().batch(step)
        batch = to_device(batch, CPU, torch.float64)
        for number in range(micro_batches):
            part, _ = microbatch_slice(6, number, micro_batches)
            expected = positions[part], {name: values[part] for name, values in batch.items()}
            found = next(fed)
            assert found[0].device.type == device.type
            assert are_equal(found, expected)
    assert next(fed, None) is None


@given(samples=st.integers(1, 50), micro_batches=st.integers(1, 60))
def test_every_sample_counts_once_and_no_micro_batch_is_empty(
    samples: int, micro_batches: int
) -> None:
    counting: list[int] = []
    for number in range(micro_batches):
        part, counted = microbatch_slice(samples, number, micro_batches)
        assert len(range(samples)[part]) == max(1, counted)
        assert counted <= math.ceil(samples / micro_batches)
        counting += range(samples)[part][:counted]
    assert counting == list(range(samples))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_yielded_batch_is_never_overwritten(prefetch: int) -> None:
    everything = list(prefetch_batches(stream(), CPU, torch.float32, 0, 20, 2, prefetch))
    labels = torch.cat([batch["label"] for _, batch in everything])
    expected = torch.cat([stream().batch(step)[1]["label"] for step in range(20)])
    assert torch.equal(labels, expected)


def test_a_cpu_needs_no_thread() -> None:
    batches = Watched()
    assert len(list(prefetch_batches(batches, CPU, torch.float32, 0, 5))) == 5
    assert batches.threads == {threading.current_thread().name}


def test_the_thread_prefetches_no_more_than_asked_for() -> None:
    batches = Watched()
    asked: list[int] = []
    original = batches.positions_and_indices

    def record(step: int) -> tuple[Tensor, Tensor]:
        asked.append(step)
        return original(step)

    batches.positions_and_indices = record  # type: ignore[method-assign]
    fed = prefetch_batches(batches, CPU, torch.float32, 0, 10, prefetch=2)
    for step in range(4):
        next(fed)
        assert max(asked, default=0) <= step + 2
    fed.close()
    assert len(batches.threads) == 1
    assert threading.current_thread().name not in batches.threads


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_is_raised_at_its_own_step(prefetch: int) -> None:
    fed = prefetch_batches(Watched(fails_at=3), CPU, torch.float32, 0, 10, prefetch=prefetch)
    assert len([next(fed) for _ in range(3)]) == 3
    with pytest.raises(OSError, match="step 3 cannot be read"):
        next(fed)
    assert running() == []


@pytest.mark.parametrize("end", ["closed", "dropped", "exhausted"])
def test_the_thread_ends_with_the_generator(end: str) -> None:
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
