"""Builds a data set in parts: in parallel on the connected Ray, otherwise one after the other.

A finished part is on disk, with its checksums beside it, so that a build continues where it was
stopped. Ray tasks return their parts as the bytes of Parquet files, the same on every machine, so
workers need no shared folder.
"""

import hashlib
import io
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.base.errors import DataError, HeliostatError
from cluster.base.files import write_atomic, write_bytes_atomic
from trainers.counter_rng import seed_process
from trainers.data.tables import stored_table
from trainers.workload import PartitionedWorkload

FileEntries = dict[str, dict[str, Any]]
"""A data set's files by name, as in its manifest: bytes, sha256 and, of a table, rows."""
EncodedPart = dict[str, tuple[int, bytes]]
"""A part: for each split its number of rows, and the rows as a Parquet file."""
ProgressCallback = Callable[[int, int], None]
"""Called with the number of finished parts and the number of all parts."""

PARTS_IN_FLIGHT_PER_CPU = 2
"""Tasks that are submitted at once: results wait in memory until they are written."""


def ignore_progress(done: int, parts: int) -> None:
    """A `ProgressCallback` that does nothing."""


def encode_parquet(split: str, rows: pa.Table) -> bytes:
    """A split, or a part of it, as the bytes of a Parquet file; DataError if it cannot be read."""
    file = io.BytesIO()
    pq.write_table(stored_table(split, rows), file, compression="zstd", use_dictionary=False)
    return file.getvalue()


def manifest_entry(content: bytes, **more: int) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {**more, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_parts(
    workload: PartitionedWorkload, folder: Path, on_progress: ProgressCallback = ignore_progress
) -> FileEntries:
    """Build the parts that `folder` lacks; returns the entries of all the data set's files."""
    parts = workload.parts()
    common = _common_files(workload, parts, folder)
    found = {number: _saved_files(folder, _record_name(number)) for number in range(len(parts))}
    missing = [number for number, entries in found.items() if entries is None]
    on_progress(len(parts) - len(missing), len(parts))
    for done, (number, part) in enumerate(_build_missing(workload, parts, missing, common), 1):
        files = {f"{split}-{number:05d}.parquet": each for split, each in part.items()}
        contents = {name: content for name, (_, content) in files.items()}
        entries = {
            name: manifest_entry(content, rows=rows) for name, (rows, content) in files.items()
        }
        found[number] = _save_files(folder, _record_name(number), contents, entries)
        on_progress(len(parts) - len(missing) + done, len(parts))
    whole = {name: manifest_entry(content) for name, content in common.items()}
    made = {
        name: each for number in range(len(parts)) for name, each in (found[number] or {}).items()
    }
    _check_same_columns(folder, made)
    whole |= made
    for path in folder.iterdir():  # the records, and leftovers of a killed process
        if path.name not in whole:
            path.unlink()
    return whole


def _check_same_columns(folder: Path, names: Iterable[str]) -> None:
    """Raise DataError unless all parts of a split have the same columns, of one type and shape.

    `names` are those of their files. Joined, other parts would be read as the first one is.
    """
    first: dict[str, tuple[str, dict[str, str]]] = {}
    for name in names:
        split, _, number = name.removesuffix(".parquet").rpartition("-")
        columns = {field.name: _stored_type(field) for field in pq.read_schema(folder / name)}
        other, expected = first.setdefault(split, (number, columns))
        for column in [*expected, *columns]:
            types = [each.get(column, "absent") for each in (columns, expected)]
            if types[0] != types[1]:
                raise DataError(
                    f"split {split!r}, column {column!r} is {types[0]} in part {int(number)} and "
                    f"{types[1]} in part {int(other)}; all parts must have the same columns"
                )


def _stored_type(field: pa.Field) -> str:
    """The type of a stored column, with its shape."""
    if not field.metadata or b"shape" not in field.metadata:
        return str(field.type)
    return f"{field.metadata[b'dtype'].decode()} {field.metadata[b'shape'].decode()}"


def _record_name(number: int) -> str:
    """The file that lists a finished part's files."""
    return f"{number:05d}.part.json"


def _common_files(
    workload: PartitionedWorkload, parts: Sequence[Any], folder: Path
) -> dict[str, bytes]:
    saved = _saved_files(folder, "common.part.json")
    if saved is not None:
        return {name: (folder / name).read_bytes() for name in saved}
    seed_process(0)
    contents = workload.common(parts)
    entries = {name: manifest_entry(content) for name, content in contents.items()}
    _save_files(folder, "common.part.json", contents, entries)
    return contents


def _save_files(
    folder: Path, record: str, contents: Mapping[str, bytes], entries: FileEntries
) -> FileEntries:
    for name, content in contents.items():
        write_bytes_atomic(folder / name, content)
    write_atomic(folder / record, json.dumps(entries))
    return entries


def _saved_files(folder: Path, record: str) -> FileEntries | None:
    """The entries of a part's files; None unless all of them are there and undamaged."""
    if not (folder / record).exists():
        return None
    entries: FileEntries = json.loads((folder / record).read_text())
    return None if damaged_files(folder, entries) else entries


def damaged_files(folder: Path, entries: FileEntries) -> list[str]:
    """The files that are missing, or whose checksum is not that of their entry."""
    return [
        name
        for name, saved in entries.items()
        if not (folder / name).exists()
        or hashlib.sha256((folder / name).read_bytes()).hexdigest() != saved["sha256"]
    ]


def _build_missing(
    workload: PartitionedWorkload,
    parts: Sequence[Any],
    missing: Sequence[int],
    common: Mapping[str, bytes],
) -> Iterator[tuple[int, EncodedPart]]:
    """The missing parts with their numbers, in the order in which they are finished.

    As Ray tasks if Ray is initialized, otherwise in this process.
    """
    import ray

    if not ray.is_initialized():
        for number in missing:
            yield number, build_part(workload, parts[number], common)
        return
    build = ray.remote(num_cpus=1)(build_part)
    shared = [ray.put(workload), ray.put(common)]
    todo = deque(missing)
    running: dict[Any, int] = {}
    at_once = PARTS_IN_FLIGHT_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        while todo or running:
            while todo and len(running) < at_once:
                number = todo.popleft()
                running[build.remote(shared[0], parts[number], shared[1])] = number
            ready, _ = ray.wait(list(running))
            for each in ready:
                yield running.pop(each), _task_result(each)
    finally:
        for each in running:
            ray.cancel(each)


def build_part(
    workload: PartitionedWorkload, part: Any, common: Mapping[str, bytes]
) -> EncodedPart:
    """Build and encode one part; the same on every machine."""
    seed_process(zlib.crc32(repr(part).encode()))
    tables = workload.part(part, common)
    return {
        split: (len(rows), encode_parquet(split, rows))
        for split, rows in tables.items()
        if len(rows)
    }


def _task_result(reference: Any) -> EncodedPart:
    """The result of a task; an error in the user's data is raised as the task raised it."""
    import ray

    try:
        part: EncodedPart = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HeliostatError):
            raise error.cause from None
        raise
    return part
