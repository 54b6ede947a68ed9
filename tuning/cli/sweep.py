"""The verbs of sweeps, and the parser that composes the verbs of all packages."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.cli.options import Subparsers, run_options

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.jobs.job import Submission
    from tuning.trials.leaderboard import Leaderboard
    from tuning.trials.trial import Sweep


REPORT_FOLDER = "report"
"""In the folder of a sweep or run, and among its artifacts in MLflow."""


def build_parser() -> argparse.ArgumentParser:
    import cluster.cli.files
    import cluster.cli.jobs
    import cluster.cli.lifecycle
    import trainers.cli.train

    top = argparse.ArgumentParser(
        prog="heliostat",
        description="Train PyTorch models on Ray clusters and sweep their hyperparameters, "
        "tracked in MLflow.",
    )
    top.add_argument("--version", action="version", version="heliostat 0.1.0")
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    trainers.cli.train.add_verbs(verbs)
    add_verbs(verbs)
    cluster.cli.files.add_verbs(verbs)
    cluster.cli.jobs.add_verbs(verbs)
    cluster.cli.lifecycle.add_verbs(verbs)
    return top


def add_verbs(verbs: Subparsers) -> None:
    sweep = verbs.add_parser(
        "sweep",
        parents=[run_options()],
        help="train many variants and find the best",
        description="Run the trials of SPEC's section `sweep` with Ray Tune, tracked in MLflow.",
    )
    sweep.add_argument("spec", nargs="?", help="a file or a shipped spec's name")
    sweep.add_argument("--resume", metavar="SWEEP", help="go on with a sweep that was interrupted")
    sweep.add_argument(
        "--verify-fusion",
        action="store_true",
        help="train three of the fused trials alone as well, and print the largest deviation",
    )
    sweep.set_defaults(command=sweep_command, plan=plan_sweep_submission)
    report = verbs.add_parser(
        "report",
        help="a sweep or run as a page for people",
        description="Write a page on a sweep or run that opens without a network, with its charts "
        "as PNG files, and keep both with MLflow. Needs no server.",
    )
    report.add_argument("name", metavar="SWEEP|RUN", help="its name, or its folder")
    report.set_defaults(command=report_command)
    schema = verbs.add_parser(
        "schema",
        help="print the JSON schema of a spec file",
        description="Print the JSON schema of spec files, from which an editor completes them.",
    )
    schema.add_argument(
        "workload", nargs="?", help="with the fields of this workload's data and model"
    )
    schema.set_defaults(command=schema_command)


def plan_sweep_submission(args: argparse.Namespace, words: tuple[str, ...]) -> "Submission":
    from trainers.cli.submission import plan_submission
    from tuning.trials.space import read_sweep_spec

    return plan_submission(args, words, read_sweep_spec)


def sweep_command(args: argparse.Namespace) -> int:
    from cluster.base.errors import SpecError
    from trainers.runs import run, session
    from trainers.spec import resolve
    from tuning import sweep as sweeps
    from tuning.progress import SweepProgress
    from tuning.trials.space import SweepRunSpec

    if args.or_resume and not args.name:
        raise SpecError("--or-resume: needs --name, to know what to go on with")
    if storage := run.find_started(args):
        sweep = sweeps.resumed_sweep(args.name, storage, [])
    elif args.resume:
        sweep = sweeps.resumed_sweep(args.resume, run.storage_for_spec(args.spec), args.set)
    elif args.spec:
        sweep = sweeps.new_sweep(args.spec, args.set, args.name)
    else:
        raise SpecError("sweep: needs a spec, or --resume SWEEP")
    spec, _ = resolve(sweep.spec_data, SweepRunSpec)
    if args.verify_fusion and spec.sweep.scheduler.name == "pbt":
        raise SpecError("--verify-fusion: trials of pbt go on from one another, none is alone")
    with session.run_session(sweep.folder, spec, args.address, args.verbose) as (console, _):
        console.print(
            f"[bold]{sweep.key}[/]: {spec.workload}, {spec.sweep.total_trials} trials by "
            f"{spec.sweep.search} and {spec.sweep.scheduler.name}"
        )
        with SweepProgress(console, sweep) as progress:
            board, tracked = sweeps.run_to_end(sweep, progress.on_trial_event, console.print)
        _print_results(console, sweep, board, tracked)
        if args.verify_fusion:
            for line in sweeps.verify_fused_trials(sweep, board):
                console.print(line)
    return 0 if len(board.ended) == spec.sweep.total_trials else 130


def _print_results(
    console: "Console", sweep: "Sweep", board: "Leaderboard", tracked: "Mapping[str, Any]"
) -> None:
    """The end of a sweep: who won, what mattered, and how to go on."""
    from rich.table import Table

    from cluster.connection.ray_connection import submission_metadata
    from trainers.checkpoints.checkpoints import Checkpoints
    from trainers.run_folder import CHECKPOINTS, TRACKING, display_path

    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    others = [objective.partition(" ")[0] for objective in sweep.spec.objective[1:]]
    for column in ("trial", sweep.spec.metric, *others, "epochs", "", *sweep.spec.parameters):
        table.add_column(column, justify="right", overflow="fold")
    for standing in board.results[:10]:
        values = [_format_cell(standing.parameters[path]) for path in sweep.spec.parameters]
        figures = [_format_cell(standing.objectives.get(name, "unknown")) for name in others]
        scores = (f"{standing.value:.4f}", *figures, f"{standing.epoch:.1f}")
        ended = "" if standing.complete else "stopped"
        table.add_row(f"{standing.number:04d}", *scores, ended, *values)
    console.print(table)
    for number, reason in board.failed.items():
        console.print(f"trial {number:04d} failed: {reason}", style="red")
    if sweep.spec.objective[1:]:
        front = ", ".join(f"{number:04d}" for number in board.pareto_trials)
        named = ", ".join(sweep.spec.objective)
        console.print(f"Pareto front of {named}: {front or 'unknown'}", highlight=False)
    if board.importances:
        shares = "  ".join(f"{path} {share:.2f}" for path, share in board.importances.items())
        console.print(f"importance: {shares}")
    if "unsent" in tracked:
        console.print(f"{tracked['unsent']}; kept in {sweep.folder / TRACKING}", style="yellow")
    else:
        console.print(f"MLflow run: {tracked['run_id']} (heliostat ui)")
    for name, text in tracked.get("account", {}).items():
        console.print(f"{name}: {text}", highlight=False)
    folder = display_path(sweep.folder)
    ended_by = tracked.get("reason")
    if len(board.ended) < sweep.spec.total_trials:
        limit = (ended_by or "").partition(" ")[0].rstrip(":")
        more = f" --set {limit}=MORE" if limit else ""
        console.print(
            f"{f'{ended_by}; ' if ended_by else ''}stopped with {len(board.ended)} of "
            f"{sweep.spec.total_trials} trials ended; go on with\n  heliostat "
            f"{'submit ' if submission_metadata() else ''}sweep --resume {folder}{more}",
            highlight=False,
        )
    if board.best is not None:
        trial = display_path(sweep.trial_folder(board.best.number))
        newest = Checkpoints(sweep.trial_folder(board.best.number) / CHECKPOINTS).latest()
        console.print(
            f"best checkpoint: {display_path(newest) if newest else 'none'}\n"
            f"train it afresh: heliostat train {folder}/best.yaml\n"
            f"train it further: heliostat train {folder}/best.yaml --from {trial} "
            "--set train.epochs=N"
        )


def _format_cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report_command(args: argparse.Namespace) -> int:
    from cluster.base.config import read_yaml
    from cluster.base.errors import HeliostatError
    from trainers.cli.track import tracked_folder, upload_artifacts
    from trainers.reports.page import write_report
    from trainers.reports.run_report import run_page
    from trainers.run_folder import SPEC, display_path
    from tuning.reports.sweep_report import sweep_page

    folder = tracked_folder(args.name)
    data = read_yaml(folder / SPEC)
    page = sweep_page(folder) if data.get("sweep") else run_page(folder)
    path = write_report(page, folder / REPORT_FOLDER)
    print(
        f"{display_path(path)}: {path.stat().st_size / 1e6:.1f} MB, and {len(page.charts)} PNG files"
    )
    try:
        print(f"MLflow run: {upload_artifacts(folder, REPORT_FOLDER)} (heliostat ui)")
    except HeliostatError as error:
        print(f"not in MLflow: {error}")
    return 0


def schema_command(args: argparse.Namespace) -> int:
    import json

    from trainers.workload import load_workload
    from tuning.trials.space import file_schema

    workload = load_workload(args.workload) if args.workload else None
    print(json.dumps(file_schema(workload), indent=2))
    return 0
