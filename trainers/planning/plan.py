"""Where a run belongs: what it would take and cost on each of the places that there are.

Everything here is reckoned from probes that are handed in, so that a plan can be made again from
recorded ones, and tested without the hardware.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from cluster.base.labels import MARKET
from cluster.cost.catalog import Instance
from cluster.cost.node_rates import CostSpec
from cluster.cost.user_prices import UserPrices
from trainers.planning import datasheet
from trainers.planning.forecast import (
    AS_SHIPPED,
    Calibration,
    Forecast,
    Interval,
    RunLength,
    forecast,
    from_probe,
)
from trainers.planning.machines import (
    Machine,
    RunCost,
    device_of_instance,
    local_machine,
    rented_machine,
    run_cost,
)
from trainers.planning.pools import ProbedPool
from trainers.planning.step_time import Unknown, knee

LAUNCH_BOUND_MFU = 0.1
"""MFU below which a device is idle between one operation and the next."""
DATA_BOUND_SHARE = 0.5
"""Share of a step spent waiting for data, above which nothing but that matters."""
FIXED_COST_BOUND_SHARE = 0.8
"""Half the batch in more than this of the time: what a step does one after the other decides."""


@dataclass(frozen=True)
class PlanRequest:
    """What is asked: the run, and how much is known about its forecasts."""

    length: RunLength
    calibration: Calibration = AS_SHIPPED
    """By earlier runs."""
    user_prices: UserPrices = field(default_factory=UserPrices)
    cost: CostSpec = field(default_factory=CostSpec)
    instances: tuple[Instance, ...] | None = None
    """The catalogue's machines at today's prices; None for the snapshot's."""


@dataclass(frozen=True)
class Option:
    """One way to do the run."""

    where: str
    """`here`, or the machine's name in the catalogue."""
    accelerator: str
    workers: int
    nodes: int
    market: str
    """on demand, spot, or nothing where there is no market."""
    forecast: Forecast | Unknown
    machine: Machine
    cost: RunCost | None
    """None where the time is not known."""
    marks: tuple[str, ...] = ()

    @property
    def usd(self) -> Interval | None:
        return self.cost.usd if self.cost else None

    @property
    def wall_s(self) -> Interval | None:
        return self.forecast.wall_s if isinstance(self.forecast, Forecast) else None

    @property
    def kg_co2e(self) -> Interval | None:
        return self.cost.kg_co2e if self.cost else None


def local_options(probed: ProbedPool, question: PlanRequest, most: int = 8) -> list[Option]:
    """The numbers of workers of a pool that is there: those probed, and `most` in all."""
    counts = probed.pool.worker_counts(probed.batch)
    probed_counts = {each.place.workers for each in probed.probes}
    doubled = {count for count in counts if count & (count - 1) == 0 or count == counts[-1]}
    others = sorted(doubled - probed_counts)[: max(0, most - len(probed_counts))]
    chosen = sorted(probed_counts.union(others))
    options = []
    for workers in chosen:
        nodes = probed.pool.nodes_for(workers)
        if nodes is not None:
            machine = local_machine(
                probed, -(-workers // nodes), question.user_prices, question.cost
            )
            found = forecast(probed, workers, question.length, question.calibration)
            market = probed.pool.labels.get(MARKET, "")
            kind = probed.pool.accelerator
            option = Option("here", kind, workers, nodes, market, found, machine, None)
            options.append(_with_cost(option))
    return options


def rented_options(
    instances: Iterable[Instance], probed: Sequence[ProbedPool], question: PlanRequest
) -> list[Option]:
    """One and two machines of each kind, on demand and, where it has a price, on spot."""
    options = []
    for instance in instances:
        for nodes in (1, 2):
            workers = nodes * max(1, instance.accelerators)
            if any(pool.batch % workers for pool in probed):
                continue
            found = _rented_forecast(instance, workers, nodes, probed, question)
            markets = [False, True] if instance.spot_usd_per_h is not None else [False]
            for spot in markets:
                machine = rented_machine(instance, spot, question.user_prices, question.instances)
                name = "spot" if spot else "on demand"
                kind = instance.accelerator or "cpu"
                option = Option(instance.key, kind, workers, nodes, name, found, machine, None)
                options.append(_with_cost(option))
            if isinstance(found, Unknown):
                break  # two machines are no better known than one
    return options


def _with_cost(option: Option) -> Option:
    if not isinstance(option.forecast, Forecast):
        return option
    return replace(option, cost=run_cost(option.machine, option.nodes, option.forecast.wall_s))


def _rented_forecast(
    instance: Instance,
    workers: int,
    nodes: int,
    probed: Sequence[ProbedPool],
    question: PlanRequest,
) -> Forecast | Unknown:
    """By the probes of the same device, where there are any, else from data sheets."""
    if not instance.accelerators:
        return Unknown("another processor than the one that was probed")
    device = device_of_instance(instance)
    if device is None:
        return Unknown(f"the catalogue has not one {instance.accelerator}")
    for pool in probed:
        if pool.single_worker.device == device.name:
            slots = (instance.accelerators,) * nodes
            there = replace(pool, pool=replace(pool.pool, slots=slots))
            return forecast(there, workers, question.length, question.calibration)
    step_s = datasheet.datasheet_step_s(probed[0], device.peak_flop_per_s, workers, nodes)
    if isinstance(step_s, Unknown):
        return step_s
    lone = probed[0].single_worker  # evaluations are as much faster there as steps are
    faster = min(1.0, step_s.middle / lone.step_s)
    seen = replace(lone, evaluation_s=lone.evaluation_s * faster, test_s=lone.test_s * faster)
    return from_probe(step_s, seen, question.length, "data sheet", AS_SHIPPED)


@dataclass(frozen=True)
class Plan:
    """The options in the order of their time, and what is to be said about them."""

    options: tuple[Option, ...]
    notes: tuple[str, ...]
    left_out: int
    """Options that may take longer, or cost more, than what was asked for."""


def plan(
    probed: Sequence[ProbedPool],
    instances: Iterable[Instance],
    question: PlanRequest,
    deadline_s: float | None = None,
    budget_usd: float | None = None,
) -> Plan:
    """All options with their marks. With a limit, those whose whole interval is below it."""
    every = [option for pool in probed for option in local_options(pool, question)]
    every += rented_options(instances, probed, question)
    kept = [
        option
        for option in every
        if _is_within(option.wall_s, deadline_s) and _is_within(option.usd, budget_usd)
    ]
    kept.sort(key=lambda option: option.wall_s.middle if option.wall_s else float("inf"))
    notes = [scaling_advice(pool) for pool in probed]
    notes += cpu_advice(probed)
    notes += _provenance(kept)
    return Plan(_with_marks(kept, probed), tuple(notes), len(every) - len(kept))


def _is_within(found: Interval | None, limit: float | None) -> bool:
    return limit is None or (found is not None and found.high <= limit)


def _with_marks(options: list[Option], probed: Sequence[ProbedPool]) -> tuple[Option, ...]:
    measures: dict[str, Callable[[Option], Interval | None]] = {
        "cheapest": lambda option: option.usd,
        "fastest": lambda option: option.wall_s,
        "greenest": lambda option: option.kg_co2e,
    }
    marks: dict[int, list[str]] = {}
    for name, measure in measures.items():
        known = [(found.middle, i) for i, each in enumerate(options) if (found := measure(each))]
        if known:
            marks.setdefault(min(known)[1], []).append(name)
    knees = {pool.pool.accelerator: knee_of(pool) for pool in probed}
    for i, option in enumerate(options):
        if option.where == "here" and knees[option.accelerator] == option.workers:
            marks.setdefault(i, []).append("knee")
    return tuple(replace(option, marks=tuple(marks.get(i, ()))) for i, option in enumerate(options))


def knee_of(probed: ProbedPool) -> int:
    """The number of workers of the pool after which another one does not pay."""
    speeds = {}
    for workers in probed.pool.worker_counts(probed.batch):
        found = probed.predict(workers)
        if not isinstance(found, Unknown):
            speeds[workers] = probed.batch / found.step_s
    return knee(speeds)


def scaling_advice(probed: ProbedPool) -> str:
    """Up to how many workers another one pays, in a line."""
    best, pool = knee_of(probed), probed.pool
    if pool.total == 1:
        return f"{pool.accelerator}: there is room for one worker"
    if best == pool.total:
        return f"{pool.accelerator}: every worker pays, up to the {best} that there are"
    return f"{pool.accelerator}: past {best} worker{'s' * (best > 1)} another one does not pay"


def cpu_advice(probed: Sequence[ProbedPool]) -> list[str]:
    """That the CPUs are the better place, and why, where one was probed against an accelerator."""
    cpus = [each for each in probed if each.pool.on_cpus]
    lines = []
    for pool in probed:
        if pool.pool.on_cpus or not cpus:
            continue
        own = [each for each in cpus[0].probes if each.batch == cpus[0].batch]
        best = max(own, key=lambda each: each.samples_per_s)
        kind, speed = pool.pool.accelerator, pool.single_worker.samples_per_s
        if speed < best.samples_per_s:
            lines.append(
                f"the CPU is the better place: {best.samples_per_s:,.0f} samples/s against "
                f"{speed:,.0f} on one {kind}; {bottleneck(pool, cpus[0])}"
            )
    return lines


def bottleneck(pool: ProbedPool, cpus: ProbedPool) -> str:
    """What keeps an accelerator from being of use, as far as the probes show it."""
    lone = pool.single_worker
    waiting = lone.shares.get("data", 0.0)
    if waiting > DATA_BOUND_SHARE:
        return f"transfer-bound: {waiting:.0%} of its steps are waiting for data"
    whatever, on_cpu = _fixed_cost_share(pool), _fixed_cost_share(cpus)
    if whatever is not None and whatever > FIXED_COST_BOUND_SHARE:
        if on_cpu is not None and on_cpu > FIXED_COST_BOUND_SHARE:
            return (
                f"sequential: half the batch takes {whatever:.0%} of the time there and "
                f"{on_cpu:.0%} on the CPU, so what a step does one after the other decides"
            )
        return (
            f"launch-bound: half the batch takes {whatever:.0%} of the time, so starting "
            "operations takes longer than computing them"
        )
    if lone.mfu is not None and lone.mfu < LAUNCH_BOUND_MFU:
        return f"launch-bound: the device computes at {lone.mfu:.1%} of its peak"
    return "the probes do not show why"


def _fixed_cost_share(probed: ProbedPool) -> float | None:
    """Time of a step over half the batch, as a share of one over all of it, on one worker."""
    lone = probed.single_worker
    half = [p for p in probed.probes if p.place.workers == 1 and 2 * p.batch == lone.batch]
    return half[0].step_s / lone.step_s if half else None


def _provenance(options: Sequence[Option]) -> list[str]:
    """Where the prices and the carbon are from, each once; and what the energy is that of."""
    known = [option for option in options if option.cost]
    lines = list(dict.fromkeys(option.machine.rate.price_source for option in known))
    lines += list(dict.fromkeys(option.machine.rate.carbon_source for option in known))
    covered = {option.machine.covers for option in known if option.cost and option.cost.kwh}
    if covered:
        lines.append(f"kWh are estimates by design power, of: {', '.join(sorted(covered))}")
    if any(option.market == "spot" for option in known):
        lines.append("spot: without the work that a reclaimed machine takes with it")
    return lines
