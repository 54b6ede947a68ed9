"""The verb `plan`: forecasts of a run's time and cost, from probes."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.options import Subparsers, run_options
from trainers.cli.options import SPEC_HELP, as_job, parse_duration_s

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from trainers.planning.forecast import ForecastHistory, Interval
    from trainers.planning.plan import Option, Plan, PlanRequest
    from trainers.planning.pools import ProbedPool
    from trainers.probes.probe import ProbeTarget
    from trainers.spec import RunSpec


def add_verbs(verbs: Subparsers) -> None:
    plan = verbs.add_parser(
        "plan",
        parents=[run_options(named=False)],
        help="forecast the time and cost of a run, here and on other machines",
        description="Probe SPEC for seconds on the machines at hand, and print what the whole run "
        "would take there and on machines of the catalogue: time, dollars, energy, carbon.",
    )
    plan.add_argument("spec", help=SPEC_HELP)
    plan.add_argument(
        "--on",
        metavar="CONDITIONS",
        help='machines of the catalogue to forecast for, e.g. "provider=aws accelerator=T4 usd<5"',
    )
    plan.add_argument(
        "--deadline",
        type=parse_duration_s,
        metavar="TIME",
        help="leave out options that may take longer, e.g. 2h",
    )
    plan.add_argument(
        "--budget", type=float, metavar="USD", help="leave out options that may cost more dollars"
    )
    add_seconds_option(plan)
    plan.set_defaults(command=plan_command, plan=as_job, session_modules=())


def add_seconds_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="seconds of steps, for each number of workers and batch (default 4)",
    )


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
    from trainers.runs.session import folder_session

    own = read_user_prices()
    machines = select_machines(args.on, apply_user_prices(own, instances())) if args.on else []
    asked = read_probe_request(args)
    history = ForecastHistory(asked.storage)
    request = replace(asked.plan_request, calibration=calibrate(history.scores()), user_prices=own)
    if machines:  # at today's prices, where there are any
        known, problem = with_live_prices(machines)
        request = replace(request, instances=known)
        machines = select_machines(args.on, apply_user_prices(own, known))
        if problem:
            print(f"prices of the bundled snapshot: {problem}")
    spec_data = asked.target.spec_data
    folder = create_run_folder(asked.storage, unique_name(f"plan-{asked.stem}"), spec_data, "plan")
    with folder_session(folder, asked.spec, args.address, args.verbose) as (console, _):
        probed = _probe_pools(asked, console)
        made = plan(probed, machines, request, args.deadline, args.budget)
        recorded = [asdict(probe) for pool in probed for probe in pool.probes]
        write_atomic(folder / "probes.json", json.dumps(recorded, indent=1))
        _record_forecasts(history, spec_data, probed, request)
        _show_plan(console, made)
        console.print(f"probes: {display_path(folder / 'probes.json')}", style="dim")
    return 0


@dataclass(frozen=True)
class ProbeRequest:
    """The run that `plan` or `scaling` probes."""

    stem: str
    """The spec's short name."""
    spec: "RunSpec"
    storage: Path
    target: "ProbeTarget"
    plan_request: "PlanRequest"


def read_probe_request(args: argparse.Namespace) -> ProbeRequest:
    """Read the spec and prepare its data set."""
    from cluster.base.config import apply_overrides
    from cluster.base.errors import SpecError
    from trainers.data.dataset import prepare_dataset
    from trainers.data.splits import count_samples
    from trainers.planning.forecast import run_length
    from trainers.planning.plan import PlanRequest
    from trainers.probes.probe import ProbeTarget
    from trainers.runs.run import resolved_data
    from trainers.spec import RunSpec, find_spec, resolve

    if not 0 < args.seconds < float("inf"):
        raise SpecError(f"--seconds: must be greater than 0 (got {args.seconds:g})")
    stem, data = find_spec(args.spec)
    spec, _ = resolve(apply_overrides(data, args.set), RunSpec)
    data = resolved_data(spec)
    spec, workload = resolve(data, RunSpec)
    storage = Path(spec.storage)
    dataset = prepare_dataset(workload, storage, spec.datasets)
    length = run_length(spec, count_samples(dataset, "train"), count_samples(dataset, "test") > 0)
    target = ProbeTarget(data, dataset, args.seconds)
    return ProbeRequest(stem, spec, storage, target, PlanRequest(length, cost=spec.cost))


def _probe_pools(asked: ProbeRequest, console: "Console") -> "list[ProbedPool]":
    import ray

    from cluster.base.errors import SpecError
    from trainers.planning.pools import find_pools
    from trainers.probes.probe import probe_pool

    found = find_pools(ray.nodes(), asked.spec)
    if not found:
        raise SpecError(
            f"scale.accelerator: no node has {asked.spec.scale.accelerator} and "
            f"{asked.spec.scale.cpus_per_worker:g} CPUs for a worker"
        )
    console.print(
        f"probing on {', '.join(pool.accelerator for pool in found)}: some seconds for "
        "each number of workers"
    )
    return [
        probe_pool(asked.target, pool, lambda line: console.print(f"  {line}", style="dim"))
        for pool in found
    ]


def _record_forecasts(
    history: "ForecastHistory",
    spec_data: "Mapping[str, Any]",
    probed: "Sequence[ProbedPool]",
    request: "PlanRequest",
) -> None:
    """Record the forecast for each number of workers, for runs that may follow."""
    from cluster.base.config import with_value
    from trainers.planning.forecast import Forecast, forecast, forecast_key

    accelerated = [pool for pool in probed if not pool.pool.on_cpus]
    for pool in probed:
        names = {pool.pool.accelerator} | ({"gpu"} if accelerated == [pool] else set())
        for workers in pool.pool.worker_counts(pool.batch):
            found = forecast(pool, workers, request.length, request.calibration)
            if isinstance(found, Forecast):
                of_run = with_value(spec_data, "scale.workers", workers)
                for name in names:
                    history.record_forecast(forecast_key(of_run, name), found)


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
    """An option as a row of the table."""
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
            *(format_interval(amount) for amount in (cost.usd, cost.kwh, cost.kg_co2e)),
            option.forecast.basis,
        ]
    return [where, str(option.workers), str(option.nodes), *cells, ", ".join(option.marks)]


def format_interval(interval: "Interval | None") -> str:
    if interval is None:
        return "unknown"
    return f"{interval.middle:.2g} ({interval.low:.2g} to {interval.high:.2g})"
