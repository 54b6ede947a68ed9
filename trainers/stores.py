"""Where checkpoints are: a folder on a file system, or any place that pyarrow can reach by URI.

Both know folders by name, that are either committed, whole, or not there. On a file system the
name is given by a rename; in an object store by the file that is written last.
"""

import hashlib
import json
import secrets
import shutil
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.fs as pafs

from cluster.base.errors import SpecError
from cluster.base.files import cache_folder, commit_folder

MANIFEST = "manifest.json"
"""The file of a committed folder that lists the others, under `files`."""
CHUNK_BYTES = 1 << 24
"""Bytes of a file that are sent or received at once."""


class Store(Protocol):
    """Folders by name; what is committed does not change any more."""

    def names(self) -> list[str]:
        """What is committed, sorted."""

    def describe(self, name: str) -> str:
        """Where a folder is, for people."""

    def start_write(self, name: str) -> None:
        """Make room to build a folder; called by the first worker, before any of them writes."""

    def staging_dir(self, name: str) -> Path:
        """Where workers on this machine write the files of a folder that is being built."""

    def upload(self, name: str, file: str) -> None:
        """Called by each worker for each file that it wrote, but the manifest."""

    def commit(self, name: str) -> None:
        """Give a folder its name, after its manifest was written; replaces what had the name."""

    def abort(self, name: str) -> None:
        """Free what was built and not committed."""

    def download(self, name: str) -> Path:
        """A committed folder, on this machine."""

    def read_manifest(self, name: str) -> bytes:
        """The manifest of a committed folder."""

    def remove(self, name: str) -> None:
        """Forget a committed folder."""


class LocalStore:
    """A folder that all workers see."""

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
        """Nothing to do: a rename gives all files their place at once."""

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
    """A place that a URI names, such as `s3://bucket/path`, by way of this machine's cache."""

    def __init__(
        self, uri: str, name: str, writable: bool = False, spec_field: str = "checkpoint.uri"
    ) -> None:
        """Folders are kept under `name` at `uri`, which the spec's `field` says.

        SpecError when pyarrow cannot reach that, or write there if `writable` is asked for.
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
        shutil.rmtree(self._cache / f".{name}", ignore_errors=True)
        if name not in self.names():
            self.remove(name)

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

    def _open(self, name: str, file: str) -> pa.NativeFile:
        return self._filesystem.open_input_stream(f"{self._root}/{name}/{file}")

    def remove(self, name: str) -> None:
        shutil.rmtree(self._cache / name, ignore_errors=True)
        folder = f"{self._root}/{name}"
        if self._filesystem.get_file_info(folder).type == pafs.FileType.NotFound:
            return
        if self._filesystem.get_file_info(
            f"{folder}/{MANIFEST}"
        ).is_file:  # without it, not committed
            self._filesystem.delete_file(f"{folder}/{MANIFEST}")
        self._filesystem.delete_dir(folder)
