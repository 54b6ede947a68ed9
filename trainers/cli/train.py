"""The verb `train`."""

import argparse
import time
from typing import TYPE_CHECKING, Any

import trainers.cli.data
import trainers.cli.plan
import trainers.cli.remove
import trainers.cli.scaling
import trainers.cli.track
import trainers.cli.ui
from cluster.cli.options import Subparsers, run_options
from trainers.cli.options import SPEC_HELP, as_job

if TYPE_CHECKING:
    from rich.console import Console

    from trainers.outcome import Outcome
    from trainers.runs.run import Run


def add_verbs(verbs: Subparsers) -> None:
    """Add `train` and, in the order of the help, the other verbs of this room."""
    train = verbs.add_parser(
        "train",
        parents=[run_options()],
        help="train one model",
        description="Train the model that SPEC describes with Ray Train, tracked in MLflow.",
    )
    train.add_argument("spec", nargs="?", help=SPEC_HELP)
    train.add_argument("--resume", metavar="RUN", help="continue a run that was interrupted")
    train.add_argument(
        "--from",
        dest="source",
        metavar="RUN[@STEP]",
        help="start from the newest checkpoint of another run or trial, or from that of a step",
    )
    train.set_defaults(command=train_command, plan=as_job, session_modules=())
    for module in (
        trainers.cli.data,
        trainers.cli.plan,
        trainers.cli.scaling,
        trainers.cli.ui,
        trainers.cli.track,
        trainers.cli.remove,
    ):
        module.add_verbs(verbs)


def train_command(args: argparse.Namespace) -> int:
    from trainers.cli.progress import TrainingProgress
    from trainers.runs.execution import run_to_end
    from trainers.runs.session import run_session

    run = _requested_run(args)
    spec = run.spec
    start_s = time.monotonic()
    with run_session(run.folder, spec, args.address, args.verbose) as (console, stop):
        console.print(
            f"[bold]{run.key}[/]: {spec.workload}, {run.samples:,} samples, "
            f"{run.total_steps:,} steps of {spec.train.global_batch}, "
            f"workers: {spec.scale.workers}{_beginning(run, args)}"
        )
        with TrainingProgress(console, run.total_steps) as progress:
            outcome, summary = run_to_end(run, progress.on_progress, stop)
        _show_outcome(console, run, outcome, summary, time.monotonic() - start_s)
    return 0 if outcome.complete else 130


def _beginning(run: "Run", args: argparse.Namespace) -> str:
    """Where a run begins that is not new."""
    if saved := run.saved_steps:
        return f", from step {saved:,}"
    return ", from the start: nothing was saved" if args.resume else ""


def _requested_run(args: argparse.Namespace) -> "Run":
    """The run that the arguments name, new or resumed."""
    from cluster.base.errors import SpecError
    from trainers.runs.run import find_started, new_run, resumed_run, storage_for_spec

    if args.resume and (args.name or args.source):
        raise SpecError("--resume: a run keeps its name and its own checkpoints")
    if args.or_resume and not args.name:
        raise SpecError("--or-resume: needs --name, to know which run to continue")
    if storage := find_started(args):
        return resumed_run(args.name, storage, [])
    if args.resume:
        return resumed_run(args.resume, storage_for_spec(args.spec), args.set)
    if args.spec:
        return new_run(args.spec, args.set, args.name, args.source)
    raise SpecError("train: needs a spec, or --resume RUN")


def _show_outcome(
    console: "Console", run: "Run", outcome: "Outcome", summary: "dict[str, Any]", wall_s: float
) -> None:
    """Print the run's metrics as MLflow has them, its cost, and where its results are."""
    from rich.markup import escape
    from rich.table import Table

    from cluster.connection.ray_connection import submission_metadata
    from trainers.checkpoints.place import newest_checkpoint
    from trainers.cli.progress import format_step_time
    from trainers.run_folder import CHECKPOINTS, TRACKING, display_path, display_place

    metrics = summary.get("metrics", outcome.metrics)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in sorted(metrics, key=lambda name: (not name.startswith("test/"), name)):
        if name.startswith(("test/", "val/", "train/loss")):
            table.add_row(name, f"[bold]{metrics[name]:.4f}[/]")
    if outcome.samples_per_s:
        table.add_row("samples/s", f"{outcome.samples_per_s:,.0f}")
        table.add_row("step", format_step_time(metrics))
    table.add_row("wall time", f"{wall_s:.0f} s")
    if "forecast" in summary:
        table.add_row("forecast", summary["forecast"])
    for name, text in summary.get("account", {}).items():
        table.add_row(name, text)
    table.add_row("checkpoint", display_place(newest_checkpoint(run.folder / CHECKPOINTS)))
    if "unsent" in summary:
        kept = f"{summary['unsent']}; kept in {run.folder / TRACKING}"
        table.add_row("tracking", f"[yellow]{escape(kept)}[/]")
    else:
        table.add_row("model", summary["model_uri"] or "none")
        table.add_row("MLflow run", f"{summary['run_id']} (heliostat ui)")
    if "notice" in summary:
        table.add_row("tracking", f"[yellow]{escape(summary['notice'])}[/]")
    console.print(table)
    if not outcome.complete:
        reason = summary.get("reason")
        more = f" --set {reason.partition(' ')[0]}=MORE" if reason and "reached" in reason else ""
        console.print(
            f"{f'{reason}; ' if reason else ''}stopped after step {outcome.step} of "
            f"{outcome.total_steps}, saved; resume with\n  heliostat "
            f"{'submit ' if submission_metadata() else ''}train "
            f"--resume {display_path(run.folder)}{more}",
            highlight=False,
        )
