"""Prepares a workload's data set: Parquet files and a manifest, made once and then only read."""

import hashlib
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.base.config import Spec
from cluster.base.errors import DataError, SpecError
from cluster.base.files import commit_folder
from trainers.counter_rng import seed_process
from trainers.data.named_files import named_files
from trainers.data.partitioned_dataset import (
    ProgressCallback,
    encode_parquet,
    ignore_progress,
    manifest_entry,
    write_parts,
)
from trainers.data.remote import remote_dataset
from trainers.data.splits import split_files
from trainers.data.workload_code import workload_code
from trainers.stores import MANIFEST
from trainers.workload import PartitionedWorkload, Workload


def prepare_dataset(
    workload: Workload,
    storage: Path,
    uri: str | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> Path:
    """The folder with the workload's splits as Parquet files; built if it does not exist yet.

    It is in `storage` or, with a `uri`, this machine's copy of the data set at that URI. Raises
    DataError if the workload gives something else than splits of numbers.
    """
    name = dataset_name(workload, storage)
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


def dataset_name(workload: Workload, storage: Path) -> str:
    """The name of the folder of the workload's data set, with a hash of what it is made from.

    That is the workload's code, its `data` section, the versions of the packages that the code
    imports, and the contents of all files that the section names, except those in `storage`.
    """
    digest = hashlib.sha256()
    code = workload_code(type(workload))
    for path in code.files:
        digest.update(path.read_bytes())
    data: Spec = workload.data
    digest.update(data.model_dump_json().encode())
    digest.update(json.dumps(_made_with(workload), sort_keys=True).encode())
    folders = dict.fromkeys([Path.cwd(), *(path.parent for path in code.files)])
    if files := named_files(data, folders, without=storage.absolute()):
        digest.update(json.dumps(files).encode())
    return f"{type(workload).__name__.lower()}-{digest.hexdigest()[:12]}"


def _made_with(workload: Workload) -> dict[str, str]:
    """Versions of the packages that the data set depends on."""
    return workload_code(type(workload)).versions | workload.made_with()


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
        for split, rows in _given_splits(workload).items():
            content = encode_parquet(split, rows)
            (folder / f"{split}.parquet").write_bytes(content)
            files[f"{split}.parquet"] = manifest_entry(content, rows=len(rows))
    for split in ("train", "val"):
        if not sum(files[file]["rows"] for file in split_files(split, files)):
            unknown = sorted({file.partition(".")[0] for file in files} - {"train", "val", "test"})
            others = f"; it has {', '.join(map(repr, unknown))}" if unknown else ""
            raise DataError(f"the data set of {name} has no samples in its split {split!r}{others}")
    return {
        "workload": name,
        "data": workload.data.model_dump(mode="json"),
        "made_with": _made_with(workload),
        "files": files,
    }


def _given_splits(workload: Workload) -> dict[str, Any]:
    """What `dataset` returns; DataError unless it is a dictionary."""
    splits: Any = workload.dataset()
    if not isinstance(splits, dict):
        raise DataError(
            f"{type(workload).__name__}.dataset must return a dictionary of tables, {{'train': "
            f"..., 'val': ...}} (got {type(splits).__name__})"
        )
    return splits
