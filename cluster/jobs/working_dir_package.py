"""The working folder as a package that Ray unpacks on the cluster.

Git decides what is left out: its own ignore rules apply, also in a folder that is no repository.
"""

import fnmatch
import hashlib
import io
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.base.errors import SpecError
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

    Paths and names that match `exclude_patterns` are left out. Raises SpecError for files that
    seem to contain credentials, and for a folder that is too large, with a line for each file.
    """
    files = list_packaged_files(folder, exclude_patterns)
    files = sorted({*files, *(path for path in required_files if (folder / path).is_file())})
    found = find_secrets(folder, files)
    if found:
        raise SpecError(
            "\n".join(found) + "\nnothing was sent; move these files out of the folder, "
            "name them in .gitignore or give --exclude"
        )
    sizes = {path: (folder / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total > MAX_PACKAGE_BYTES:
        largest = sorted(files, key=lambda path: sizes[path], reverse=True)[:5]
        raise SpecError(
            "\n".join(f"{path}: {format_mebibytes(sizes[path])}" for path in largest)
            + f"\nthe folder has {format_mebibytes(total)}, more than the "
            f"{format_mebibytes(MAX_PACKAGE_BYTES)} that can be sent; name large files in "
            ".gitignore, give --exclude, and keep data on storage that the cluster can see"
        )
    return Package(_zip_files(folder, files), tuple(files))


def list_packaged_files(folder: Path, exclude_patterns: Iterable[str] = ()) -> list[Path]:
    """The files below `folder` that git does not ignore, relative to it, sorted."""
    excluded = (*ALWAYS_EXCLUDED, *exclude_patterns)
    own = {
        name for name in HELIOSTAT_PACKAGES if (folder / name).resolve() == HELIOSTAT_ROOT / name
    }
    return sorted(
        path
        for path in map(Path, _git_files(folder))
        if path.parts[0] not in own
        and not any(_matches(path, pattern) for pattern in excluded)
        and (folder / path).is_file()  # neither deleted nor a link to a folder
    )


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


def _git_files(folder: Path) -> list[str]:
    """The files that git does not ignore; a folder outside a repository gets a temporary one."""
    flags = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    inside = _git(["-C", str(folder), "rev-parse", "--is-inside-work-tree"])
    if inside is None or inside.strip() != "true":
        with tempfile.TemporaryDirectory() as empty:
            if _git(["init", "--quiet", "--bare", empty]) is None:
                return _without_git(folder)
            options = [f"--git-dir={empty}", f"--work-tree={folder}", "-c", "core.bare=false"]
            names = _git(["-C", str(folder), *options, *flags]) or ""
    else:
        names = _git(["-C", str(folder), *flags]) or ""
    return [name for name in names.split("\0") if name]


def _git(arguments: list[str]) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _without_git(folder: Path) -> list[str]:
    if any(folder.rglob(".gitignore")):
        raise SpecError("git: is needed to read .gitignore; install it")
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in ALWAYS_EXCLUDED]
        names += [str((Path(parent) / name).relative_to(folder)) for name in files]
    return names


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
