"""The verb `data`: make a data set before training, or check one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli.options import Subparsers, run_options
from trainers.cli.options import SPEC_HELP, as_job

if TYPE_CHECKING:
    from rich.console import Console

    from trainers.spec import RunSpec
    from trainers.workload import Workload


def add_verbs(verbs: Subparsers) -> None:
    data = verbs.add_parser(
        "data",
        parents=[run_options(named=False)],
        help="make a data set, or check an existing one",
        description="Make the data set of SPEC as Parquet files, its parts in parallel with Ray. "
        "If it was interrupted, continue; if the data set exists, check each of its files.",
    )
    data.add_argument("spec", help=SPEC_HELP)
    data.set_defaults(command=data_command, plan=as_job, session_modules=())


def data_command(args: argparse.Namespace) -> int:
    from cluster.base.config import apply_overrides
    from trainers.data.dataset import dataset_name
    from trainers.runs.run import resolved_data
    from trainers.spec import RunSpec, find_spec, resolve
    from trainers.stores import MANIFEST

    spec, _ = resolve(apply_overrides(find_spec(args.spec)[1], args.set), RunSpec)
    spec, workload = resolve(resolved_data(spec), RunSpec)
    folder = Path(spec.storage) / "datasets" / dataset_name(workload, Path(spec.storage))
    if spec.datasets is None and (folder / MANIFEST).exists():
        return _check(folder)
    return _make(spec, workload, args)


def _check(folder: Path) -> int:
    """Compare all files with the manifest. Raises DataError with the first damaged file."""
    from rich.console import Console

    from cluster.base.errors import DataError
    from trainers.data.partitioned_dataset import damaged_files
    from trainers.data.splits import read_dataset_manifest
    from trainers.run_folder import display_path

    damaged = damaged_files(folder, read_dataset_manifest(folder)["files"])
    if damaged:
        raise DataError(
            f"{folder / damaged[0]}: is not what the manifest says; remove {display_path(folder)} "
            "to make the data set again"
        )
    _show(Console(highlight=False, soft_wrap=True), folder, "is there, every checksum is right")
    return 0


def _make(spec: "RunSpec", workload: "Workload", args: argparse.Namespace) -> int:
    import contextlib

    from cluster.base.files import cache_folder
    from cluster.base.terminal import JobProgress, redirect_output
    from cluster.session.ray_session import ray_session
    from trainers.cli.progress import bar_of
    from trainers.data.dataset import prepare_dataset
    from trainers.runs.session import code_packer
    from trainers.workload import PartitionedWorkload

    partitioned = isinstance(workload, PartitionedWorkload)
    ray = ray_session(args.address, code_packer(spec))
    with (
        redirect_output(cache_folder() / "data.log", args.verbose) as console,
        ray if partitioned else contextlib.nullcontext(),
        bar_of(console, "parts") as bar,
    ):
        task, job_progress, started = bar.add_task("", total=None), JobProgress(console), False

        def on_progress(done: int, parts: int) -> None:
            nonlocal started
            if not started:
                existing = f", {done} of them made before" if done else ""
                console.print(f"{parts} parts{existing}")
            started = True
            bar.update(task, completed=done, total=parts)
            job_progress.report(lambda: f"part {done}/{parts}")

        folder = prepare_dataset(workload, Path(spec.storage), spec.datasets, on_progress)
        _show(console, folder, "is made")
    return 0


def _show(console: "Console", folder: Path, state: str) -> None:
    """Print the splits of a data set: samples, files, megabytes."""
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
