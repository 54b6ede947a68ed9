"""The verb `data`: a data set made before anybody trains on it, and looked through again."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.options import Subparsers, run_options
from trainers.cli.plan import as_job

if TYPE_CHECKING:
    from rich.console import Console

    from trainers.spec import RunSpec
    from trainers.workload import Workload


def add_verbs(verbs: Subparsers) -> None:
    data = verbs.add_parser(
        "data",
        parents=[run_options(named=False)],
        help="make a data set, or check one that is made",
        description="Make the data set of SPEC as Parquet files, its parts in parallel with Ray. "
        "What was stopped goes on where it was; what is there is checked, file by file.",
    )
    data.add_argument("spec", help="a file, a shipped spec's name, or module:Class")
    data.set_defaults(command=data_command, plan=as_job)


def data_command(args: argparse.Namespace) -> int:
    from cluster.base.config import apply_overrides
    from trainers.data.dataset import dataset_name
    from trainers.runs.run import resolved_data
    from trainers.spec import RunSpec, find_spec, resolve
    from trainers.stores import MANIFEST

    spec, _ = resolve(apply_overrides(find_spec(args.spec)[1], args.set), RunSpec)
    spec, workload = resolve(resolved_data(spec), RunSpec)
    folder = Path(spec.storage) / "datasets" / dataset_name(workload)
    if spec.datasets is None and (folder / MANIFEST).exists():
        return _check(folder)
    return _make(spec, workload, args)


def _check(folder: Path) -> int:
    """What is there is whole, or DataError with the first file that is not."""
    from rich.console import Console

    from cluster.base.errors import DataError
    from trainers.data.partitions import damaged_files
    from trainers.data.splits import read_dataset_manifest
    from trainers.run_folder import display_path

    wrong = damaged_files(folder, read_dataset_manifest(folder)["files"])
    if wrong:
        raise DataError(
            f"{folder / wrong[0]}: is not what the manifest says; remove {display_path(folder)}, "
            "and it is made again"
        )
    _show(Console(highlight=False, soft_wrap=True), folder, "is there, every checksum is right")
    return 0


def _make(spec: "RunSpec", workload: "Workload", args: argparse.Namespace) -> int:
    import contextlib

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from cluster.base.files import cache_folder
    from cluster.base.terminal import JobProgress, redirect_output
    from cluster.connection.ray_connection import ray_session
    from trainers.data.dataset import prepare_dataset
    from trainers.workload import PartitionedWorkload

    parted = isinstance(workload, PartitionedWorkload)
    code = Path.cwd() if ":" in spec.workload else None
    storage = Path(spec.storage)
    exclude = (".git", ".venv", "mlflow.db", "mlartifacts", storage.name, "__pycache__")
    with (
        redirect_output(cache_folder() / "data.log", args.verbose) as console,
        ray_session(args.address, code, exclude) if parted else contextlib.nullcontext(),
        Progress(
            BarColumn(),
            MofNCompleteColumn(),
            "parts",
            TimeRemainingColumn(compact=True),
            "left",
            console=console,
            disable=not console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as bar,
    ):
        task, pulse, told = bar.add_task("", total=None), JobProgress(console), False

        def watch(done: int, parts: int) -> None:
            nonlocal told
            if not told:
                there = f", {done} of them made before" if done else ""
                console.print(f"{parts} parts{there}")
            told = True
            bar.update(task, completed=done, total=parts)
            pulse.report(lambda: f"part {done}/{parts}")

        folder = prepare_dataset(workload, storage, spec.datasets, watch)
        _show(console, folder, "is made")
    return 0


def _show(console: "Console", folder: Path, state: str) -> None:
    """The splits of a data set: samples, files, bytes."""
    from rich.table import Table

    from trainers.data.splits import count_samples, read_dataset_manifest
    from trainers.run_folder import display_path

    manifest = read_dataset_manifest(folder)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("split", "samples", "files", "MB"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in ("train", "val", "test"):
        if count := count_samples(folder, split):
            files = [each for name, each in manifest["files"].items() if name.startswith(split)]
            size = sum(each["bytes"] for each in files) / 1e6
            table.add_row(split, f"{count:,}", str(len(files)), f"{size:.2f}")
    console.print(table)
    made_with = ", ".join(f"{name} {version}" for name, version in manifest["made_with"].items())
    console.print(f"{display_path(folder)} {state}{f'; with {made_with}' if made_with else ''}")
