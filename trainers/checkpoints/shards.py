"""Tensors to files and back: each worker writes the shards it holds and reads those it needs.

PyTorch's distributed checkpointing (DCP) plans which worker writes and reads which shard. So any
number of workers, in any parallel mode, reads a state that another number wrote in another mode.
The files are safetensors with the offsets of each shard in its tensor, as PyTorch's
`HuggingFaceStorageReader` reads them; nothing is pickled.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from trainers.torch_internals import SAVED_OFFSETS_KEY, SHARDING_INFO_KEY, quiet_checkpoint_log

SUFFIX = ".safetensors"

# Saving from a single process is intended.
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
quiet_checkpoint_log()


def write(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write this worker's shards of `state` to a file of its own in `folder`; collective.

    Tensors must be in host memory. A shard that several workers hold is written by one of them.
    """
    writer = _SafetensorsWriter(folder)
    save(dict(state), storage_writer=writer, process_group=group, no_dist=group is None)


def read(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state`, or this worker's shards of them, in place; collective.

    Values are converted to the dtypes of the tensors in `state`.
    """
    reader = HuggingFaceStorageReader(str(folder))
    load(dict(state), storage_reader=reader, process_group=group, no_dist=group is None)


def shapes(folder: Path) -> dict[str, list[int]]:
    """The full shape of each tensor in `folder`, by name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    entries = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
    return {name: list(entry.size) for name, entry in entries.items()}


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_file(rank: int) -> str:
    """The name of a worker's file; a worker without shards writes none."""
    return f"state-{rank:05d}{SUFFIX}"


class _SafetensorsWriter(StorageWriter):
    """One safetensors file per worker.

    PyTorch's own writer for this format takes three times as long: it builds each file in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        seen: set[int] = set()
        for item in plan.items:
            name, tensor = item.index.fqn, planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            tensor = tensor.detach().contiguous()
            if tensor.data_ptr() in seen:  # weights that are shared are written twice
                tensor = tensor.clone()
            seen.add(tensor.data_ptr())
            assert item.tensor_data is not None
            tensors[name] = tensor
            offsets[name] = {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        if tensors:
            path = self._folder / shard_file(plan.storage_data)
            save_file(tensors, path, metadata={SHARDING_INFO_KEY: json.dumps(offsets)})
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
