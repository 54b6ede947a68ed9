"""Tensors of several workers to files and back: each writes the shards it holds, and reads its own.

PyTorch's distributed checkpointing (DCP) plans which worker writes and reads which shard. So any
number of workers, in any parallel mode, reads a state that another number wrote in another mode.
A worker on its own has no use for it, and for the 1 s of CPU time that the import takes.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from trainers.checkpoints.buffers import fill, is_expanded
from trainers.checkpoints.shards import save_shards, shard_file
from trainers.torch_internals import quiet_checkpoint_log
from trainers.worker import is_distributed

quiet_checkpoint_log()


def write(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Write this worker's shards of `state` to a file of its own in `folder`; collective.

    Tensors must be in host memory. A shard that several workers hold is written by one of them.
    """
    save(dict(state), storage_writer=_SafetensorsWriter(folder), process_group=group)


def read(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Fill the tensors of `state`, or this worker's shards of them, in place; collective.

    Values are converted to the dtypes of the tensors in `state`.
    """
    # Those that cannot be written in place are read beside it.
    beside = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for name, tensor in state.items()
        if not is_distributed(tensor) and (is_expanded(tensor) or tensor.is_conj())
    }
    targets = {name: _in_storage(beside.get(name, tensor)) for name, tensor in state.items()}
    load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=group)
    for name, values in beside.items():
        fill(state[name], values)


def _in_storage(tensor: Tensor) -> Tensor:
    """A complex tensor as the [..., 2] real numbers that `shards.storable` makes of it."""
    if not tensor.is_complex():
        return tensor
    if not is_distributed(tensor):
        return torch.view_as_real(tensor.detach())
    from torch.distributed.tensor import DTensor

    parts = torch.view_as_real(tensor.to_local().detach())
    shape, stride = (*tensor.shape, 2), (*(2 * step for step in tensor.stride()), 1)
    return DTensor.from_local(
        parts, tensor.device_mesh, tensor.placements, shape=torch.Size(shape), stride=stride
    )


def stage_with(pinned: bool) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A function that copies tensors, or this worker's shards of them, to host memory.

    It uses the same memory each time; `pinned` memory is filled without waiting for the device.
    """
    stager = DefaultStager(StagingOptions(pinned, False, False, pinned))

    def stage(state: dict[str, Tensor]) -> dict[str, Tensor]:
        copies = stager.stage(state)
        assert isinstance(copies, dict)  # the stager was not asked to do it in the background
        return copies

    return stage


class _SafetensorsWriter(StorageWriter):
    """One safetensors file per worker.

    PyTorch's own writer for this format takes three times as long: it builds each file in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, list[int]] = {}
        for item in plan.items:
            name, tensor = item.index.fqn, planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            assert item.tensor_data is not None
            tensors[name], offsets[name] = tensor, list(item.tensor_data.chunk.offsets)
        save_shards(self._folder / shard_file(plan.storage_data), tensors, offsets)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing to write: everything else is in the checkpoint's manifest."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
