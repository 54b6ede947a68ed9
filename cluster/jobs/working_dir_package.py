"""The working folder as a package that Ray unpacks on the cluster.

Git decides what is left out, see `cluster.jobs.folder_files`. All else is sent, or refused.
"""

import fnmatch
import hashlib
import io
import ntpath
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.base.errors import SpecError
from cluster.jobs.folder_files import files_below
from cluster.jobs.secret_scan import find_secrets

MAX_PACKAGE_BYTES = 256 << 20
"""Ray accepts packages of up to 512 MiB and keeps them in the memory of the head's GCS."""

ALWAYS_EXCLUDED = (
    *(".git", ".venv", "venv", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"),
    *("mlflow.db", "mlartifacts", "node_modules", ".DS_Store"),
)
"""Environments, caches and files that runs write: never code, even if git tracks them."""

HELIOSTAT_ROOT = Path(__file__).resolve().parents[2]
"""The folder of Heliostat's own packages."""

HELIOSTAT_PACKAGES = ("cluster", "trainers", "tuning", "heliostat")
"""They are left out of a package: the cluster has an installation of its own."""

_CURE = "move these files out of the folder, name them in .gitignore or give submit --exclude"


@dataclass(frozen=True)
class Package:
    """A folder's files as one zip, named by the hash of its content."""

    data: bytes
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The same for the same files, so that they are uploaded once."""
        return f"_ray_pkg_{hashlib.sha256(self.data).hexdigest()[:40]}.zip"

    @property
    def uri(self) -> str:
        return f"gcs://{self.name}"


def build_package(
    folder: Path, required_files: Iterable[Path] = (), exclude_patterns: Iterable[str] = ()
) -> Package:
    """Package the files of `folder` that git does not ignore, and all `required_files`.

    Paths and names that match `exclude_patterns` are left out. Raises SpecError, with a line for
    each file, for files that seem to contain credentials, that cannot be sent, and that are too
    large.
    """
    files = list_packaged_files(folder, exclude_patterns)
    files = sorted({*files, *(path for path in required_files if (folder / path).is_file())})
    _check_names(files)
    try:
        sizes = {path: (folder / path).stat().st_size for path in files}
        _check_sizes(sizes)
        found = find_secrets(folder, files)
        if found:
            raise SpecError("\n".join(found) + f"\nnothing was sent; {_CURE}")
        return Package(_zip_files(folder, files), tuple(files))
    except OSError as error:
        raise SpecError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _check_names(files: Iterable[Path]) -> None:
    """Raise SpecError for names that a zip cannot hold, or with which Ray 2.60 leaves files out."""
    found = []
    for path in files:
        name = os.fsencode(path).decode(errors="backslashreplace")
        if name != str(path):
            found.append(f"{name}: the name is not UTF-8")
        elif "\\" in name or ntpath.splitdrive(name)[0]:
            found.append(f"{name}: Ray does not unpack files with such names")
    if found:
        raise SpecError("\n".join(found[:5]) + f"\nnothing was sent; rename or {_CURE}")


def _check_sizes(sizes: Mapping[Path, int]) -> None:
    total = sum(sizes.values())
    if total > MAX_PACKAGE_BYTES:
        largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:5]
        raise SpecError(
            "\n".join(f"{path}: {format_mebibytes(sizes[path])}" for path in largest)
            + f"\nthe folder has {format_mebibytes(total)}, more than the "
            f"{format_mebibytes(MAX_PACKAGE_BYTES)} that can be sent; name large files in "
            ".gitignore, give --exclude, and keep data on storage that the cluster can see"
        )


def list_packaged_files(folder: Path, exclude_patterns: Iterable[str] = ()) -> list[Path]:
    """The files below `folder` that git does not ignore, relative to it, sorted.

    Raises SpecError as `files_below` does.
    """
    exclude_patterns = tuple(exclude_patterns)
    own = {
        name for name in HELIOSTAT_PACKAGES if (folder / name).resolve() == HELIOSTAT_ROOT / name
    }
    return files_below(
        folder,
        lambda path: path.parts[0] in own or is_left_out(path, exclude_patterns),
    )


def is_left_out(path: Path, exclude_patterns: Iterable[str]) -> bool:
    """Whether a path below the folder matches one of the patterns, or is never sent."""
    return any(_matches(path, pattern) for pattern in (*ALWAYS_EXCLUDED, *exclude_patterns))


def _matches(path: Path, pattern: str) -> bool:
    """Whether the path, one of its parent folders, or the name of one of them matches.

    A pattern that begins with a slash is matched with the path alone.
    """
    bare = pattern.strip("/").removeprefix("./")
    folders = [path, *path.parents][:-1]
    return any(
        fnmatch.fnmatch(part.as_posix(), bare)
        or (not pattern.startswith("/") and fnmatch.fnmatch(part.name, bare))
        for part in folders
    )


def _zip_files(folder: Path, files: Iterable[Path]) -> bytes:
    """A zip whose bytes depend on the files' content and modes, not on their times."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as package:
        for path in files:
            entry = zipfile.ZipInfo(path.as_posix())  # dated 1980, the zip epoch
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = ((folder / path).stat().st_mode & 0o777) << 16
            package.writestr(entry, (folder / path).read_bytes())
    return target.getvalue()


def format_mebibytes(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"
