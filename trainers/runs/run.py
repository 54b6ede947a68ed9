"""A run before it starts: its spec, checked and complete, its data set and its folder.

A run is new (`new_run`) or continues an earlier one (`resumed_run`). `execution.run_to_end`
trains it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.base.config import apply_overrides, flatten, read_yaml
from cluster.base.errors import SpecError
from cluster.connection.ray_connection import base_folder
from cluster.jobs.secret_scan import secret_in_text
from trainers.checkpoints.checkpoints import Checkpoints, find_checkpoint
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import count_samples
from trainers.run_folder import CHECKPOINTS, SPEC, create_run_folder, find_run_folder, unique_name
from trainers.spec import RunSpec, find_spec, resolve
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


def new_run(name: str, overrides: list[str], run_name: str | None, source: str | None) -> Run:
    """Create a run of the spec `name`, with a folder of its own.

    With `source`, the name of another run or trial, training starts from a copy of the newest
    checkpoint of `source` and continues at that checkpoint's step.
    """
    stem, data = find_spec(name)
    spec, _ = resolve(apply_overrides(data, overrides), RunSpec)
    data = resolved_data(spec)
    spec, workload = resolve(data, RunSpec)
    storage = Path(spec.storage)
    checkpoint = find_checkpoint(source, storage) if source else None
    dataset = prepare_dataset(workload, storage, spec.datasets)
    folder = create_run_folder(storage, run_name or unique_name(stem), data)
    if checkpoint is not None:
        Checkpoints(folder / CHECKPOINTS, spec.checkpoint).import_from(checkpoint)
    return Run(data, spec, workload, dataset, folder)


def resumed_run(name: str, storage: Path, overrides: list[str]) -> Run:
    """Open an earlier run to continue it.

    Raises SpecError for an override that would change the result.
    """
    folder = find_run_folder(name, storage)
    for assignment in overrides:
        if assignment.partition(".")[0] not in CHANGEABLE_SECTIONS:
            raise SpecError(
                f"--set {assignment}: cannot change in a resumed run; start a new one with --from"
            )
    data = apply_overrides(read_yaml(folder / SPEC), overrides)
    spec, workload = resolve(data, RunSpec)
    dataset = prepare_dataset(workload, Path(spec.storage), spec.datasets)
    return Run(data, spec, workload, dataset, folder)


def resolved_data(spec: RunSpec) -> dict[str, Any]:
    """The spec as plain data with all defaults and absolute paths filled in.

    It means the same in any working folder. Raises SpecError if a value looks like a secret.
    """
    data = spec.model_dump(mode="json")
    if data["sweep"] is None:
        del data["sweep"]
    data["storage"] = str(base_folder() / spec.storage)
    data["tracking"]["uri"] = spec.tracking.uri or default_tracking_uri()
    for path, value in flatten(data).items():
        if isinstance(value, str) and (secret := secret_in_text(value)):
            raise SpecError(
                f"{path}: {secret}; specs are kept and sent to MLflow, give it elsewhere"
            )
    return data


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
