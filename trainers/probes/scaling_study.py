"""A scaling study: strong and weak scaling of a run, measured on the connected cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster.base.errors import SpecError
from cluster.cost.node_rates import CostSpec
from cluster.cost.user_prices import UserPrices
from trainers.planning.forecast import Interval
from trainers.planning.machines import local_machine
from trainers.planning.plan import knee_of, scaling_advice
from trainers.planning.pools import Pool, ProbedPool, ProbeResult, find_pools, probed_pool
from trainers.probes.probe import ProbeTarget, probe
from trainers.spec import RunSpec
from trainers.tracking.operation_log import now_ms

Mode = Literal["strong", "weak"]


@dataclass(frozen=True)
class ScalingRow:
    """The measurement of one number of workers at one global batch."""

    workers: int
    nodes: int
    mode: Mode
    """strong: the spec's global batch; weak: constant batch per worker, that of the smallest
    count."""
    batch: int
    samples_per_s: float
    fitted_samples_per_s: float
    efficiency: float
    """Samples per second and worker, relative to the smallest number of workers."""
    communication: float | None
    """Share of a step; None on accelerators, whose communication the host does not see."""
    usd_per_million: float | None
    """Dollars per million samples; None without a price."""
    joules_per_sample: Interval | None


@dataclass(frozen=True)
class Study:
    """All measurements, and the recommendation that follows from them."""

    rows: tuple[ScalingRow, ...]
    probed: ProbedPool
    recommended: int
    """Number of workers for the spec's global batch."""
    notes: tuple[str, ...]


def pool_for(spec: RunSpec, counts: Sequence[int]) -> Pool:
    """The pool of the connected Ray in which the spec's workers would run.

    Raises SpecError if one of the numbers of workers does not fit there, or does not divide the
    global batch.
    """
    import ray

    found = find_pools(ray.nodes(), spec)
    if not found:
        raise SpecError(f"scale.accelerator: no node has {spec.scale.accelerator}")
    pool = found[-1]  # accelerators come last, and `auto` prefers them
    for count in counts:
        if count > pool.total:
            raise SpecError(
                f"--workers {count}: the cluster has room for {pool.total} on {pool.accelerator}"
            )
        if spec.train.global_batch % count:
            raise SpecError(
                f"--workers {count}: train.global_batch {spec.train.global_batch} cannot be "
                f"shared evenly by {count}"
            )
    return pool


def measure(
    target: ProbeTarget, pool: Pool, counts: Sequence[int], log_line: Callable[[str], None]
) -> ProbedPool:
    """Probe each number of workers at its batches for strong and weak scaling.

    Blocks for seconds each. `counts` are sorted.
    """
    batch = int(target.spec_data["train"]["global_batch"])
    batch_per_worker = batch // counts[0]
    probes: list[ProbeResult] = []
    for workers in counts:
        found = probe(target, pool, workers, sorted({batch, batch_per_worker * workers}))
        probes += found
        speed = found[0].samples_per_s
        log_line(
            f"{workers} x {pool.accelerator}: {speed:,.0f} samples/s at batch {found[0].batch}"
        )
    return probed_pool(pool, probes, batch)


def analyze(found: ProbedPool, own: UserPrices, cost: CostSpec) -> Study:
    """Efficiency and cost of each probe, and the number of workers up to which one more pays."""
    fewest = min(each.place.workers for each in found.probes)
    rows = []
    for each in found.probes:
        modes: list[Mode] = ["strong"] if each.batch == found.batch else ["weak"]
        if each.place.workers == fewest:
            modes = ["strong", "weak"]
        rows += [_row(mode, each, found, own, cost) for mode in modes]
    smallest = {mode: next(r for r in rows if r.mode == mode) for mode in ("strong", "weak")}
    rows = [replace(row, efficiency=row.efficiency / smallest[row.mode].efficiency) for row in rows]
    rows.sort(key=lambda row: (row.mode, row.workers))
    best = knee_of(found)
    machine = local_machine(found, 1, own, cost)
    notes = [
        f"recommended for batch {found.batch}: {best} worker{'s' * (best > 1)}",
        scaling_advice(found),
        machine.rate.price_source,
    ]
    if machine.covers:
        notes.append(f"J are estimates by design power, of: {machine.covers}")
    terms = ", ".join(
        f"{name} {value:.3g} s" for name, value in found.step_time_model.terms.items()
    )
    notes.append(f"fitted: {terms}")
    return Study(tuple(rows), found, best, tuple(notes))


def _row(
    mode: Mode, each: ProbeResult, found: ProbedPool, own: UserPrices, cost: CostSpec
) -> ScalingRow:
    place = each.place
    machine = local_machine(found, -(-place.workers // place.nodes), own, cost)
    usd_per_h, seconds = machine.rate.usd_per_h, place.nodes / each.samples_per_s
    return ScalingRow(
        workers=place.workers,
        nodes=place.nodes,
        mode=mode,
        batch=each.batch,
        samples_per_s=each.samples_per_s,
        fitted_samples_per_s=each.batch / found.step_time_model.step_s(place),
        efficiency=each.samples_per_s / place.workers,
        communication=each.shares.get("communication") if found.pool.on_cpus else None,
        usd_per_million=None if usd_per_h is None else usd_per_h / 3600 * seconds * 1e6,
        joules_per_sample=machine.watts.times(seconds) if machine.watts else None,
    )


def plot(study: Study, path: Path) -> Path:
    """Plot throughput and efficiency by number of workers into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, efficiency = figure.subplots(1, 2)
    for mode, colour in (("strong", "#1b6ca8"), ("weak", "#c8553d")):
        rows = [row for row in study.rows if row.mode == mode]
        counts = [row.workers for row in rows]
        speed.plot(counts, [row.samples_per_s for row in rows], "o", color=colour, label=mode)
        fitted = [row.fitted_samples_per_s for row in rows]
        speed.plot(counts, fitted, "-", color=colour, alpha=0.6, label=f"{mode}, fitted")
        efficiency.plot(counts, [100 * row.efficiency for row in rows], "o-", color=colour)
    first = study.rows[0]
    most = max(row.workers for row in study.rows)
    ideal = [first.samples_per_s, first.samples_per_s * most / first.workers]
    speed.plot([first.workers, most], ideal, ":", color="grey", label="ideal")
    speed.axvline(study.recommended, color="grey", alpha=0.3)
    speed.set(xlabel="workers", ylabel="samples/s", ylim=(0, None))
    efficiency.set(xlabel="workers", ylabel="efficiency, %", ylim=(0, None))
    for axes in (speed, efficiency):
        axes.set_xticks(sorted({row.workers for row in study.rows}))
    speed.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path


def log_to_mlflow(study: Study, tracker: Any, key: str, plot: Path) -> None:
    """Log the study to its MLflow run; the x axis of each series is the number of workers."""
    for row in sorted(study.rows, key=lambda row: row.workers):
        metrics = {
            "samples_per_s": row.samples_per_s,
            "fitted_samples_per_s": row.fitted_samples_per_s,
            "efficiency": row.efficiency,
            "communication_share": row.communication,
            "usd_per_million_samples": row.usd_per_million,
            "joules_per_sample": row.joules_per_sample and row.joules_per_sample.middle,
        }
        points = [
            (f"scaling/{row.mode}/{name}", value, row.workers, now_ms())
            for name, value in metrics.items()
            if value is not None
        ]
        tracker.log.remote(key, points, row.workers)
    tracker.log_note.remote(key, "recommended workers", str(study.recommended))
    tracker.log_artifact.remote(key, str(plot))
