"""Tensors to files and back, for a worker on its own and, by `distributed.py`, for several.

The files are safetensors with the offsets of each shard in its tensor, as PyTorch's
`HuggingFaceStorageReader` reads them; nothing is pickled. One worker reads what any number wrote.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainers.torch_internals import SAVED_OFFSETS_KEY, SHARDING_INFO_KEY

SUFFIX = ".safetensors"


def write(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write this worker's shards of `state` to a file of its own in `folder`; collective.

    Tensors must be in host memory. A shard that several workers hold is written by one of them.
    """
    if group is not None:
        from trainers.checkpoints import distributed

        return distributed.write(state, folder, group)
    whole = {name: [0] * tensor.ndim for name, tensor in state.items()}
    return save_shards(folder / shard_file(0), state, whole)


def stage_with(
    pinned: bool, group: dist.ProcessGroup | None
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A function that copies tensors, or this worker's shards of them, to host memory.

    It uses the same memory each time; `pinned` memory is filled without waiting for the device.
    """
    if group is not None:
        from trainers.checkpoints import distributed

        return distributed.stage_with(pinned)
    copies: dict[str, Tensor] = {}

    def stage(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in state.items():
            if name not in copies:
                copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
            copies[name].copy_(tensor.detach(), non_blocking=pinned)
        return {name: copies[name] for name in state}

    return stage


def read(state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state`, or this worker's shards of them, in place; collective.

    Values are converted to the dtypes of the tensors in `state`.
    """
    if group is not None:
        from trainers.checkpoints import distributed

        return distributed.read(state, folder, group)
    for shard in _shards(folder):
        if shard.name in state:
            ranges = zip(shard.offsets, shard.shape, strict=True)
            place = tuple(slice(start, start + length) for start, length in ranges)
            state[shard.name].detach()[place].copy_(shard.load())
    return None


def shapes(folder: Path) -> dict[str, list[int]]:
    """The full shape of each tensor in `folder`, by name."""
    found: dict[str, list[int]] = {}
    for shard in _shards(folder):
        ends = [start + length for start, length in zip(shard.offsets, shard.shape, strict=True)]
        found[shard.name] = [*map(max, ends, found.get(shard.name, ends))]
    return found


def shard_file(rank: int) -> str:
    """The name of a worker's file; a worker without shards writes none."""
    return f"state-{rank:05d}{SUFFIX}"


def save_shards(path: Path, shards: Mapping[str, Tensor], offsets: Mapping[str, list[int]]) -> None:
    """Write a worker's file; `offsets` are the places of the shards in their tensors."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, shard in shards.items():
        tensor = shard.detach().contiguous()
        if tensor.data_ptr() in seen:  # weights that are shared are written twice
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    if tensors:
        places = {name: {SAVED_OFFSETS_KEY: offsets[name]} for name in tensors}
        save_file(tensors, path, metadata={SHARDING_INFO_KEY: json.dumps(places)})


class _Shard(NamedTuple):
    """A part of a tensor in a file."""

    name: str
    offsets: list[int]
    shape: list[int]
    load: Callable[[], Tensor]
    """Must be called before the next shard is asked for."""


def _shards(folder: Path) -> Iterator[_Shard]:
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {}).get(SHARDING_INFO_KEY, "{}"))
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                offsets = places[name][SAVED_OFFSETS_KEY] if places else [0] * len(shape)
                yield _Shard(name, offsets, shape, partial(file.get_tensor, name))
