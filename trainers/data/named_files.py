"""The files that a section of a spec names, at any depth, and the hashes of their contents."""

import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster.base.errors import DataError
from cluster.base.files import cache_folder, write_atomic

SKIPPED = ("__pycache__", "mlflow.db", "mlartifacts", "mlruns")
"""Names, or beginnings of names, within a folder that are no data, besides hidden ones."""
SETTLED_S = 2.0
"""A file that was changed in the last seconds may change again without a new time of change."""


def named_files(
    section: Any, folders: Iterable[Path], without: Path
) -> list[tuple[str, dict[str, str]]]:
    """The files that texts in `section` name: the name of their folder, and their hashes by name.

    `section` is plain data. A text at any depth, also a key, counts if it is the path of an
    existing file or folder in one of the `folders`; it may have `~` and wildcards. Of a folder
    all files count but hidden ones, caches, and those in the folder `without`. Each file is read
    once per machine, and again when its size, its inode or one of its times has changed: the time
    of the last change cannot be set by hand. Raises DataError for a file that cannot be read.
    """
    found: dict[Path, dict[str, None]] = {}
    for path in _named_paths(section, [*folders], without):
        home = path if path.is_dir() else path.parent
        found.setdefault(home, {}).update(dict.fromkeys(_files(path, without)))
    return [(home.name, _hashes(home, sorted(files))) for home, files in found.items()]


def _named_paths(section: Any, folders: list[Path], without: Path) -> list[Path]:
    """In the order of the texts. `/` and `~` alone are more often separators than data."""
    found: dict[Path, None] = {}
    for text in dict.fromkeys(_texts(section)):
        path = os.path.expanduser(text.removeprefix("file://"))
        for folder in folders:
            place = os.path.join(folder, path)
            if path and os.path.exists(place):
                found[Path(os.path.abspath(place))] = None
            elif glob.has_magic(path):
                matches = map(Path, sorted(glob.glob(os.path.abspath(place), recursive=True)))
                found |= {
                    match: None
                    for match in matches
                    if _is_data(match.name) and not match.is_relative_to(without)
                }
    return [each for each in found if each not in (Path.home(), Path(each.anchor))]


def _texts(section: Any) -> Iterator[str]:
    if isinstance(section, str):
        yield section
    elif isinstance(section, dict):
        for key, value in section.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(section, list | tuple):
        for value in section:
            yield from _texts(value)


def _hashes(home: Path, files: Iterable[str]) -> dict[str, str]:
    """Path relative to `home` -> SHA-256 of the content, for each of the files in it."""
    key = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    cache = cache_folder() / f"contents-{key}.json"
    try:
        known: dict[str, list[Any]] = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    hashes, kept = {}, dict(known)
    now_ns = time.time_ns()
    for file in files:
        name = os.path.relpath(file, home)
        try:
            status = os.stat(file)
            state = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
            *before, digest = known.get(name, [None])
            if before != state:
                with open(file, "rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"data: {file}: {error.strerror}") from None
        hashes[name] = str(digest)
        if now_ns - status.st_ctime_ns > SETTLED_S * 1e9:
            kept[name] = [*state, digest]
    if kept != known:
        write_atomic(cache, json.dumps(kept))
    return hashes


def _files(path: Path, without: Path | None) -> Iterator[str]:
    """The regular files at or below a path; links are followed, each folder once."""
    if path.is_file():
        yield str(path)
    seen = set()
    for folder, inner, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or (without and real == os.path.realpath(without)):
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [name for name in inner if _is_data(name)]
        places = (os.path.join(folder, name) for name in files if _is_data(name))
        yield from (place for place in places if os.path.isfile(place))


def _is_data(name: str) -> bool:
    return not name.startswith((".", *SKIPPED))
