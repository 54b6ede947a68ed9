"""Files that a crash leaves either whole or absent: write to a temporary file, fsync, rename."""

import os
import tempfile
import uuid
from pathlib import Path


def cache_folder() -> Path:
    """This user's folder on this machine for data that can be recreated."""
    return user_folder(Path(tempfile.gettempdir()))


def user_folder(base: Path) -> Path:
    """This user's folder below `base`, which other users share."""
    folder = base / f"heliostat-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def write_atomic(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`; a crash leaves the old file or the new one."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """`write_atomic` for bytes."""
    # Not the process's id: threads share one, and so do containers that share a disk.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def commit_folder(staging: Path, final: Path) -> None:
    """Rename a finished folder to its final name, after its content has reached the disk.

    Raises OSError if `final` exists and is not empty.
    """
    for path in sorted(staging.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(staging)
    staging.rename(final)
    _fsync(final.parent)


def truncate_partial_line(file: int) -> int:
    """Remove a last line without newline, which a crash left, and return the file's new size.

    `file` is the descriptor of a file of lines, open for reading and writing.
    """
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
    return end


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
