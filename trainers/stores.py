"""Where checkpoints and data sets are kept: a folder, or a URI that pyarrow's file systems know.

A store holds folders by name. A folder is committed, with all its files, or it does not exist: a
rename commits it or, in an object store, the manifest, which is uploaded last.
"""

import contextlib
import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.fs as pafs
from filelock import FileLock

from cluster.base.errors import SpecError
from cluster.base.files import cache_folder, commit_folder

MANIFEST = "manifest.json"
"""The file of a committed folder that lists its other files, under `files`."""
CHUNK_BYTES = 1 << 24
"""Bytes of a file that are sent or received at once."""
STEP = "step-"
"""What the name of a checkpoint begins with; the number of its step follows."""


class Store(Protocol):
    """Folders by name, each written by a group of workers; a committed one no longer changes.

    One worker calls `start_write`, `commit` and `abort`; each worker writes its own files into
    `staging_dir` and uploads them.
    """

    def names(self) -> list[str]:
        """The names of the committed folders, checkpoints in the order of their steps."""

    def describe(self, name: str) -> str:
        """The path or URI of a folder, for messages."""

    def start_write(self, name: str) -> None:
        """Prepare to write a folder; called by one worker, before any of them writes."""

    def staging_dir(self, name: str) -> Path:
        """The local folder in which the workers of this machine write a folder's files."""

    def upload(self, name: str, file: str) -> None:
        """Called by each worker for each file that it has written, except the manifest."""

    def commit(self, name: str) -> None:
        """Make a folder visible, once its manifest is written; replaces an older one."""

    def abort(self, name: str) -> None:
        """Delete the files of a folder that is not committed."""

    def download(self, name: str) -> Path:
        """The local path of a committed folder."""

    def read_manifest(self, name: str) -> bytes:
        """The manifest of a committed folder."""

    def remove(self, name: str) -> None:
        """Delete a committed folder."""

    def clear(self) -> None:
        """Delete everything here."""

    def forget_copies(self) -> bool:
        """Delete this machine's copies; False if there are none, since the folders are here."""


class LocalStore:
    """A folder that all workers can see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        folders = (path.name for path in self._folder.glob(f"{STEP}*") if path.is_dir())
        return sorted(folders, key=_order)

    def describe(self, name: str) -> str:
        return str(self._folder / name)

    def start_write(self, name: str) -> None:
        _remove_folders(self._folder.glob(f".{STEP}*"))  # of saves that were killed
        self.staging_dir(name).mkdir(parents=True)

    def staging_dir(self, name: str) -> Path:
        return self._folder / f".{name}"

    def upload(self, name: str, file: str) -> None:
        """Nothing to do: the rename in `commit` moves all files at once."""

    def commit(self, name: str) -> None:
        shutil.rmtree(self._folder / name, ignore_errors=True)
        commit_folder(self.staging_dir(name), self._folder / name)

    def abort(self, name: str) -> None:
        shutil.rmtree(self.staging_dir(name), ignore_errors=True)

    def download(self, name: str) -> Path:
        return self._folder / name

    def read_manifest(self, name: str) -> bytes:
        return (self._folder / name / MANIFEST).read_bytes()

    def remove(self, name: str) -> None:
        self.abort(name)
        (self._folder / name).rename(self.staging_dir(name))  # so none is ever half there
        self.abort(name)

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget_copies(self) -> bool:
        return False


class RemoteStore:
    """A URI, such as `s3://bucket/path`, and this machine's cache of what is kept there."""

    def __init__(
        self, uri: str, name: str, writable: bool = False, spec_field: str = "checkpoint.uri"
    ) -> None:
        """Folders are kept under `name` at `uri`, the value of the spec's `spec_field`.

        SpecError if pyarrow cannot reach the URI or, with `writable`, cannot write there.
        """
        try:
            self._filesystem, root = pafs.FileSystem.from_uri(uri)
            self._root = f"{root.rstrip('/')}/{name}"
            if writable:
                self._filesystem.create_dir(self._root)
            self.names()
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SpecError(f"{spec_field}: {uri} cannot be used: {reason}") from error
        self._base_uri = f"{uri.partition('?')[0].rstrip('/')}/{name}"
        key = hashlib.sha256(f"{uri}/{name}".encode()).hexdigest()[:16]
        self._cache = cache_folder() / f"checkpoints-{key}"

    def names(self) -> list[str]:
        return sorted((n for n, files in self._files().items() if MANIFEST in files), key=_order)

    def describe(self, name: str) -> str:
        return f"{self._base_uri}/{name}"

    def location(self, name: str) -> tuple[pafs.FileSystem, str]:
        """The file system of a folder, and its path there."""
        return self._filesystem, f"{self._root}/{name}"

    def start_write(self, name: str) -> None:
        self._clear_staging(name)
        for other, files in self._files().items():
            if other == name or (other.startswith(STEP) and MANIFEST not in files):
                self.remove(other)  # of a save that was killed
        self._filesystem.create_dir(f"{self._root}/{name}")

    def staging_dir(self, name: str) -> Path:
        path = self._cache / f".{name}"
        _remove_folders(self._cache.glob(f".{STEP}*"), but=path)  # of saves that were killed
        path.mkdir(parents=True, exist_ok=True)
        return path

    def upload(self, name: str, file: str) -> None:
        local = self.staging_dir(name) / file
        remote = self._filesystem.open_output_stream(f"{self._root}/{name}/{file}")
        with local.open("rb") as source, remote as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)

    def commit(self, name: str) -> None:
        self.upload(name, MANIFEST)
        shutil.rmtree(self._cache / name, ignore_errors=True)
        self.staging_dir(name).rename(self._cache / name)  # what a restart here begins from
        self._keep_newest(name)

    def abort(self, name: str) -> None:
        self._clear_staging(name)
        if name not in self.names():
            self.remove(name)

    def add(self, name: str, write: Callable[[Path], dict[str, Any]]) -> None:
        """Write a folder, unless it is committed; for processes that do not know of each other.

        `write` puts the files into the folder that it is given and returns the manifest. Processes
        of one machine share the staging folder, so they take turns. Another machine may write the
        same folder at the same time: its uploads are never deleted here, as `start_write` and
        `abort` would do. They must be equal to ours.
        """
        self._cache.mkdir(parents=True, exist_ok=True)
        with FileLock(self._cache / f".{name}.lock"):
            if name in self.names():
                return
            self._clear_staging(name)  # of a process that was killed
            try:
                folder = self.staging_dir(name)
                manifest = write(folder)
                if name in self.names():  # another machine was faster
                    return
                self._filesystem.create_dir(f"{self._root}/{name}")
                for file in manifest["files"]:
                    self.upload(name, file)
                (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
                self.commit(name)
            finally:
                self._clear_staging(name)

    def download(self, name: str) -> Path:
        """This machine's copy; of all checkpoints here, only the one asked for last is kept."""
        target = self._cache / name
        manifest, sizes = self.read_manifest(name), self._sizes(name)
        self._cache.mkdir(parents=True, exist_ok=True)
        with FileLock(self._cache / ".lock"):  # of several workers here, one downloads
            if not _is_copy(target, manifest, sizes):
                self._fetch(name, manifest, sizes)
            self._keep_newest(name)
        return target

    def read_manifest(self, name: str) -> bytes:
        with self._open(name, MANIFEST) as source:
            return bytes(source.read())

    def remove(self, name: str) -> None:
        shutil.rmtree(self._cache / name, ignore_errors=True)
        folder = f"{self._root}/{name}"
        if self._filesystem.get_file_info(folder).type == pafs.FileType.NotFound:
            return
        # First the manifest, so that the folder is no longer committed while it is deleted.
        if self._filesystem.get_file_info(f"{folder}/{MANIFEST}").is_file:
            self._filesystem.delete_file(f"{folder}/{MANIFEST}")
        self._filesystem.delete_dir(folder)

    def clear(self) -> None:
        """Delete everything here and this machine's copies."""
        self.forget_copies()
        if self._filesystem.get_file_info(self._root).type != pafs.FileType.NotFound:
            self._filesystem.delete_dir(self._root)

    def forget_copies(self) -> bool:
        shutil.rmtree(self._cache, ignore_errors=True)
        return True

    def _files(self) -> dict[str, set[str]]:
        """The files of each folder, committed or not."""
        selector = pafs.FileSelector(self._root, allow_not_found=True, recursive=True)
        found: dict[str, set[str]] = {}
        for each in self._filesystem.get_file_info(selector):
            if each.is_file:
                found.setdefault(Path(each.path).parent.name, set()).add(each.base_name)
            else:
                found.setdefault(each.base_name, set())
        return found

    def _sizes(self, name: str) -> dict[str, int]:
        """The bytes of a folder's files at the URI; if one is damaged there, no copy is used."""
        selector = pafs.FileSelector(f"{self._root}/{name}")
        return {each.base_name: each.size for each in self._filesystem.get_file_info(selector)}

    def _fetch(self, name: str, manifest: bytes, sizes: Mapping[str, int]) -> None:
        """Replace this machine's copy of a folder; the files that are here need no download."""
        _remove_folders(self._cache.glob(".fetch-*"))  # of downloads that were killed
        building, target = self._cache / f".fetch-{secrets.token_hex(4)}", self._cache / name
        building.mkdir()
        for file, entry in json.loads(manifest)["files"].items():
            places = (target / file, self._cache / f".{name}" / file)
            known = next((place for place in places if _has_content(place, entry)), None)
            if known is not None and known.stat().st_size == sizes.get(file):
                known.rename(building / file)
                continue
            with self._open(name, file) as source, (building / file).open("wb") as copy:
                shutil.copyfileobj(source, copy, CHUNK_BYTES)
        (building / MANIFEST).write_bytes(manifest)
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)

    def _keep_newest(self, name: str) -> None:
        if name.startswith(STEP):
            _remove_folders(self._cache.glob(f"{STEP}*"), but=self._cache / name)

    def _open(self, name: str, file: str) -> pa.NativeFile:
        return self._filesystem.open_input_stream(f"{self._root}/{name}/{file}")

    def _clear_staging(self, name: str) -> None:
        shutil.rmtree(self._cache / f".{name}", ignore_errors=True)


def step_of(name: str) -> int:
    """The number of steps in the name of a checkpoint; -1 for another name."""
    step = name.removeprefix(STEP)
    return int(step) if step.isdecimal() else -1


def _order(name: str) -> tuple[int, str]:
    """The key by which names are sorted: steps are compared as numbers."""
    return step_of(name), name


def _remove_folders(folders: Iterator[Path], but: Path | None = None) -> None:
    for folder in folders:
        if folder != but:
            shutil.rmtree(folder, ignore_errors=True)


def _is_copy(folder: Path, manifest: bytes, sizes: Mapping[str, int]) -> bool:
    """Whether a folder has this manifest, and all of its files in these sizes."""
    try:
        if (folder / MANIFEST).read_bytes() != manifest:
            return False
        files = json.loads(manifest)["files"]
        return all((folder / file).stat().st_size == sizes.get(file) for file in files)
    except FileNotFoundError:
        return False


def _has_content(path: Path, entry: Mapping[str, Any] | None) -> bool:
    """Whether a file is what its entry in a manifest says."""
    if not entry or "bytes" not in entry or not path.is_file():
        return False
    if path.stat().st_size != entry["bytes"]:
        return False
    with path.open("rb") as file:
        digest: str = hashlib.file_digest(file, "sha256").hexdigest()
    return digest == str(entry["sha256"])


_external_wait: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext


def external_wait() -> AbstractContextManager[None]:
    """A context in which a thread waits for others: for a save, a download, a decision of Tune.

    A watchdog takes it for a sign of life.
    """
    return _external_wait()


@contextlib.contextmanager
def external_waits_in(context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """In here, every `external_wait` of this process is also in a `context`."""
    global _external_wait
    _external_wait = context
    try:
        yield
    finally:
        _external_wait = contextlib.nullcontext
