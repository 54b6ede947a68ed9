"""A run before it starts: its spec, checked and complete, its data set and its folder.

A run is new (`new_run`) or continues an earlier one (`resumed_run`). `execution.run_to_end`
trains it.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.config import apply_overrides, flatten, read_yaml, write_yaml
from cluster.base.errors import SpecError
from cluster.connection.ray_connection import base_folder
from cluster.jobs.secret_scan import secret_in_text
from trainers.checkpoints.checkpoints import Checkpoints, find_checkpoint
from trainers.checkpoints.place import current_store, store_at
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import count_samples
from trainers.run_folder import (
    CHECKPOINTS,
    LEDGER,
    LOG,
    MODEL,
    SPEC,
    TRACKING,
    TRIALS,
    Kind,
    create_run_folder,
    find_run_folder,
    folder_kind,
    locked,
    name_taken_error,
    read_spec,
    require_kind,
    unique_name,
    write_environment,
)
from trainers.spec import RunSpec, find_spec, resolve
from trainers.stores import step_of
from trainers.tracking.tracker import default_tracking_uri
from trainers.workload import Workload

if TYPE_CHECKING:
    from argparse import Namespace

CHANGEABLE_SECTIONS = ("scale", "checkpoint", "budget", "cost", "session")
"""Sections of the spec that do not change what a run computes."""


@dataclass(frozen=True)
class Run:
    """One training run and its folder on disk."""

    spec_data: Mapping[str, Any]
    """The complete spec as plain data."""
    spec: RunSpec
    workload: Workload
    dataset: Path
    folder: Path

    @property
    def key(self) -> str:
        """The run's name, also in the tracker and in MLflow."""
        return self.folder.name

    @property
    def samples(self) -> int:
        """Samples in the training split."""
        return count_samples(self.dataset, "train")

    @property
    def total_steps(self) -> int:
        return self.spec.train.total_steps(self.samples)

    @property
    def saved_steps(self) -> int:
        """The steps of the newest checkpoint, from which training goes on; 0 without one."""
        place = store_at(self.folder / CHECKPOINTS, self.spec.checkpoint.uri, moves=False)
        return max(map(step_of, place.names()), default=0)


def new_run(name: str, overrides: list[str], run_name: str | None, source: str | None) -> Run:
    """Create a run of the spec `name`, with a folder of its own.

    With `source`, the name of another run or trial, training starts from a copy of the newest
    checkpoint of `source`, or of that of a step (`NAME@STEP`), and continues at its step.
    """
    stem, data = find_spec(name)
    spec, _ = resolve(apply_overrides(data, overrides), RunSpec)
    data = resolved_data(spec)
    data.pop("sweep", None)  # the rest of the file is this run's
    spec, workload = resolve(data, RunSpec)
    storage = Path(spec.storage)
    checkpoint = find_checkpoint(source, storage) if source else None
    dataset = prepare_dataset(workload, storage, spec.datasets)
    folder = claim_folder(storage, run_name or unique_name(stem), data, "train")
    if checkpoint is not None:
        Checkpoints(folder / CHECKPOINTS, spec.checkpoint).import_from(checkpoint)
    return Run(data, spec, workload, dataset, folder)


def claim_folder(storage: Path, name: str, data: Mapping[str, Any], kind: Kind) -> Path:
    """The folder of a new run or sweep: a new one, or that of a start that failed.

    Where a start has saved nothing, the same spec may start again under the same name, and its
    MLflow run goes on. Raises SpecError for every other name that is taken.
    """
    folder = storage / name
    if not (folder / SPEC).is_file():
        return create_run_folder(storage, name, data, kind)
    with locked(folder):
        same = read_yaml(folder / SPEC) == data and folder_kind(folder) == kind
        if not same or _has_saved(folder):
            raise name_taken_error(folder)
        current_store(folder / CHECKPOINTS).clear()
        for path in folder.iterdir():
            if path.is_dir() and path.name != TRACKING:
                shutil.rmtree(path)
            elif path.name not in (TRACKING, SPEC, LOG, LEDGER, ".lock"):
                path.unlink()
        write_environment(folder, kind)
    return folder


def _has_saved(folder: Path) -> bool:
    """Whether a run or sweep has results of its own."""
    if any((folder / name).exists() for name in (MODEL, TRIALS, "scaling.png")):
        return True
    store = current_store(folder / CHECKPOINTS)
    try:
        manifests = [json.loads(store.read_manifest(name)) for name in store.names()]
    except (OSError, ValueError):  # a damaged one
        return True
    return not all(manifest.get("from") for manifest in manifests)


def resumed_run(name: str, storage: Path, overrides: list[str]) -> Run:
    """Open an earlier run to continue it, with `overrides` from now on.

    Raises SpecError for an override that would change the result.
    """
    folder = find_run_folder(name, storage)
    require_kind(folder, "train")
    for assignment in overrides:
        if assignment.partition(".")[0] not in CHANGEABLE_SECTIONS:
            raise SpecError(
                f"--set {assignment}: cannot change in a resumed run; start a new one with --from"
            )
    data = apply_overrides(read_spec(folder), overrides)
    data.pop("sweep", None)
    spec, workload = resolve(data, RunSpec)
    dataset = prepare_dataset(workload, Path(spec.storage), spec.datasets)
    if overrides:
        refuse_secrets(data)
        with locked(folder):
            store_at(folder / CHECKPOINTS, spec.checkpoint.uri, moves=True)
            write_yaml(data, folder / SPEC)
    return Run(data, spec, workload, dataset, folder)


def resolved_data(spec: RunSpec) -> dict[str, Any]:
    """The spec as plain data with all defaults and absolute paths filled in.

    It means the same in any working folder. Raises SpecError if a value looks like a secret.
    """
    data = spec.model_dump(mode="json")
    for name in ("sweep", "changes"):
        if not data[name]:
            del data[name]
    data["storage"] = str(base_folder() / spec.storage)
    data["tracking"]["uri"] = spec.tracking.uri or default_tracking_uri()
    refuse_secrets(data)
    return data


def refuse_secrets(data: Mapping[str, Any]) -> None:
    """Raise SpecError if a value looks like a secret."""
    for path, value in flatten(data).items():
        if isinstance(value, str) and (secret := secret_in_text(value)):
            raise SpecError(
                f"{path}: {secret}; specs are kept and sent to MLflow, give it elsewhere"
            )


def storage_for_spec(name: str | None) -> Path:
    """The folder that holds the runs of the spec `name`; the default one without a name."""
    return base_folder() / (find_spec(name)[1].get("storage", "runs") if name else "runs")


def find_started(args: "Namespace") -> Path | None:
    """The storage folder with the run or sweep that `--or-resume` names; None if there is none."""
    if not (args.or_resume and args.spec and args.name) or args.resume:
        return None
    data = apply_overrides(find_spec(args.spec)[1], args.set)
    storage = base_folder() / str(data.get("storage", "runs"))
    return storage if (storage / args.name / SPEC).is_file() else None
