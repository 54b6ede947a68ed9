"""The verbs `sweep`, `report` and `schema`."""

import argparse
from typing import TYPE_CHECKING

from cluster.cli.options import Subparsers, run_options

if TYPE_CHECKING:
    from cluster.jobs.job import Submission

SWEEP_MODULES = (
    "tuning.sweep",
    "tuning.progress",
    "tuning.cli.sweep_results",
    "tuning.fused.tune_adapter",
)
"""What a sweep imports beyond what a run does."""
REPORT_FOLDER = "report"
"""Name in the folder of a sweep or run, and among its artifacts in MLflow."""


def add_verbs(verbs: Subparsers) -> None:
    sweep = verbs.add_parser(
        "sweep",
        parents=[run_options()],
        help="train many variants and find the best",
        description="Run the trials of SPEC's section `sweep` with Ray Tune, tracked in MLflow.",
    )
    sweep.add_argument("spec", nargs="?", help="a file or a shipped spec's name")
    sweep.add_argument(
        "--resume",
        metavar="SWEEP",
        help="continue a sweep; trials that failed run again, and with --set sweep.trials=N it "
        "gets more trials",
    )
    sweep.add_argument(
        "--like",
        metavar="SWEEP|RUN",
        help="first try the values of that run, or of the best trials of that sweep",
    )
    sweep.add_argument(
        "--verify-fusion",
        action="store_true",
        help="train three fused trials once more, each alone, and print the largest deviation",
    )
    sweep.set_defaults(
        command=sweep_command, plan=plan_sweep_submission, session_modules=SWEEP_MODULES
    )
    report = verbs.add_parser(
        "report",
        help="write the HTML report of a sweep or run, or compare sweeps",
        description="Write an HTML page on a sweep or run that needs no network or server, with "
        "its charts as PNG files, and log both to MLflow. Several sweeps are compared in one page.",
    )
    report.add_argument("name", metavar="SWEEP|RUN", help="its name, or its folder")
    report.add_argument("others", metavar="SWEEP", nargs="*", help="sweeps to compare it with")
    report.set_defaults(command=report_command)
    schema = verbs.add_parser(
        "schema",
        help="print the JSON schema of a spec file",
        description="Print the JSON schema of spec files, with which an editor completes them.",
    )
    schema.add_argument(
        "workload", nargs="?", help="include the fields of this workload's data and model"
    )
    schema.set_defaults(command=schema_command)


def plan_sweep_submission(args: argparse.Namespace, command: tuple[str, ...]) -> "Submission":
    from trainers.cli.submission import plan_submission
    from tuning.spaces.space import read_sweep_spec

    return plan_submission(args, command, read_sweep_spec)


def sweep_command(args: argparse.Namespace) -> int:
    from cluster.base.errors import SpecError
    from trainers.runs import run, session
    from trainers.spec import resolve
    from tuning import sweep as sweeps
    from tuning.cli.sweep_results import print_results
    from tuning.progress import SweepProgress
    from tuning.search.samplers import search_words
    from tuning.spaces.rungs import early_stopping_text
    from tuning.spaces.searches import EXHAUSTIVE
    from tuning.spaces.space import SweepRunSpec
    from tuning.trial_resources import sweep_shortage
    from tuning.trials.leaderboard import has_ended
    from tuning.tuner import epochs_per_trial

    if args.or_resume and not args.name:
        raise SpecError("--or-resume: needs --name, the name of the sweep to continue")
    if args.like and args.resume:
        raise SpecError("--like: the trials of a sweep that has begun are chosen already")
    if storage := run.find_started(args):
        sweep = sweeps.resumed_sweep(args.name, storage, [])
    elif args.resume:
        sweep = sweeps.resumed_sweep(args.resume, run.storage_for_spec(args.spec), args.set)
    elif args.spec:
        sweep = sweeps.new_sweep(args.spec, args.set, args.name, args.like)
    else:
        raise SpecError("sweep: needs a spec, or --resume SWEEP")
    spec, _ = resolve(sweep.spec_data, SweepRunSpec)
    with session.run_session(
        sweep.folder, spec, args.address, args.verbose, lambda: sweep_shortage(spec)
    ) as (console, _):
        count = f"{spec.sweep.total_trials} trials"
        if spec.sweep.search not in EXHAUSTIVE and spec.sweep.total_trials < spec.sweep.trials:
            count += f" (all combinations; sweep.trials is {spec.sweep.trials})"
        console.print(
            f"[bold]{sweep.key}[/]: {spec.workload}, {count} by "
            f"{search_words(spec.sweep)} and {spec.sweep.scheduler.name}"
        )
        every = spec.train.evaluate_every_epochs
        compared = early_stopping_text(spec.sweep, epochs_per_trial(sweep, spec), every)
        if compared:
            console.print(compared, highlight=False)
        with SweepProgress(console, sweep) as progress:
            board, tracked = sweeps.run_to_end(sweep, progress.on_trial_event, console.print)
        print_results(console, sweep, board, tracked)
        if args.verify_fusion:
            for line in sweeps.verify_fused_trials(sweep, board):
                console.print(line)
    if "failure" in tracked:
        return 1
    return 0 if has_ended(sweep, board) else 130


def report_command(args: argparse.Namespace) -> int:
    from cluster.base.errors import HeliostatError
    from trainers.cli.track import tracked_folder, upload_artifacts
    from trainers.reports.page import write_report
    from trainers.reports.run_report import run_page
    from trainers.run_folder import display_path, folder_kind
    from tuning.reports.comparison import comparison_page
    from tuning.reports.sweep_report import sweep_page

    folder, name = tracked_folder(args.name), REPORT_FOLDER
    if args.others:
        others = [tracked_folder(other) for other in args.others]
        page = comparison_page([folder, *others])
        name = "-".join([f"{REPORT_FOLDER}-with", *(other.name for other in others)])
    else:
        page = sweep_page(folder) if folder_kind(folder) == "sweep" else run_page(folder)
    path = write_report(page, folder / name)
    size_mb = path.stat().st_size / 1e6
    print(f"{display_path(path)}: {size_mb:.1f} MB, and {len(page.charts)} PNG files")
    try:
        print(f"MLflow run: {upload_artifacts(folder, name)} (heliostat ui)")
    except HeliostatError as error:
        print(f"not in MLflow: {error}")
    return 0


def schema_command(args: argparse.Namespace) -> int:
    import json

    from trainers.workload import load_workload
    from tuning.spaces.space import file_schema

    workload = load_workload(args.workload) if args.workload else None
    print(json.dumps(file_schema(workload), indent=2))
    return 0
