"""Data sets: Parquet files made once, read as memory-mapped Arrow, in an order of their own.

The order of samples is a function of (seed, position): position p of the run is sample
`permutation(seed, p // n)[p % n]`, and step s takes positions [s * G, (s + 1) * G) whatever the
number of workers, of which each takes a contiguous share. So one worker and many see the same
global batches, a resumed run goes on at the exact sample, and no sample is left out of an epoch.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from torch import Tensor

from cluster.base.config import Spec
from cluster.base.errors import DataError, SpecError
from cluster.base.files import cache_folder, commit_folder
from trainers.counter_rng import combine_seeds
from trainers.data.partitions import (
    ProgressCallback,
    encode_parquet,
    ignore_progress,
    manifest_entry,
    write_parts,
)
from trainers.data.remote import remote_dataset
from trainers.workload import Batch, PartitionedWorkload, Workload

MANIFEST = "manifest.json"
SIGNED_DTYPES = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def table(**columns: npt.NDArray[Any]) -> pa.Table:
    """A table from numpy arrays [N] or [N, ...] of numbers.

    Rows of several numbers become fixed-size binary, which Parquet reads 6 to 11 times faster
    than lists; their shape and dtype stand in the column's metadata.
    """
    fields, arrays = [], []
    for name, values in columns.items():
        if values.dtype.kind not in "biuf":
            raise DataError(f"column {name!r} is {values.dtype}; training reads numbers")
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        if values.ndim == 1 and values.dtype.kind != "b":  # Arrow packs truth values into bits
            arrays.append(pa.array(values))
            fields.append(pa.field(name, arrays[-1].type, nullable=False))
            continue
        row_bytes = values.dtype.itemsize * int(np.prod(values.shape[1:]))
        row = pa.binary(row_bytes)
        buffers = [None, pa.py_buffer(values)]
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(row, len(values), buffers))
        shape = {"dtype": values.dtype.str, "shape": json.dumps(values.shape[1:])}
        fields.append(pa.field(name, row, nullable=False, metadata=shape))
    return pa.table(arrays, schema=pa.schema(fields))


def prepare_dataset(
    workload: Workload,
    storage: Path,
    uri: str | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Path:
    """The folder with the workload's splits as Parquet files; built when it is not there yet.

    It is in `storage`, or this machine's copy of what is kept at `uri`.
    The folder's name holds a hash of everything that the data set is made from: the workload's
    code, its `data` section, and the names, sizes and times of the files that this refers to.
    """
    name = dataset_name(workload)
    if uri is not None:
        return remote_dataset(
            uri, name, lambda folder: _write_dataset(workload, folder, on_progress)
        )
    folder = storage / "datasets" / name
    if (folder / MANIFEST).exists():
        return folder
    if not isinstance(workload, PartitionedWorkload):
        building = folder.with_name(f".{name}-{secrets.token_hex(4)}")
        return _build_dataset(workload, building, folder, on_progress)
    _create_folder(folder.parent)
    with FileLock(folder.with_name(f".{name}.lock")):  # one goes on where another stopped
        if (folder / MANIFEST).exists():
            return folder
        return _build_dataset(workload, folder.with_name(f".{name}"), folder, on_progress)


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"storage: cannot make {folder.parent}: {error.strerror}") from None


def dataset_name(workload: Workload) -> str:
    """The name of the folder of the workload's data set."""
    return f"{type(workload).__name__.lower()}-{_fingerprint(workload)}"


def _build_dataset(
    workload: Workload, building: Path, folder: Path, on_progress: ProgressCallback
) -> Path:
    """Make a data set in the folder `building`, then call that `folder`."""
    _create_folder(building)
    try:
        manifest = _write_dataset(workload, building, on_progress)
    except BaseException:
        if not isinstance(workload, PartitionedWorkload):  # else the parts that are made stay
            shutil.rmtree(building)
        raise
    (building / MANIFEST).write_text(json.dumps(manifest, indent=1))
    try:
        commit_folder(building, folder)
    except OSError:  # somebody else has built the same in the meantime
        shutil.rmtree(building)
        if not (folder / MANIFEST).exists():
            raise
    return folder


def _write_dataset(
    workload: Workload, folder: Path, on_progress: ProgressCallback
) -> dict[str, Any]:
    """Make a workload's data set and write it into `folder`; returns its manifest."""
    name = type(workload).__name__.lower()
    files: dict[str, Any] = {}
    if isinstance(workload, PartitionedWorkload):
        files = write_parts(workload, folder, on_progress)
    else:
        for split, rows in workload.dataset().items():
            content = encode_parquet(rows)
            (folder / f"{split}.parquet").write_bytes(content)
            files[f"{split}.parquet"] = manifest_entry(content, rows=len(rows))
    for split in ("train", "val"):
        if not sum(files[file]["rows"] for file in _split_files(split, files)):
            raise DataError(f"the data set of {name} has no samples in its split {split!r}")
    return {
        "workload": name,
        "data": workload.data.model_dump(mode="json"),
        "made_with": workload.made_with(),
        "files": files,
    }


def _split_files(split: str, files: Mapping[str, Any]) -> list[str]:
    """The Parquet files of a split, in the order of their rows."""
    pattern = re.compile(rf"{split}(-\d+)?\.parquet")
    return sorted(name for name in files if pattern.fullmatch(name))


def _fingerprint(workload: Workload) -> str:
    import inspect

    digest = hashlib.sha256()
    for parent in type(workload).__mro__:
        source = inspect.getsourcefile(parent) if issubclass(parent, Workload) else None
        if source is not None and parent not in (Workload, PartitionedWorkload):
            digest.update(Path(source).read_bytes())
    data: Spec = workload.data
    digest.update(data.model_dump_json().encode())
    digest.update(json.dumps(workload.made_with(), sort_keys=True).encode())
    for name in type(data).model_fields:
        value = getattr(data, name)
        if isinstance(value, (str, Path)) and os.sep in str(value) and Path(value).exists():
            root = Path(value)
            for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
                status = path.stat()
                entry = (str(path.relative_to(root)), status.st_size, status.st_mtime_ns)
                digest.update(repr(entry).encode())
    return digest.hexdigest()[:12]


def read_dataset_manifest(folder: Path) -> dict[str, Any]:
    """What a prepared data set consists of, and what it was made from."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def count_samples(folder: Path, split: str) -> int:
    """The number of samples in a split of a prepared data set; 0 when there is no such split."""
    files = read_dataset_manifest(folder)["files"]
    return sum(int(files[name]["rows"]) for name in _split_files(split, files))


def open_split(folder: Path, split: str) -> Batch:
    """All samples of a split as one tensor [N, ...] per column, without a copy in memory.

    The Parquet files are decoded once per machine into an Arrow file that all processes there map.
    """
    files = read_dataset_manifest(folder)["files"]
    names = _split_files(split, files)
    if not names or not all((folder / name).exists() for name in names):
        raise DataError(f"{folder / f'{split}.parquet'}: no such split")
    digest = hashlib.sha256("".join(files[name]["sha256"] for name in names).encode()).hexdigest()
    cache = cache_folder() / f"{folder.name}-{digest[:12]}"
    target = cache / f"{split}.arrow"
    if not target.exists():
        cache.mkdir(exist_ok=True)
        parts = [pq.read_table(folder / name) for name in names]
        whole = pa.concat_tables(parts).combine_chunks()
        building = target.with_suffix(f".{os.getpid()}")
        with pa.OSFile(str(building), "wb") as file, pa.ipc.new_file(file, whole.schema) as out:
            for batch in whole.to_batches():
                out.write_batch(batch)
        building.rename(target)  # a cache: what a crash leaves half-written is never named
    mapped = pa.ipc.open_file(pa.memory_map(str(target))).read_all()
    return {field.name: _column_tensor(field, mapped.column(field.name)) for field in mapped.schema}


def open_splits(folder: Path) -> dict[str, Batch]:
    """Every split that has samples, as `open_split` gives it."""
    names = [name for name in ("train", "val", "test") if count_samples(folder, name)]
    return {name: open_split(folder, name) for name in names}


def _column_tensor(field: pa.Field, column: pa.ChunkedArray) -> Tensor:
    """A tensor over the column's own memory. It must not be written to."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_fixed_size_binary(field.type) and field.metadata:
        dtype = np.dtype(field.metadata[b"dtype"].decode())
        shape = json.loads(field.metadata[b"shape"])
        values = np.frombuffer(array.buffers()[1], dtype).reshape(-1, *shape)
        values = values[array.offset : array.offset + len(array)]
    elif array.null_count == 0 and (
        pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    ):
        values = array.to_numpy(zero_copy_only=True)
    else:
        raise DataError(
            f"column {field.name!r} is {field.type}; training reads numbers of one shape "
            "(trainers.data.dataset.table makes such columns)"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(values)


def to_device(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on the worker's device, floating-point columns in the dtype of the weights."""
    return {
        name: values.to(device, dtype if values.is_floating_point() else None)
        for name, values in batch.items()
    }


def epoch_permutation(seed: int, epoch: int, samples: int) -> Tensor:
    """The order of an epoch's samples [N], as indices into the split."""
    generator = torch.Generator().manual_seed(combine_seeds(seed, epoch))
    return torch.randperm(samples, generator=generator)


def shard_bounds(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The contiguous share [start, stop) of `count` things that falls to `rank`."""
    return count * rank // world_size, count * (rank + 1) // world_size


class SampleStream:
    """The stream of training batches of one worker, at any step, in any order of asking."""

    def __init__(
        self, split: Batch, seed: int, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        # PyTorch gathers no unsigned numbers of several bytes; as signed they have the same bits.
        self._unsigned_dtypes = {
            n: values.dtype for n, values in split.items() if values.dtype in SIGNED_DTYPES
        }
        signed = {
            n: split[n].view(SIGNED_DTYPES[dtype]) for n, dtype in self._unsigned_dtypes.items()
        }
        self.split = split
        self._split = {**split, **signed}
        self._samples = len(next(iter(split.values())))
        self._seed = seed
        self._global_batch = global_batch
        self._start, self._stop = shard_bounds(global_batch, rank, world_size)
        self._epoch_orders: dict[int, Tensor] = {}

    @property
    def columns(self) -> list[str]:
        return list(self.split)

    @property
    def device(self) -> torch.device:
        """Where the samples lie; `gather` takes its index there."""
        return next(iter(self.split.values())).device

    def batch(self, step: int) -> tuple[Tensor, Batch]:
        """This worker's share of step `step`: its positions in the run [B], and its samples."""
        positions, index = self.positions_and_indices(step)
        return positions, self.gather(index)

    def gather(self, index: Tensor, pinned: bool = False) -> Batch:
        """The samples at `index` [B] of the split, copied; `pinned` where a GPU is to fetch them.

        `values[index]` gives the same, but copies element by element: up to nine times slower.
        """
        batch = {}
        for name, values in self._split.items():
            out = None
            if pinned:
                shape = (len(index), *values.shape[1:])
                out = torch.empty(shape, dtype=values.dtype, pin_memory=True)
            batch[name] = torch.index_select(values, 0, index, out=out)
        for name, dtype in self._unsigned_dtypes.items():
            batch[name] = batch[name].view(dtype)
        return batch

    def positions_and_indices(self, step: int) -> tuple[Tensor, Tensor]:
        """The positions of the share of step `step` [B], and where in the split it lies [B]."""
        start, stop = (step * self._global_batch + end for end in (self._start, self._stop))
        return torch.arange(start, stop), self.indices(start, stop)

    def indices(self, start: int, stop: int) -> Tensor:
        """The samples at positions [start, stop) of the run, as indices into the split."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, self._samples)
            end = min(self._samples, offset + stop - start)
            parts.append(self._epoch_order(epoch)[offset:end])
            start += end - offset
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch not in self._epoch_orders:
            # At most two epochs meet in a batch; older ones are never asked for again.
            self._epoch_orders = {k: v for k, v in self._epoch_orders.items() if k == epoch - 1}
            self._epoch_orders[epoch] = epoch_permutation(self._seed, epoch, self._samples)
        return self._epoch_orders[epoch]
