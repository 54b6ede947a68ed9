"""Which worker of a group this process is."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainers.devices import Cpu, Device


@dataclass(frozen=True)
class Worker:
    """One of `world` workers that train together, and the hardware it computes on."""

    rank: int = 0
    world_size: int = 1
    hardware: Device = field(default_factory=Cpu)
    local_world_size: int = 1
    """Workers on this worker's machine."""
    tensor_parallel_size: int = 1
    """Workers that see the same samples, because each holds a part of every layer."""

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.hardware.device

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the global batch is this worker's, out of `data_world`."""
        return self.rank // self.tensor_parallel_size

    @property
    def data_world_size(self) -> int:
        return self.world_size // self.tensor_parallel_size

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all shares of the data, in place; collective."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.div_(self.tensor_parallel_size) if self.tensor_parallel_size > 1 else values

    def broadcast_from_rank_zero(self, value: Any) -> Any:
        """The first worker's value, on all of them; collective."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Return when all workers have called this; collective."""
        if self.world_size > 1:
            dist.barrier()
