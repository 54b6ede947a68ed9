"""Prepares a workload's data set: Parquet files and a manifest, made once and then only read."""

import hashlib
import inspect
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.base.config import Spec
from cluster.base.errors import DataError, SpecError
from cluster.base.files import commit_folder
from trainers.counter_rng import seed_process
from trainers.data.partitioned_dataset import (
    ProgressCallback,
    encode_parquet,
    ignore_progress,
    manifest_entry,
    write_parts,
)
from trainers.data.remote import remote_dataset
from trainers.data.splits import split_files
from trainers.stores import MANIFEST
from trainers.workload import PartitionedWorkload, Workload


def prepare_dataset(
    workload: Workload,
    storage: Path,
    uri: str | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Path:
    """The folder with the workload's splits as Parquet files; built if it does not exist yet.

    It is in `storage` or, with a `uri`, this machine's copy of the data set at that URI. The
    folder's name contains a hash of everything that the data set is made from: the workload's
    code, its `data` section, and the names, sizes and times of the files that the section names.
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
    # All processes build in one folder, one at a time: each continues where another was stopped.
    with FileLock(folder.with_name(f".{name}.lock")):
        if (folder / MANIFEST).exists():
            return folder
        return _build_dataset(workload, folder.with_name(f".{name}"), folder, on_progress)


def dataset_name(workload: Workload) -> str:
    """The name of the folder of the workload's data set."""
    return f"{type(workload).__name__.lower()}-{_fingerprint(workload)}"


def _build_dataset(
    workload: Workload, building: Path, folder: Path, on_progress: ProgressCallback
) -> Path:
    """Write the data set into the folder `building`, then rename that to `folder`."""
    _create_folder(building)
    try:
        manifest = _write_dataset(workload, building, on_progress)
    except BaseException:
        if not isinstance(workload, PartitionedWorkload):  # finished parts are kept
            shutil.rmtree(building)
        raise
    (building / MANIFEST).write_text(json.dumps(manifest, indent=1))
    try:
        commit_folder(building, folder)
    except OSError:  # another process has built the same data set in the meantime
        shutil.rmtree(building)
        if not (folder / MANIFEST).exists():
            raise
    return folder


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"storage: cannot create {folder.parent}: {error.strerror}") from None


def _write_dataset(
    workload: Workload, folder: Path, on_progress: ProgressCallback
) -> dict[str, Any]:
    """Write the files of a workload's data set into `folder`; returns the manifest."""
    name = type(workload).__name__.lower()
    files: dict[str, Any] = {}
    if isinstance(workload, PartitionedWorkload):
        files = write_parts(workload, folder, on_progress)
    else:
        seed_process(0)  # the same rows wherever they are made
        for split, rows in workload.dataset().items():
            content = encode_parquet(rows)
            (folder / f"{split}.parquet").write_bytes(content)
            files[f"{split}.parquet"] = manifest_entry(content, rows=len(rows))
    for split in ("train", "val"):
        if not sum(files[file]["rows"] for file in split_files(split, files)):
            raise DataError(f"the data set of {name} has no samples in its split {split!r}")
    return {
        "workload": name,
        "data": workload.data.model_dump(mode="json"),
        "made_with": workload.made_with(),
        "files": files,
    }


def source_files(workload: type[Workload]) -> list[Path]:
    """The modules that define a workload; of a shipped one, all modules of its package."""
    files: dict[Path, None] = {}
    for parent in workload.__mro__:
        if not issubclass(parent, Workload) or parent in (Workload, PartitionedWorkload):
            continue
        source = inspect.getsourcefile(parent)
        if source is not None:
            shipped = parent.__module__.startswith("trainers.workloads.")
            path = Path(source)
            files |= dict.fromkeys(sorted(path.parent.glob("*.py")) if shipped else [path])
    return list(files)


def _fingerprint(workload: Workload) -> str:
    """A hash of everything that the data set is made from."""
    digest = hashlib.sha256()
    for path in source_files(type(workload)):
        digest.update(path.read_bytes())
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
