"""Files that are either whole or not there: write beside, fsync, rename."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """This user's folder on this machine for what can be made again."""
    folder = Path(tempfile.gettempdir()) / f"heliostat-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def write_atomic(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`; a crash leaves the old file or the new one."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """As `write_atomic`, for what is not text."""
    building = path.with_name(f".{path.name}.{os.getpid()}")
    with building.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    building.rename(path)
    _fsync(path.parent)


def commit_folder(staging: Path, final: Path) -> None:
    """Give a finished folder its name, after all that is in it has reached the disk.

    Raises OSError if `final` is there already and not empty.
    """
    for path in sorted(staging.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(staging)
    staging.rename(final)
    _fsync(final.parent)


def truncate_partial_line(file: int) -> int:
    """Cut off what a crash has left of a line, of which nobody was told; where the last one ends.

    `file` is the descriptor of a file of lines, open to read and write.
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
