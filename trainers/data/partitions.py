"""Data sets that are made part by part: in parallel where there is a Ray, else one by one.

A part that is made is on disk, with its checksums beside it, before it counts, so that making a
set goes on where it was stopped. Parts come from workers as the bytes of Parquet files, the same
wherever they are made: workers need no folder that they share.
"""

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.base.errors import HeliostatError
from cluster.base.files import write_atomic, write_bytes_atomic
from trainers.workload import PartitionedWorkload

FileEntries = dict[str, dict[str, Any]]
"""Files of a data set by name, as its manifest has them: bytes, sha256, rows of a table."""
EncodedPart = dict[str, tuple[int, bytes]]
"""A part: for each split its rows, and these as a Parquet file."""
ProgressCallback = Callable[[int, int], None]
"""Told how many parts are made, and of how many."""

PARTS_IN_FLIGHT_PER_CPU = 2
"""Parts per CPU that are asked for at once, so that what is made does not wait for us in memory."""


def ignore_progress(done: int, parts: int) -> None:
    """For those who do not look."""


def encode_parquet(rows: pa.Table) -> bytes:
    """The file that holds a table of a data set."""
    file = io.BytesIO()
    pq.write_table(rows, file, compression="zstd", use_dictionary=False)
    return file.getvalue()


def manifest_entry(content: bytes, **more: int) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {**more, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_parts(
    workload: PartitionedWorkload, folder: Path, on_progress: ProgressCallback = ignore_progress
) -> FileEntries:
    """Make what `folder` does not have yet of a data set; what it has then, file by file.

    On all CPUs of the Ray that is connected, or in this process.
    """
    parts = workload.parts()
    common = _common_files(workload, parts, folder)
    found = {number: _saved_files(folder, _record_name(number)) for number in range(len(parts))}
    missing = [number for number, entries in found.items() if entries is None]
    on_progress(len(parts) - len(missing), len(parts))
    for done, (number, made) in enumerate(
        _build_missing(workload, parts, missing, common), start=1
    ):
        files = {f"{split}-{number:05d}.parquet": each for split, each in made.items()}
        contents = {name: content for name, (_, content) in files.items()}
        entries = {
            name: manifest_entry(content, rows=rows) for name, (rows, content) in files.items()
        }
        found[number] = _save_files(folder, _record_name(number), contents, entries)
        on_progress(len(parts) - len(missing) + done, len(parts))
    whole = {name: manifest_entry(content) for name, content in common.items()}
    for number in range(len(parts)):
        whole |= found[number] or {}
    for path in folder.iterdir():  # the records, and what somebody who was killed left
        if path.name not in whole:
            path.unlink()
    return whole


def _record_name(number: int) -> str:
    return f"{number:05d}.part.json"


def _common_files(
    workload: PartitionedWorkload, parts: Sequence[Any], folder: Path
) -> dict[str, bytes]:
    kept = _saved_files(folder, "common.part.json")
    if kept is not None:
        return {name: (folder / name).read_bytes() for name in kept}
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
    """The files of a part that is there and whole."""
    if not (folder / record).exists():
        return None
    entries: FileEntries = json.loads((folder / record).read_text())
    return None if damaged_files(folder, entries) else entries


def damaged_files(folder: Path, entries: FileEntries) -> list[str]:
    """The files that are missing or not what they were when they were made."""
    return [
        name
        for name, kept in entries.items()
        if not (folder / name).exists()
        or hashlib.sha256((folder / name).read_bytes()).hexdigest() != kept["sha256"]
    ]


def _build_missing(
    workload: PartitionedWorkload,
    parts: Sequence[Any],
    missing: Sequence[int],
    common: Mapping[str, bytes],
) -> Iterator[tuple[int, EncodedPart]]:
    """The missing parts with their numbers, as they get ready."""
    import ray

    if not ray.is_initialized():
        for number in missing:
            yield number, build_part(workload, parts[number], common)
        return
    make = ray.remote(num_cpus=1)(build_part)
    shared = [ray.put(workload), ray.put(common)]
    todo = deque(missing)
    under_way: dict[Any, int] = {}
    at_once = PARTS_IN_FLIGHT_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    try:
        while todo or under_way:
            while todo and len(under_way) < at_once:
                number = todo.popleft()
                under_way[make.remote(shared[0], parts[number], shared[1])] = number
            ready, _ = ray.wait(list(under_way))
            for each in ready:
                yield under_way.pop(each), _task_result(each)
    finally:
        for each in under_way:
            ray.cancel(each)


def build_part(
    workload: PartitionedWorkload, part: Any, common: Mapping[str, bytes]
) -> EncodedPart:
    """One part, on whatever machine."""
    made = workload.part(part, common)
    return {split: (len(rows), encode_parquet(rows)) for split, rows in made.items() if len(rows)}


def _task_result(reference: Any) -> EncodedPart:
    """What a task made; what is wrong with the user's data as the task said it."""
    import ray

    try:
        made: EncodedPart = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HeliostatError):
            raise error.cause from None
        raise
    return made
