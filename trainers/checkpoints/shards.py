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

from trainers.checkpoints.buffers import fill
from trainers.torch_internals import SAVED_OFFSETS_KEY, SHARDING_INFO_KEY

SUFFIX = ".safetensors"
COMPLEX_KEY = "HELIOSTAT_COMPLEX"
"""Key of a file's metadata: the names of its complex tensors, as a list in JSON."""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""By the names that safetensors has for them."""


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
            copy = copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
            copies[name].copy_(tensor.detach(), non_blocking=pinned)
        return {name: copies[name] for name in state}

    return stage


def read(state: Mapping[str, Tensor], place: Path, group: dist.ProcessGroup | None) -> None:
    """Fill the tensors of `state`, or this worker's shards of them, in place; collective.

    `place` is a folder of files or, without a group, a file.
    Values are converted to the dtypes of the tensors in `state`.
    """
    if group is not None:
        from trainers.checkpoints import distributed

        return distributed.read(state, place, group)
    for shard in _shards(place):
        if shard.name in state:
            ranges = zip(shard.offsets, shard.shape, strict=True)
            part = tuple(slice(start, start + length) for start, length in ranges)
            fill(state[shard.name].detach()[part], shard.load())
    return None


class SavedTensor(NamedTuple):
    """What the files say of a tensor."""

    shape: list[int]
    """Of the whole tensor."""
    dtype: torch.dtype


def saved_tensors(place: Path) -> dict[str, SavedTensor]:
    """The tensors in a file, or in all files of a folder, by name."""
    found: dict[str, SavedTensor] = {}
    for shard in _shards(place):
        ends = [start + length for start, length in zip(shard.offsets, shard.shape, strict=True)]
        known = found[shard.name].shape if shard.name in found else ends
        found[shard.name] = SavedTensor([*map(max, ends, known)], shard.dtype)
    return found


def shard_file(rank: int) -> str:
    """The name of a worker's file; a worker without shards writes none."""
    return f"state-{rank:05d}{SUFFIX}"


def save_shards(path: Path, shards: Mapping[str, Tensor], offsets: Mapping[str, list[int]]) -> None:
    """Write a worker's file; `offsets` are the places of the shards in their tensors."""
    tensors, complex_names = storable(shards)
    if tensors:
        places = {
            name: {SAVED_OFFSETS_KEY: offsets[name] + [0] * (name in complex_names)}
            for name in tensors
        }
        metadata = {SHARDING_INFO_KEY: json.dumps(places), COMPLEX_KEY: json.dumps(complex_names)}
        save_file(tensors, path, metadata=metadata)


def storable(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in the form in which safetensors writes their values, each with its own memory.

    It knows no complex128. Complex tensors become [..., 2] of real numbers; the names of those are
    returned too.
    """
    stored: dict[str, Tensor] = {}
    complex_names = [name for name, tensor in tensors.items() if tensor.is_complex()]
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # A conjugate may be a flag on memory that is not conjugate; safetensors does not see it.
        plain = tensor.detach().resolve_conj().resolve_neg()
        plain = (torch.view_as_real(plain) if plain.is_complex() else plain).contiguous()
        # Weights that are shared are written twice.
        memory = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return stored, complex_names


class _Shard(NamedTuple):
    """A part of a tensor in a file."""

    name: str
    offsets: list[int]
    shape: list[int]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Must be called before the next shard is asked for."""


def _shards(place: Path) -> Iterator[_Shard]:
    """The shards in a file, or in all files of a folder."""
    for path in [place] if place.is_file() else sorted(place.glob(f"*{SUFFIX}")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            places = json.loads(metadata.get(SHARDING_INFO_KEY, "{}"))
            complex_names = set(json.loads(metadata.get(COMPLEX_KEY, "[]")))
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                shape, dtype = entry.get_shape(), DTYPES.get(entry.get_dtype(), torch.uint8)
                offsets = places[name][SAVED_OFFSETS_KEY] if places else [0] * len(shape)
                load = partial(file.get_tensor, name)
                if name in complex_names:
                    shape, offsets, dtype = shape[:-1], offsets[:-1], dtype.to_complex()
                    load = partial(_load_complex, load)
                yield _Shard(name, offsets, shape, dtype, load)


def _load_complex(load: Callable[[], Tensor]) -> Tensor:
    # A copy: memory of the file may begin at a place where complex numbers must not.
    return torch.view_as_complex(load().clone())
