"""Reads a prepared data set: its manifest, and its splits as memory-mapped tensors."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.base.errors import DataError
from cluster.base.files import cache_folder
from trainers.data.tables import column_tensor
from trainers.stores import MANIFEST
from trainers.workload import Batch


def read_dataset_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared data set: its files, and what it was made from."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest


def split_files(split: str, files: Mapping[str, Any]) -> list[str]:
    """The Parquet files of a split, in the order of their rows."""
    pattern = re.compile(rf"{split}(-\d+)?\.parquet")
    return sorted(name for name in files if pattern.fullmatch(name))


def count_samples(folder: Path, split: str) -> int:
    """The number of samples in a split of a prepared data set; 0 if there is no such split."""
    files = read_dataset_manifest(folder)["files"]
    return sum(int(files[name]["rows"]) for name in split_files(split, files))


def open_split(folder: Path, split: str) -> Batch:
    """All samples of a split as one memory-mapped tensor [N, ...] per column.

    The Parquet files are decoded once per machine into an Arrow file, which all its processes map.
    """
    files = read_dataset_manifest(folder)["files"]
    names = split_files(split, files)
    if not names or not all((folder / name).exists() for name in names):
        raise DataError(f"{folder / f'{split}.parquet'}: no such split")
    digest = hashlib.sha256("".join(files[name]["sha256"] for name in names).encode()).hexdigest()
    cache = cache_folder() / f"{folder.name}-{digest[:12]}"
    target = cache / f"{split}.arrow"
    if not target.exists():
        cache.mkdir(exist_ok=True)
        tables = [pq.read_table(folder / name) for name in names]
        columns = tables[0].column_names  # other parts may have them in another order
        whole = pa.concat_tables(part.select(columns) for part in tables).combine_chunks()
        building = target.with_suffix(f".{os.getpid()}")
        with pa.OSFile(str(building), "wb") as file, pa.ipc.new_file(file, whole.schema) as out:
            for batch in whole.to_batches():
                out.write_batch(batch)
        building.rename(target)  # only whole files get this name; no fsync, it is only a cache
    mapped = pa.ipc.open_file(pa.memory_map(str(target))).read_all()
    return {field.name: column_tensor(field, mapped.column(field.name)) for field in mapped.schema}


def open_splits(folder: Path) -> dict[str, Batch]:
    """Every split that has samples, each as `open_split` returns it."""
    names = [name for name in ("train", "val", "test") if count_samples(folder, name)]
    return {name: open_split(folder, name) for name in names}
