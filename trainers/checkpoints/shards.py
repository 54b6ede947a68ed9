"""Tensors to files and back, each worker writing what it holds and reading what it needs.

PyTorch's distributed checkpointing plans who writes and reads what; so a state that was written
by some number of workers in one parallel mode is read by any other number in any other. The
files are safetensors with the place of each part in its tensor, as PyTorch's
`HuggingFaceStorageReader` reads them: nothing is pickled.
"""

import dataclasses
import json
import logging
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

SUFFIX = ".safetensors"

# One process that saves for itself is meant; and each tensor would be two lines of a log.
warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


def write(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write this worker's part of `state` into `folder`, in a file of its own; collective.

    Tensors must be in host memory. Each part is written once, by one of the workers that hold it.
    """
    writer = _SafetensorsWriter(folder)
    save(dict(state), storage_writer=writer, process_group=group, no_dist=group is None)


def read(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state`, or this worker's parts of them, in place; collective.

    Numbers are converted to the dtype of what they are read into.
    """
    reader = HuggingFaceStorageReader(str(folder))
    load(dict(state), storage_reader=reader, process_group=group, no_dist=group is None)


def shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of each whole tensor in `folder`, by name."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    entries = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
    return {name: list(entry.size) for name, entry in entries.items()}


def local_tensor(tensor: Tensor) -> Tensor:
    """What of a tensor this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_file(rank: int) -> str:
    """The name of a worker's file; there is none if it has nothing to write."""
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
            offsets[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        if tensors:
            path = self._folder / shard_file(plan.storage_data)
            save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """What the files don't say is in the checkpoint's manifest."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
