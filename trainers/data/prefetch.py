"""From a stream of batches to the worker's device, ahead of time where that pays."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.data.dataset import Batches, on_device, share
from trainers.workload import Batch

AHEAD = 2
"""Micro-batches that are ready or under way while a GPU computes; each takes its memory there."""

Fed = tuple[Tensor, Batch]
"""Positions in the run [B] and samples, on the worker's device."""


def feed(
    batches: Batches,
    device: torch.device,
    dtype: torch.dtype,
    start: int,
    stop: int,
    rounds: int = 1,
    ahead: int | None = None,
) -> Generator[Fed]:
    """The worker's share of the steps [start, stop), each in `rounds` micro-batches, in order.

    A share of fewer samples than rounds comes with its last sample several times; see `micro`.
    The samples are those of `Batches.at`, floating-point columns in `dtype`. A thread prepares
    the next `ahead` micro-batches: two for a GPU, from pinned memory and on a stream of its own;
    none elsewhere, where the thread would take its time from the step. What goes wrong in the
    thread is raised here. The thread ends with the last step or with `close`.
    """
    if ahead is None:
        ahead = AHEAD if device.type == "cuda" else 0
    parts = _parts(batches, start, stop, rounds)
    if not ahead:
        for positions, index in parts:
            yield positions.to(device), on_device(batches.gather(index), device, dtype)
        return
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def prepare() -> "_Prepared | None":
        part = next(parts, None)  # parts are taken in the thread alone: a new epoch takes time
        return part and _prepare(batches, *part, device, dtype, stream)

    pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
    try:
        coming = deque(pool.submit(prepare) for _ in range(ahead))
        while (ready := coming.popleft().result()) is not None:
            coming.append(pool.submit(prepare))
            yield ready.received()
    finally:
        pool.shutdown(cancel_futures=True)


def micro(samples: int, number: int, rounds: int) -> tuple[slice, int]:
    """Which of a share's `samples` are in a micro-batch, and how many of them count.

    Workers whose shares differ by a sample go through a sharded model equally often; who has
    nothing left takes a sample that does not count.
    """
    low, high = share(samples, number, rounds)
    begin = min(low, samples - 1)
    return slice(begin, max(high, begin + 1)), high - low


def _parts(batches: Batches, start: int, stop: int, rounds: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The positions of each micro-batch, and where in the split its samples lie."""
    for step in range(start, stop):
        positions, index = batches.places(step)
        for number in range(rounds):
            part, _ = micro(len(index), number, rounds)
            yield positions[part], index[part]


@dataclass(frozen=True)
class _Prepared:
    """A micro-batch whose copy to the device may still be under way."""

    positions: Tensor
    batch: Batch
    copied: torch.cuda.Event | None

    def received(self) -> Fed:
        """The micro-batch for use on the current stream, which waits for the copy."""
        if self.copied is not None:
            current = torch.cuda.current_stream(self.positions.device)
            current.wait_event(self.copied)
            # Their memory belongs to the other stream, which must not reuse it too early.
            for values in (self.positions, *self.batch.values()):
                values.record_stream(current)
        return self.positions, self.batch


def _prepare(
    batches: Batches,
    positions: Tensor,
    index: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    stream: torch.cuda.Stream | None,
) -> _Prepared:
    if stream is None:
        return _Prepared(positions, on_device(batches.gather(index), device, dtype), None)
    with torch.cuda.stream(stream):
        positions = positions.pin_memory().to(device, non_blocking=True)
        batch = batches.gather(index, pinned=True)
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        # Not in the same call: it would convert on the CPU and wait for that.
        return _Prepared(positions, on_device(batch, device, dtype), stream.record_event())
