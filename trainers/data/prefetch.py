"""From a stream of batches to the worker's device, ahead of time where that pays."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.data.sampling import SampleStream, shard_bounds, to_device
from trainers.workload import Batch

PREFETCHED_BATCHES = 2
"""Micro-batches that are ready or under way while a GPU computes; each takes its memory there."""

PlacedBatch = tuple[Tensor, Batch]
"""Positions in the run [B] and samples, on the worker's device."""


def prefetch_batches(
    batches: SampleStream,
    device: torch.device,
    dtype: torch.dtype,
    start: int,
    stop: int,
    accumulation_steps: int = 1,
    prefetch: int | None = None,
) -> Generator[PlacedBatch]:
    """The worker's share of the steps [start, stop), each in `rounds` micro-batches, in order.

    A share of fewer samples than rounds comes with its last sample several times; see `micro`.
    The samples are those of `Batches.at`, floating-point columns in `dtype`. A thread prepares
    the next `ahead` micro-batches: two for a GPU, from pinned memory and on a stream of its own;
    none elsewhere, where the thread would take its time from the step. What goes wrong in the
    thread is raised here. The thread ends with the last step or with `close`.
    """
    if prefetch is None:
        prefetch = PREFETCHED_BATCHES if device.type == "cuda" else 0
    parts = _microbatches(batches, start, stop, accumulation_steps)
    if not prefetch:
        for positions, index in parts:
            yield positions.to(device), to_device(batches.gather(index), device, dtype)
        return
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def prepare() -> "_PendingBatch | None":
        part = next(parts, None)  # parts are taken in the thread alone: a new epoch takes time
        return part and _start_copy(batches, *part, device, dtype, stream)

    pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
    try:
        coming = deque(pool.submit(prepare) for _ in range(prefetch))
        while (ready := coming.popleft().result()) is not None:
            coming.append(pool.submit(prepare))
            yield ready.wait()
    finally:
        pool.shutdown(cancel_futures=True)


def microbatch_slice(samples: int, number: int, accumulation_steps: int) -> tuple[slice, int]:
    """Which of a share's `samples` are in a micro-batch, and how many of them count.

    Workers whose shares differ by a sample go through a sharded model equally often; who has
    nothing left takes a sample that does not count.
    """
    low, high = shard_bounds(samples, number, accumulation_steps)
    begin = min(low, samples - 1)
    return slice(begin, max(high, begin + 1)), high - low


def _microbatches(
    batches: SampleStream, start: int, stop: int, accumulation_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The positions of each micro-batch, and where in the split its samples lie."""
    for step in range(start, stop):
        positions, index = batches.positions_and_indices(step)
        for number in range(accumulation_steps):
            part, _ = microbatch_slice(len(index), number, accumulation_steps)
            yield positions[part], index[part]


@dataclass(frozen=True)
class _PendingBatch:
    """A micro-batch whose copy to the device may still be under way."""

    positions: Tensor
    batch: Batch
    copied: torch.cuda.Event | None

    def wait(self) -> PlacedBatch:
        """The micro-batch for use on the current stream, which waits for the copy."""
        if self.copied is not None:
            current = torch.cuda.current_stream(self.positions.device)
            current.wait_event(self.copied)
            # Their memory belongs to the other stream, which must not reuse it too early.
            for values in (self.positions, *self.batch.values()):
                values.record_stream(current)
        return self.positions, self.batch


def _start_copy(
    batches: SampleStream,
    positions: Tensor,
    index: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    stream: torch.cuda.Stream | None,
) -> _PendingBatch:
    if stream is None:
        return _PendingBatch(positions, to_device(batches.gather(index), device, dtype), None)
    with torch.cuda.stream(stream):
        positions = positions.pin_memory().to(device, non_blocking=True)
        batch = batches.gather(index, pinned=True)
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        # Not in the same call: it would convert on the CPU and wait for that.
        return _PendingBatch(positions, to_device(batch, device, dtype), stream.record_event())
