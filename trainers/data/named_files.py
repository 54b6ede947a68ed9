"""The files that a section of a spec names, at any depth, and the hashes of their contents."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.base.config import Spec
from cluster.base.errors import DataError
from cluster.base.files import cache_folder, write_atomic

SKIPPED = ("__pycache__", "mlflow.db", "mlartifacts", "mlruns")
"""Names, or beginnings of names, within a folder that are no data, besides hidden ones."""
SETTLED_S = 2.0
"""A file that was changed in the last seconds may change again without a new time of change."""


def named_files(
    section: Spec, folders: Iterable[Path], without: Path
) -> list[tuple[str, dict[str, str]]]:
    """The files that texts in `section` name: the name of their folder, and their hashes by name.

    A text at any depth, also a key of a dictionary, counts if it is the path of an existing file or
    folder in one of the `folders`; it may begin with `~/` and have wildcards. Of a folder all files
    count but hidden ones, caches, and those in the folder `without`. Each file is read once per
    machine, and again when its size, its inode or one of its times has changed: the time of the
    last change cannot be set by hand. Raises DataError for a file that cannot be read.
    """
    without = without.resolve()
    found: dict[Path, dict[Path, None]] = {}
    texts = dict.fromkeys(_texts(section))
    for path in (path for text in texts for path in _named_paths(text, folders, without)):
        home = path if path.is_dir() else path.parent
        found.setdefault(home, {}).update(dict.fromkeys(_files(path, without)))
    return [(home.name, _hashes(home, sorted(files))) for home, files in found.items() if files]


def _texts(value: Any) -> Iterator[str]:
    """The texts and paths in a value of a spec; the names of fields are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Path):
        yield str(value) if value != Path() else ""  # an empty path, as a default may be
    elif isinstance(value, BaseModel):
        yield from _texts([each for _, each in value])
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, set | frozenset):
        yield from sorted(_texts([*value]))


def _named_paths(text: str, folders: Iterable[Path], without: Path) -> Iterator[Path]:
    """The existing paths that a text names; `/` and `~` are more often separators than data."""
    text = text.removeprefix("file://")
    path = Path.home() / text[2:] if text.startswith("~/") else Path(text)
    if not text or path in (Path("/"), Path.home()):
        return
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):  # such as for a text too long for a path
            if (folder / path).exists():
                yield (folder / path).resolve()
            elif any(wildcard in text for wildcard in "*?["):
                yield from _matches(folder, path, without)


def _matches(folder: Path, pattern: Path, without: Path) -> Iterator[Path]:
    """The data whose path matches a pattern, without what is in the folder `without`."""
    fixed = pattern
    while any(wildcard in str(fixed) for wildcard in "*?["):
        fixed = fixed.parent
    base = folder / fixed
    for found in sorted(base.glob(str(pattern.relative_to(fixed)))):
        names = found.relative_to(base).parts
        if all(map(_is_data, names)) and not found.resolve().is_relative_to(without):
            yield found.resolve()


def _hashes(home: Path, files: Iterable[Path]) -> dict[str, str]:
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
        name = str(file.relative_to(home))
        try:
            status = file.stat()
            state = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
            *before, digest = known.get(name, [None])
            if before != state:
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"data: {file}: {error.strerror}") from None
        hashes[name] = str(digest)
        if now_ns - status.st_ctime_ns > SETTLED_S * 1e9:
            kept[name] = [*state, digest]
    if kept != known:
        write_atomic(cache, json.dumps(kept))
    return hashes


def _files(path: Path, without: Path) -> Iterator[Path]:
    """The regular files at or below a path; links are followed, each folder once."""
    if path.is_file():
        yield path
    seen = {without}
    for place, inner, names in os.walk(path, followlinks=True):
        folder = Path(place)
        real = folder.resolve()
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        inner[:] = filter(_is_data, inner)
        yield from (each for name in names if _is_data(name) and (each := folder / name).is_file())


def _is_data(name: str) -> bool:
    return not name.startswith((".", *SKIPPED))
