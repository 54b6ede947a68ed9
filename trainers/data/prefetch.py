"""Moves a stream of batches to the worker's device, ahead of time where that helps."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.data.sampling import SampleStream, shard_bounds, to_device
from trainers.workload import Batch

PREFETCHED_BATCHES = 2
"""Micro-batches that are prepared while a GPU computes; each takes its memory there."""

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
    """The worker's share of the steps [start, stop), in `accumulation_steps` micro-batches each.

    The samples are those of `SampleStream.batch`, for weights of `dtype`: see `to_device`. A share
    with fewer samples than micro-batches repeats its last sample, see `microbatch_slice`.

    A thread prepares the next `prefetch` micro-batches: two for a GPU, in pinned memory and on a
    CUDA stream of its own; none on other devices, where the thread would slow the step down. Its
    errors are raised here. The thread ends after the last step or when the generator is closed.
    """
    if prefetch is None:
        prefetch = PREFETCHED_BATCHES if device.type == "cuda" else 0
    microbatches = _microbatches(batches, start, stop, accumulation_steps)
    if not prefetch:
        for positions, index in microbatches:
            yield positions.to(device), to_device(batches.gather(index), device, dtype)
        return
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def prepare() -> "_PendingBatch | None":
        microbatch = next(microbatches, None)  # in the thread, as a new epoch's order takes time
        return microbatch and _start_copy(batches, *microbatch, device, dtype, stream)

    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        coming = deque(pool.submit(prepare) for _ in range(prefetch))
        while (ready := coming.popleft().result()) is not None:
            coming.append(pool.submit(prepare))
            yield ready.wait()
    finally:
        pool.shutdown(cancel_futures=True)


def microbatch_slice(samples: int, number: int, accumulation_steps: int) -> tuple[slice, int]:
    """The samples of a worker's share in micro-batch `number`, and how many of them count.

    All ranks run the same number of collectives, though their shares may differ by a sample: a
    worker with no samples left processes one sample with weight 0.
    """
    low, high = shard_bounds(samples, number, accumulation_steps)
    begin = min(low, samples - 1)
    return slice(begin, max(high, begin + 1)), high - low


def _microbatches(
    batches: SampleStream, start: int, stop: int, accumulation_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions in the run and indices into the split of each micro-batch."""
    for step in range(start, stop):
        positions, index = batches.positions_and_indices(step)
        for number in range(accumulation_steps):
            part, _ = microbatch_slice(len(index), number, accumulation_steps)
            yield positions[part], index[part]


@dataclass(frozen=True)
class _PendingBatch:
    """A micro-batch whose copy to the device may not be finished."""

    positions: Tensor
    batch: Batch
    copied: torch.cuda.Event | None

    def wait(self) -> PlacedBatch:
        """The micro-batch, once the current stream is told to wait for the copy."""
        if self.copied is not None:
            current = torch.cuda.current_stream(self.positions.device)
            current.wait_event(self.copied)
            # Their memory belongs to the copy stream, which must not reuse it too early.
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
        # Converting in the same call would happen on the CPU, and the copy would block.
        return _PendingBatch(positions, to_device(batch, device, dtype), stream.record_event())
