"""This worker's share of each global batch, in micro-batches on its device."""

import math
from collections.abc import Iterator

from torch import Tensor

from trainers.data.prefetch import PlacedBatch, microbatch_slice, prefetch_batches
from trainers.data.sampling import SampleStream, to_device
from trainers.precision import weights_dtype
from trainers.spec import TrainSpec
from trainers.worker import Worker
from trainers.workload import Batch


class MicroBatches:
    """The micro-batches of any step; those of the steps to come are prefetched."""

    def __init__(self, samples: Batch, train: TrainSpec, worker: Worker, total_steps: int) -> None:
        """`samples` is the whole training split."""
        self._device, self._dtype = worker.device, weights_dtype(train)
        self._total_steps = total_steps
        shares = worker.data_world_size
        self._stream = SampleStream(
            samples, train.seed, train.global_batch, worker.data_rank, shares
        )
        self.local_batch = len(self._stream.positions_and_indices(0)[0])
        """Samples of a step that this worker takes."""
        largest = math.ceil(train.global_batch / shares)
        self.accumulation_steps = math.ceil(largest / (train.micro_batch or largest))
        """Micro-batches of a step, the same number on every worker."""
        self._next_step = -1

    @property
    def largest(self) -> int:
        """Samples of the largest micro-batch."""
        return math.ceil(self.local_batch / self.accumulation_steps)

    def of_step(self, step: int) -> Iterator[PlacedBatch]:
        """Positions and samples of each micro-batch; take `accumulation_steps` of them."""
        if step != self._next_step:  # the first step of this start, or one out of turn
            self._prefetched = prefetch_batches(
                self._stream,
                self._device,
                self._dtype,
                step,
                self._total_steps,
                self.accumulation_steps,
            )
        self._next_step = step + 1
        return self._prefetched

    def counted(self, number: int) -> int:
        """How many samples of micro-batch `number` count; the rest are there for other workers."""
        return microbatch_slice(self.local_batch, number, self.accumulation_steps)[1]

    def first_of(self, step: int, count: int) -> tuple[Tensor, Batch]:
        """Positions and samples of the first `count` of this worker's share; not prefetched."""
        positions, index = (v[:count] for v in self._stream.positions_and_indices(step))
        batch = to_device(self._stream.gather(index), self._device, self._dtype)
        return positions.to(self._device), batch
