"""Where the checkpoints of a run are, in its folder or at a URI, and how they get to another place.

A folder whose checkpoints are at a URI holds a file with that URI.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.base.errors import SpecError
from cluster.base.files import write_atomic
from trainers.stores import MANIFEST, STEP, LocalStore, RemoteStore, external_wait, step_of

POINTER = "elsewhere.json"
"""In the folder of checkpoints that are kept at a URI: that URI, and their name there."""


def current_store(folder: Path) -> LocalStore | RemoteStore:
    """Where the checkpoints of `folder` are now. Raises SpecError if the URI cannot be used."""
    where = _pointer(folder)
    return RemoteStore(where["uri"], where["name"]) if where else LocalStore(folder)


def newest_checkpoint(folder: Path) -> str | None:
    """The path or URI of the newest checkpoint of `folder`, which is not read; None without one."""
    store = current_store(folder)
    names = [name for name in store.names() if step_of(name) >= 0]
    return store.describe(names[-1]) if names else None


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"{STEP}{step:08d}"


def copy_checkpoint(
    source: LocalStore | RemoteStore, target: LocalStore | RemoteStore, name: str, new_name: str
) -> None:
    """Copy a checkpoint to another run whose checkpoints are kept in a place of the same kind.

    Both runs may be saving: unlike `start_write`, this deletes nothing of a save under way. Raises
    FileNotFoundError if there is no such checkpoint.
    """
    files = json.loads(source.read_manifest(name))["files"]
    if isinstance(source, RemoteStore) and isinstance(target, RemoteStore):
        filesystem, folder = target.location(new_name)
        target.remove(new_name)
        filesystem.create_dir(folder)
        for file in [*files, MANIFEST]:  # an object store copies them by itself
            filesystem.copy_file(f"{source.location(name)[1]}/{file}", f"{folder}/{file}")
        return
    if not (isinstance(source, LocalStore) and isinstance(target, LocalStore)):
        raise FileNotFoundError(f"{source.describe(name)}: is kept in another kind of place")
    target.abort(new_name)
    target.staging_dir(new_name).mkdir(parents=True)
    for file in [*files, MANIFEST]:
        original, copy = source.download(name) / file, target.staging_dir(new_name) / file
        try:
            copy.hardlink_to(original)  # the files of checkpoints are never changed
        except FileNotFoundError:
            raise
        except OSError:  # on another file system, or one without links
            shutil.copy(original, copy)
    target.commit(new_name)


def checkpoint_at(folder: Path, step: int) -> str | None:
    """The path or URI of the checkpoint of `folder` after `step` steps, which is not read."""
    store = current_store(folder)
    found = [name for name in store.names() if step_of(name) == step]
    return store.describe(found[-1]) if found else None


def store_at(folder: Path, uri: str | None, moves: bool) -> LocalStore | RemoteStore:
    """The store of the checkpoints of `folder`, which are to be at `uri`, or in the folder.

    With `moves`, which one process of a run sets, those that are elsewhere are moved there first;
    this blocks until it is done. Raises SpecError if it cannot be done: training would begin at
    step 0.
    """
    where = _pointer(folder)
    if uri is None and where is None:
        return LocalStore(folder)
    # The name must be the run's own and the same at every start, also in a folder that was moved.
    own = f"{folder.parent.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    name = where["name"] if where else own
    store = RemoteStore(uri, name, writable=moves) if uri else LocalStore(folder)
    if not moves or (where is not None and where["uri"] == uri):
        return store
    with external_wait():
        delete_originals = _copy_all(folder, store)
        if uri is None:
            (folder / POINTER).unlink()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / POINTER, json.dumps({"uri": uri, "name": name}))
        delete_originals()
    return store


def _pointer(folder: Path) -> dict[str, Any] | None:
    try:
        where: dict[str, Any] = json.loads((folder / POINTER).read_text())
    except FileNotFoundError:
        return None
    return where


def _copy_all(folder: Path, target: LocalStore | RemoteStore) -> Callable[[], None]:
    """Copy the checkpoints of `folder` that `target` lacks; returns what deletes the originals.

    Damaged ones are left out. So are all, if the place where they were is gone and `target` has
    some: then the user has moved them.
    """
    there = target.names()
    try:
        source = current_store(folder)
        names = [name for name in source.names() if name not in there]
        for name in names:
            _copy(source, target, name)
    except (SpecError, OSError, pa.ArrowException) as error:
        if there and isinstance(error, SpecError):
            return lambda: None
        reason = str(error).splitlines()[0]
        raise SpecError(
            f"checkpoint.uri: the checkpoints of {folder.parent.name} cannot be moved: {reason}"
        ) from error

    def delete() -> None:
        for name in names:
            source.remove(name)

    return delete


def _copy(source: LocalStore | RemoteStore, target: LocalStore | RemoteStore, name: str) -> None:
    try:
        manifest = source.read_manifest(name)
        files = json.loads(manifest)["files"]
        path = source.download(name)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # damaged
        return
    if not all((path / file).is_file() for file in files):
        return
    target.start_write(name)
    for file in files:
        shutil.copy(path / file, target.staging_dir(name))
        target.upload(name, file)
    (target.staging_dir(name) / MANIFEST).write_bytes(manifest)
    target.commit(name)
