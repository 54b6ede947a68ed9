"""Plans: the time and cost of a run for each number of workers here and on other machines.

A plan is computed from probes that are passed in, so that it can be made again from recorded
probes, and tested without the hardware.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from cluster.base.labels import MARKET
from cluster.cost.catalog import Instance
from cluster.cost.node_rates import CostSpec
from cluster.cost.user_prices import UserPrices
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
    datasheet_step_s,
    device_of_instance,
    local_machine,
    rented_machine,
    run_cost,
)
from trainers.planning.pools import ProbedPool
from trainers.planning.step_time import Unknown, knee

LAUNCH_BOUND_MFU = 0.1
"""MFU below which a device idles between operations."""
DATA_BOUND_SHARE = 0.5
"""Share of a step spent waiting for data, above which data is the bottleneck."""
FIXED_COST_BOUND_SHARE = 0.8
"""If half the batch takes more than this share of the time, the batch is not the bottleneck."""


@dataclass(frozen=True)
class PlanRequest:
    """The run to plan, the calibration of its forecasts, and the prices."""

    length: RunLength
    calibration: Calibration = AS_SHIPPED
    user_prices: UserPrices = field(default_factory=UserPrices)
    cost: CostSpec = field(default_factory=CostSpec)
    instances: tuple[Instance, ...] | None = None
    """Machines of the catalogue at today's prices; None: at those of the snapshot."""


@dataclass(frozen=True)
class Option:
    """One choice of machines for the run."""

    where: str
    """`here`, or the machine's name in the catalogue."""
    accelerator: str
    workers: int
    nodes: int
    market: str
    """on demand, spot, or empty for machines without a market."""
    forecast: Forecast | Unknown
    machine: Machine
    cost: RunCost | None
    """None if the time is unknown."""
    marks: tuple[str, ...] = ()
    """cheapest, fastest, greenest, knee."""

    @property
    def usd(self) -> Interval | None:
        return self.cost.usd if self.cost else None

    @property
    def wall_s(self) -> Interval | None:
        return self.forecast.wall_s if isinstance(self.forecast, Forecast) else None

    @property
    def kg_co2e(self) -> Interval | None:
        return self.cost.kg_co2e if self.cost else None


def local_options(probed: ProbedPool, request: PlanRequest, max_options: int = 8) -> list[Option]:
    """Options on a pool of the cluster: all probed numbers of workers, and powers of two.

    At most `max_options`, unless more were probed.
    """
    counts = probed.pool.worker_counts(probed.batch)
    probed_counts = {each.place.workers for each in probed.probes}
    doubled = {count for count in counts if count & (count - 1) == 0 or count == counts[-1]}
    others = sorted(doubled - probed_counts)[: max(0, max_options - len(probed_counts))]
    options = []
    for workers in sorted(probed_counts.union(others)):
        nodes = probed.pool.nodes_for(workers)
        if nodes is not None:
            machine = local_machine(probed, -(-workers // nodes), request.user_prices, request.cost)
            found = forecast(probed, workers, request.length, request.calibration)
            market = probed.pool.labels.get(MARKET, "")
            kind = probed.pool.accelerator
            option = Option("here", kind, workers, nodes, market, found, machine, None)
            options.append(_with_cost(option))
    return options


def rented_options(
    instances: Iterable[Instance], probed: Sequence[ProbedPool], request: PlanRequest
) -> list[Option]:
    """Options of one and two machines of each type, on demand and, if it has a price, on spot."""
    options = []
    for instance in instances:
        for nodes in (1, 2):
            workers = nodes * max(1, instance.accelerators)
            if any(pool.batch % workers for pool in probed):
                continue
            found = _rented_forecast(instance, workers, nodes, probed, request)
            markets = [False, True] if instance.spot_usd_per_h is not None else [False]
            for spot in markets:
                machine = rented_machine(instance, spot, request.user_prices, request.instances)
                name = "spot" if spot else "on demand"
                kind = instance.accelerator or "cpu"
                option = Option(instance.key, kind, workers, nodes, name, found, machine, None)
                options.append(_with_cost(option))
            if isinstance(found, Unknown):
                break  # if one machine is unknown, so are two
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
    request: PlanRequest,
) -> Forecast | Unknown:
    """From probes of the same device if there are any, otherwise from its data sheet."""
    if not instance.accelerators:
        return Unknown("another processor than the one that was probed")
    device = device_of_instance(instance)
    if device is None:
        return Unknown(f"the catalogue does not say which {instance.accelerator}")
    for pool in probed:
        if pool.single_worker.device == device.name:
            slots = (instance.accelerators,) * nodes
            rented = replace(pool, pool=replace(pool.pool, slots=slots))
            return forecast(rented, workers, request.length, request.calibration)
    step_s = datasheet_step_s(probed[0], device.peak_flop_per_s, workers, nodes)
    if isinstance(step_s, Unknown):
        return step_s
    probe = probed[0].single_worker  # evaluations are assumed to speed up as steps do
    factor = min(1.0, step_s.middle / probe.step_s)
    scaled = replace(probe, evaluation_s=probe.evaluation_s * factor, test_s=probe.test_s * factor)
    return from_probe(step_s, scaled, request.length, "data sheet", AS_SHIPPED)


@dataclass(frozen=True)
class Plan:
    """The options, the fastest first, and notes on them."""

    options: tuple[Option, ...]
    notes: tuple[str, ...]
    left_out: int
    """Number of options that may take longer, or cost more, than the limits."""


def plan(
    probed: Sequence[ProbedPool],
    instances: Iterable[Instance],
    request: PlanRequest,
    deadline_s: float | None = None,
    budget_usd: float | None = None,
) -> Plan:
    """All options with their marks; with a limit, those whose whole interval is below it."""
    options = [option for pool in probed for option in local_options(pool, request)]
    options += rented_options(instances, probed, request)
    kept = [
        option
        for option in options
        if _is_within(option.wall_s, deadline_s) and _is_within(option.usd, budget_usd)
    ]
    kept.sort(key=lambda option: option.wall_s.middle if option.wall_s else float("inf"))
    notes = [scaling_advice(pool) for pool in probed]
    notes += cpu_advice(probed)
    notes += _provenance(kept)
    return Plan(_with_marks(kept, probed), tuple(notes), len(options) - len(kept))


def _is_within(amount: Interval | None, limit: float | None) -> bool:
    return limit is None or (amount is not None and amount.high <= limit)


def _with_marks(options: list[Option], probed: Sequence[ProbedPool]) -> tuple[Option, ...]:
    """The options with the best of each measure marked, and with the knee of each pool."""
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
    """The number of workers of the pool after which another one does not pay; see `knee`."""
    speeds = {}
    for workers in probed.pool.worker_counts(probed.batch):
        found = probed.predict(workers)
        if not isinstance(found, Unknown):
            speeds[workers] = probed.batch / found.step_s
    return knee(speeds)


def scaling_advice(probed: ProbedPool) -> str:
    """One line on the number of workers up to which another one pays."""
    best, pool = knee_of(probed), probed.pool
    if pool.total == 1:
        return f"{pool.accelerator}: there is room for one worker"
    if best == pool.total:
        return f"{pool.accelerator}: every worker pays, up to all {best}"
    return f"{pool.accelerator}: past {best} worker{'s' * (best > 1)} another one does not pay"


def cpu_advice(probed: Sequence[ProbedPool]) -> list[str]:
    """A line for each accelerator that is slower than the CPUs, with its bottleneck."""
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
    """Why an accelerator is slower than the CPUs, as far as the probes show it."""
    single = pool.single_worker
    waiting = single.shares.get("data", 0.0)
    if waiting > DATA_BOUND_SHARE:
        return f"transfer-bound: its steps wait for data {waiting:.0%} of the time"
    fixed, on_cpu = _fixed_cost_share(pool), _fixed_cost_share(cpus)
    if fixed is not None and fixed > FIXED_COST_BOUND_SHARE:
        if on_cpu is not None and on_cpu > FIXED_COST_BOUND_SHARE:
            return (
                f"sequential: half the batch takes {fixed:.0%} of the time there and "
                f"{on_cpu:.0%} on the CPU, so the step is a sequence of small operations"
            )
        return (
            f"launch-bound: half the batch takes {fixed:.0%} of the time, so starting "
            "operations takes longer than computing them"
        )
    if single.mfu is not None and single.mfu < LAUNCH_BOUND_MFU:
        return f"launch-bound: the device computes at {single.mfu:.1%} of its peak"
    return "the probes do not show why"


def _fixed_cost_share(probed: ProbedPool) -> float | None:
    """The step time at half the batch over the one at the whole batch, on one worker."""
    single = probed.single_worker
    half = [p for p in probed.probes if p.place.workers == 1 and 2 * p.batch == single.batch]
    return half[0].step_s / single.step_s if half else None


def _provenance(options: Sequence[Option]) -> list[str]:
    """The sources of prices and carbon intensities, each once, and what the energy includes."""
    known = [option for option in options if option.cost]
    lines = list(dict.fromkeys(option.machine.rate.price_source for option in known))
    lines += list(dict.fromkeys(option.machine.rate.carbon_source for option in known))
    covered = {option.machine.covers for option in known if option.cost and option.cost.kwh}
    if covered:
        lines.append(f"kWh are estimates by design power, of: {', '.join(sorted(covered))}")
    if any(option.market == "spot" for option in known):
        lines.append("spot: the work that is lost with a reclaimed machine is not included")
    return lines
