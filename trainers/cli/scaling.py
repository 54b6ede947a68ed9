"""The verb `scaling`: a scaling study as a table, a plot and an MLflow run."""

import argparse
from typing import TYPE_CHECKING

from cluster.cli.options import Subparsers, run_options
from trainers.cli.options import SPEC_HELP, as_job, parse_counts
from trainers.cli.plan import add_seconds_option, format_interval, read_probe_request

if TYPE_CHECKING:
    from rich.console import Console

    from trainers.probes.scaling_study import Study


def add_verbs(verbs: Subparsers) -> None:
    scaling = verbs.add_parser(
        "scaling",
        parents=[run_options()],
        help="measure the speedup of more workers",
        description="Measure SPEC on several numbers of workers, with the same global batch "
        "(strong scaling) and with one that grows (weak): a table, a plot, a run in MLflow.",
    )
    scaling.add_argument("spec", help=SPEC_HELP)
    scaling.add_argument(
        "--workers", type=parse_counts, required=True, metavar="N,N,...", help="such as 1,2,4,8"
    )
    add_seconds_option(scaling)
    scaling.set_defaults(command=scaling_command, plan=as_job, session_modules=())


def scaling_command(args: argparse.Namespace) -> int:
    from cluster.cost.user_prices import read_user_prices
    from trainers.probes import scaling_study
    from trainers.run_folder import display_path, require_kind, unique_name
    from trainers.runs.run import claim_folder, find_started
    from trainers.runs.session import folder_session
    from trainers.tracking.mlflow_run import end_tracking, start_tracking

    own = read_user_prices()
    asked = read_probe_request(args)
    spec_data = asked.target.spec_data
    name = args.name or unique_name(f"scaling-{asked.stem}")
    if storage := find_started(args):
        folder = storage / name
        require_kind(folder, "scaling")
    else:
        folder = claim_folder(asked.storage, name, spec_data, "scaling")
    with folder_session(folder, asked.spec, args.address, args.verbose) as (console, _):
        pool = scaling_study.pool_for(asked.spec, args.workers)
        tracker = start_tracking(folder, asked.spec, spec_data, "scaling")
        try:
            probed = scaling_study.measure(asked.target, pool, args.workers, console.print)
            study = scaling_study.analyze(probed, own, asked.spec.cost)
            plot = scaling_study.plot(study, folder / "scaling.png")
            scaling_study.log_to_mlflow(study, tracker, folder.name, plot)
        except BaseException:
            tracker.finish.remote(folder.name, "FAILED")
            end_tracking(tracker, folder.name)
            raise
        tracker.finish.remote(folder.name, "FINISHED")
        tracked = end_tracking(tracker, folder.name)
        _show_study(console, study)
        console.print(f"plot: {display_path(plot)}")
        console.print(tracked.get("unsent") or f"MLflow run: {tracked['run_id']} (heliostat ui)")
        if "notice" in tracked:
            console.print(tracked["notice"], style="yellow", markup=False)
    return 0


def _show_study(console: "Console", study: "Study") -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    columns = ("workers", "nodes", "scaling", "batch", "samples/s", "fitted", "efficiency")
    for column in (*columns, "communication", "$ per million", "J per sample"):
        table.add_column(column, justify="right")
    for row in study.rows:
        table.add_row(
            str(row.workers),
            str(row.nodes),
            row.mode,
            str(row.batch),
            f"{row.samples_per_s:,.0f}",
            f"{row.fitted_samples_per_s:,.0f}",
            f"{row.efficiency:.0%}",
            f"{row.communication:.1%}" if row.communication is not None else "unknown",
            f"{row.usd_per_million:.3g}" if row.usd_per_million is not None else "unknown",
            format_interval(row.joules_per_sample),
        )
    console.print(table)
    for note in study.notes:
        console.print(note, highlight=False)
