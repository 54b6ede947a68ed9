"""Data sets at a URI: built once by one of the machines, downloaded once by every other one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.spec import RunSpec
from trainers.stores import RemoteStore


def remote_dataset(uri: str, name: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """This machine's copy of the data set `name` that is kept at `uri`.

    If it is not there, `build` writes its files into the folder that it is given and returns the
    manifest. Processes of one machine take turns. Two machines that build the data set at the same
    time upload equal files.
    """
    store = RemoteStore(uri, "datasets", writable=True, spec_field="datasets")
    store.add(name, build)
    return store.download(name)


def local_dataset(dataset: Path, spec: RunSpec) -> Path:
    """This machine's copy of the data set that the driver has prepared."""
    if spec.datasets is None:
        return dataset
    return RemoteStore(spec.datasets, "datasets", spec_field="datasets").download(dataset.name)
