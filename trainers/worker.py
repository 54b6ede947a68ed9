"""Which worker of a group this process is, and which tensors the group holds together."""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from trainers.devices import Cpu, Device

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Worker:
    """One of `world_size` workers that train together, and its device."""

    rank: int = 0
    world_size: int = 1
    hardware: Device = field(default_factory=Cpu)
    local_world_size: int = 1
    """Number of workers on this worker's machine."""
    tensor_parallel_size: int = 1
    """Number of workers that split each layer, and therefore process the same samples."""

    @property
    def device(self) -> torch.device:
        """PyTorch's device of its tensors."""
        return self.hardware.device

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """This worker's share of the global batch, out of `data_world_size` shares."""
        return self.rank // self.tensor_parallel_size

    @property
    def data_world_size(self) -> int:
        return self.world_size // self.tensor_parallel_size

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all data-parallel shares, in place. Collective."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values.div_(self.tensor_parallel_size) if self.tensor_parallel_size > 1 else values

    def broadcast_from_rank_zero(self, value: Any) -> Any:
        """Rank 0's value, on all workers. Collective."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of each worker, by rank, on all workers. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Block until all workers have called this. Collective."""
        if self.world_size > 1:
            dist.barrier()


def is_distributed(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether workers hold the tensor together.

    Does not import DTensor, which takes 1 s of CPU time: where it was not imported, none exists.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, getattr(module, "DTensor", ()))


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_distributed(tensor) else tensor
