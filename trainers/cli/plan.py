"""The verbs that look ahead: `plan` and `scaling`."""

import argparse
from typing import TYPE_CHECKING, Any

from cluster.cli.options import Subparsers, run_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from cluster.jobs.job import Submission
    from trainers.planning.forecast import ForecastHistory, Interval
    from trainers.planning.plan import Option, Plan, PlanRequest
    from trainers.planning.pools import ProbedPool
    from trainers.runs.scaling_study import Study

UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def add_verbs(verbs: Subparsers) -> None:
    plan = verbs.add_parser(
        "plan",
        parents=[run_options(named=False)],
        help="forecast what a run takes and costs, and where it belongs",
        description="Probe SPEC for seconds on what is there, and print what the whole run would "
        "take there, and on machines of the catalogue: time, dollars, energy, carbon.",
    )
    plan.add_argument("spec", help="a file, a shipped spec's name, or module:Class")
    plan.add_argument(
        "--on",
        metavar="CONDITIONS",
        help='machines of the catalogue to forecast for, e.g. "provider=aws accelerator=T4 usd<5"',
    )
    plan.add_argument(
        "--deadline",
        type=parse_duration_s,
        metavar="TIME",
        help="leave out what may take longer, e.g. 2h",
    )
    plan.add_argument(
        "--budget", type=float, metavar="USD", help="leave out what may cost more dollars"
    )
    plan.set_defaults(command=plan_command, plan=as_job)
    scaling = verbs.add_parser(
        "scaling",
        parents=[run_options()],
        help="measure what more workers bring",
        description="Measure SPEC on several numbers of workers, with the same global batch "
        "(strong scaling) and with one that grows (weak): a table, a plot, a run in MLflow.",
    )
    scaling.add_argument("spec", help="a file, a shipped spec's name, or module:Class")
    scaling.add_argument(
        "--workers", type=parse_counts, required=True, metavar="N,N,...", help="such as 1,2,4,8"
    )
    scaling.set_defaults(command=scaling_command, plan=as_job)
    for verb in (plan, scaling):
        verb.add_argument(
            "--seconds",
            type=float,
            default=4.0,
            help="of steps, for each number of workers and batch (default 4)",
        )


def as_job(args: argparse.Namespace, words: tuple[str, ...]) -> "Submission":
    """What `submit` sends for a verb with the spec of a run."""
    from trainers.runs.submission import plan_submission

    return plan_submission(args, words)


def parse_duration_s(text: str) -> float:
    """A time such as 90s, 30min, 2h or 1d."""
    unit = text.lstrip("0123456789.")
    try:
        return float(text.removesuffix(unit)) * UNITS_S[unit or "s"]
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(
            f"must be a number of s, min, h or d (got {text!r})"
        ) from None


def parse_counts(text: str) -> list[int]:
    """Numbers of workers such as 1,2,4."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise argparse.ArgumentTypeError(f"must be numbers of workers such as 1,2,4 (got {text!r})")
    return found


def plan_command(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict, replace

    from cluster.base.files import write_atomic
    from cluster.cost.catalog import instances
    from cluster.cost.live_prices import with_live_prices
    from cluster.cost.machine_filters import select_machines
    from cluster.cost.user_prices import apply_user_prices, read_user_prices
    from trainers.planning.forecast import ForecastHistory, calibrate
    from trainers.planning.plan import plan
    from trainers.run_folder import create_run_folder, display_path, unique_name
    from trainers.runs.run import folder_session

    own = read_user_prices()
    machines = select_machines(args.on, apply_user_prices(own, instances())) if args.on else []
    asked = _probe_request(args.spec, args.set, args.seconds)
    memory = ForecastHistory(asked.storage)
    question = replace(asked.plan_request, calibration=calibrate(memory.scores()), user_prices=own)
    if machines:  # what is asked for at today's prices, where there are any
        known, problem = with_live_prices(machines)
        question = replace(question, instances=known)
        machines = select_machines(args.on, apply_user_prices(own, known))
        if problem:
            print(f"prices of the bundled snapshot: {problem}")
    folder = create_run_folder(
        asked.storage, unique_name(f"plan-{asked.stem}"), asked.target.spec_data
    )
    with folder_session(folder, asked.spec, args.address, args.verbose) as (console, _):
        probed = _probe_pools(asked, console)
        made = plan(probed, machines, question, args.deadline, args.budget)
        recorded = [asdict(probe) for pool in probed for probe in pool.probes]
        write_atomic(folder / "probes.json", json.dumps(recorded, indent=1))
        _record_forecasts(memory, asked.target.spec_data, probed, question)
        _show_plan(console, made)
        console.print(f"probes: {display_path(folder / 'probes.json')}", style="dim")
    return 0


class _ProbeRequest:
    """What a verb was asked about: the spec, settled, and its data set."""

    def __init__(self, name: str, overrides: list[str], seconds: float) -> None:
        from pathlib import Path

        from cluster.base.config import apply_overrides
        from trainers.data.dataset import prepare_dataset
        from trainers.data.splits import count_samples
        from trainers.planning.forecast import run_length
        from trainers.planning.plan import PlanRequest
        from trainers.runs.probe import ProbeTarget
        from trainers.runs.run import resolved_data
        from trainers.spec import RunSpec, find_spec, resolve

        self.stem, data = find_spec(name)
        spec, _ = resolve(apply_overrides(data, overrides), RunSpec)
        data = resolved_data(spec)
        self.spec, workload = resolve(data, RunSpec)
        self.storage: Path = Path(self.spec.storage)
        dataset = prepare_dataset(workload, self.storage)
        self.target = ProbeTarget(data, dataset, seconds)
        steps = run_length(
            self.spec, count_samples(dataset, "train"), count_samples(dataset, "test") > 0
        )
        self.plan_request: PlanRequest = PlanRequest(steps, cost=self.spec.cost)


def _probe_request(name: str, overrides: list[str], seconds: float) -> _ProbeRequest:
    from cluster.base.errors import SpecError

    if not 0 < seconds < float("inf"):
        raise SpecError(f"--seconds: must be greater than 0 (got {seconds:g})")
    return _ProbeRequest(name, overrides, seconds)


def _probe_pools(asked: _ProbeRequest, console: "Console") -> "list[ProbedPool]":
    import ray

    from cluster.base.errors import SpecError
    from trainers.planning.pools import find_pools
    from trainers.runs.probe import probe_pool

    there = find_pools(ray.nodes(), asked.spec)
    if not there:
        raise SpecError(
            f"scale.accelerator: no node has {asked.spec.scale.accelerator} and "
            f"{asked.spec.scale.cpus_per_worker:g} CPUs for a worker"
        )
    console.print(
        f"probing on {', '.join(pool.accelerator for pool in there)}: some seconds for "
        "each number of workers"
    )
    return [
        probe_pool(asked.target, pool, lambda line: console.print(f"  {line}", style="dim"))
        for pool in there
    ]


def _record_forecasts(
    memory: "ForecastHistory",
    data: "Mapping[str, Any]",
    probed: "Sequence[ProbedPool]",
    question: "PlanRequest",
) -> None:
    """Keep the forecasts for the runs that may follow."""
    from cluster.base.config import with_value
    from trainers.planning.forecast import Forecast, forecast, forecast_key

    accelerated = [pool for pool in probed if not pool.pool.on_cpus]
    for pool in probed:
        names = {pool.pool.accelerator} | ({"gpu"} if accelerated == [pool] else set())
        for workers in pool.pool.worker_counts(pool.batch):
            found = forecast(pool, workers, question.length, question.calibration)
            if isinstance(found, Forecast):
                on = with_value(data, "scale.workers", workers)
                for name in names:
                    memory.record_forecast(forecast_key(on, name), found)


def _show_plan(console: "Console", made: "Plan") -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("where", "workers", "nodes", "time", "$", "kWh", "kg CO2e", "basis", ""):
        left = column in ("where", "basis", "")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for option in made.options:
        table.add_row(*_cells(option))
    console.print(table)
    if made.left_out:
        console.print(f"left out, since they may go over the limit: {made.left_out}")
    for note in made.notes:
        console.print(note, highlight=False)


def _cells(option: "Option") -> list[str]:
    from trainers.planning.forecast import Forecast, format_duration, format_range

    kind = option.accelerator
    where = f"{option.where} ({kind}{', ' + option.market if option.market else ''})"
    if not isinstance(option.forecast, Forecast):
        cells = ["unknown", "", "", "", option.forecast.reason]
    else:
        wall_s, cost = option.forecast.wall_s, option.cost
        assert cost is not None
        cells = [
            f"{format_duration(wall_s.middle)} ({format_range(wall_s)})",
            *(_format_interval(found) for found in (cost.usd, cost.kwh, cost.kg_co2e)),
            option.forecast.basis,
        ]
    return [where, str(option.workers), str(option.nodes), *cells, ", ".join(option.marks)]


def _format_interval(found: "Interval | None") -> str:
    if found is None:
        return "unknown"
    return f"{found.middle:.2g} ({found.low:.2g} to {found.high:.2g})"


def scaling_command(args: argparse.Namespace) -> int:
    from cluster.cost.user_prices import read_user_prices
    from trainers.run_folder import create_run_folder, display_path, unique_name
    from trainers.runs import scaling_study as studies
    from trainers.runs.run import end_tracking, find_started, folder_session, start_tracking

    own = read_user_prices()
    asked = _probe_request(args.spec, args.set, args.seconds)
    name = args.name or unique_name(f"scaling-{asked.stem}")
    storage = find_started(args)
    folder = (
        storage / name
        if storage
        else create_run_folder(asked.storage, name, asked.target.spec_data)
    )
    with folder_session(folder, asked.spec, args.address, args.verbose) as (console, _):
        pool = studies.pool_for(asked.spec, args.workers)
        tracker = start_tracking(folder, asked.spec, asked.target.spec_data, "scaling")
        try:
            found = studies.measure(asked.target, pool, args.workers, console.print)
            study = studies.analyze(found, own, asked.spec.cost)
            plot = studies.plot(study, folder / "scaling.png")
            studies.log_to_mlflow(study, tracker, folder.name, plot)
            tracker.finish.remote(folder.name, "FINISHED")
        except BaseException:
            tracker.finish.remote(folder.name, "FAILED")
            raise
        finally:
            tracked = end_tracking(tracker, folder.name)
        _show_study(console, study)
        console.print(f"plot: {display_path(plot)}")
        told = tracked.get("unsent") or f"MLflow run: {tracked['run_id']} (heliostat ui)"
        console.print(told)
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
            _format_interval(row.joules_per_sample),
        )
    console.print(table)
    for note in study.notes:
        console.print(note, highlight=False)
