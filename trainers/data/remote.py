"""Data sets kept at a URI, and fetched to the machine that reads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.spec import RunSpec
from trainers.stores import MANIFEST, RemoteStore


def remote_dataset(uri: str, name: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder on this machine with the data set `name` that is kept at `uri`.

    If it is not there, `build` writes its files into the folder it is given and returns the
    manifest. Two that build at once write the same.
    """
    store = RemoteStore(uri, "datasets", writable=True, spec_field="datasets")
    if name not in store.names():
        store.start_write(name)
        folder = store.staging_dir(name)
        try:
            manifest = build(folder)
            for file in manifest["files"]:
                store.upload(name, file)
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
            store.commit(name)
        except BaseException:
            store.abort(name)
            raise
    return store.download(name)


def local_dataset(dataset: Path, spec: RunSpec) -> Path:
    """The data set that the driver prepared, on this machine."""
    if spec.datasets is None:
        return dataset
    return RemoteStore(spec.datasets, "datasets", spec_field="datasets").download(dataset.name)
