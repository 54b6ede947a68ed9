"""Where checkpoints and data sets are kept: a folder, or a URI that pyarrow's file systems know.

A store holds folders by name. A folder is either committed, with all its files, or it does not
exist. On a file system, a rename commits it; in an object store, the manifest, which is uploaded
last.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
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


class Store(Protocol):
    """Folders by name, each written by a group of workers; a committed one no longer changes.

    One worker calls `start_write`, `commit` and `abort`; each worker writes its own files into
    `staging_dir` and uploads them.
    """

    def names(self) -> list[str]:
        """The names of the committed folders, sorted."""

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


class LocalStore:
    """A folder that all workers can see."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("step-*") if path.is_dir())

    def describe(self, name: str) -> str:
        return str(self._folder / name)

    def start_write(self, name: str) -> None:
        self.abort(name)
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
        shutil.rmtree(self._folder / name)


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
            raise SpecError(f"{spec_field}: {uri} cannot be used: {reason}") from None
        self._base_uri = f"{uri.partition('?')[0].rstrip('/')}/{name}"
        key = hashlib.sha256(f"{uri}/{name}".encode()).hexdigest()[:16]
        self._cache = cache_folder() / f"checkpoints-{key}"

    def names(self) -> list[str]:
        selector = pafs.FileSelector(self._root, allow_not_found=True, recursive=True)
        found = self._filesystem.get_file_info(selector)
        return sorted(Path(f.path).parent.name for f in found if f.base_name == MANIFEST)

    def describe(self, name: str) -> str:
        return f"{self._base_uri}/{name}"

    def start_write(self, name: str) -> None:
        self.abort(name)
        self.remove(name)
        self._filesystem.create_dir(f"{self._root}/{name}")

    def staging_dir(self, name: str) -> Path:
        path = self._cache / f".{name}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def upload(self, name: str, file: str) -> None:
        local = self.staging_dir(name) / file
        remote = self._filesystem.open_output_stream(f"{self._root}/{name}/{file}")
        with local.open("rb") as source, remote as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)
        local.unlink()

    def commit(self, name: str) -> None:
        self.upload(name, MANIFEST)
        self.staging_dir(name).rmdir()

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
        target = self._cache / name
        manifest = self.read_manifest(name)
        if (target / MANIFEST).exists() and (target / MANIFEST).read_bytes() == manifest:
            return target
        shutil.rmtree(target, ignore_errors=True)
        building = self._cache / f".{name}-{secrets.token_hex(4)}"
        building.mkdir(parents=True)
        for file in json.loads(manifest)["files"]:
            with self._open(name, file) as source, (building / file).open("wb") as copy:
                shutil.copyfileobj(source, copy, CHUNK_BYTES)
        (building / MANIFEST).write_bytes(manifest)
        try:
            building.rename(target)
        except OSError:  # another process on this machine was faster
            shutil.rmtree(building)
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

    def _open(self, name: str, file: str) -> pa.NativeFile:
        return self._filesystem.open_input_stream(f"{self._root}/{name}/{file}")

    def _clear_staging(self, name: str) -> None:
        shutil.rmtree(self._cache / f".{name}", ignore_errors=True)
