"""What more workers bring, measured: strong and weak scaling of a run on the cluster at hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster.base.errors import SpecError
from cluster.cost.node_rates import CostSpec
from cluster.cost.user_prices import Own
from trainers.planning.forecast import Interval
from trainers.planning.machines import here
from trainers.planning.plan import knee_of, paying
from trainers.planning.pools import Pool, Probe, ProbedPool, pools, probed
from trainers.runs.probe import Subject, probe
from trainers.spec import RunSpec
from trainers.tracking.operation_log import now_ms

Mode = Literal["strong", "weak"]


@dataclass(frozen=True)
class Row:
    """One number of workers, at one global batch."""

    workers: int
    nodes: int
    mode: Mode
    """strong: the spec's global batch; weak: the share of the fewest workers, for each."""
    batch: int
    samples_per_s: float
    fitted_samples_per_s: float
    efficiency: float
    """Samples per second and worker, over those with the fewest workers."""
    communication: float | None
    """Share of a step; None on accelerators, whose exchange the host does not see."""
    usd_per_million: float | None
    joules_per_sample: Interval | None


@dataclass(frozen=True)
class Study:
    """All that was measured, and what follows."""

    rows: tuple[Row, ...]
    probed: ProbedPool
    recommended: int
    """Workers, for the spec's global batch."""
    notes: tuple[str, ...]


def pool_of(spec: RunSpec, counts: Sequence[int]) -> Pool:
    """Where the spec's workers would be, in the Ray that is connected.

    Raises SpecError where so many do not fit there, or cannot share the batch evenly.
    """
    import ray

    there = pools(ray.nodes(), spec)
    if not there:
        raise SpecError(f"scale.accelerator: no node has {spec.scale.accelerator}")
    pool = there[-1]  # accelerators come last, and `auto` prefers them
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
    subject: Subject, pool: Pool, counts: Sequence[int], told: Callable[[str], None]
) -> ProbedPool:
    """Probe each number of workers with both batches; blocks for seconds each."""
    batch = int(subject.data["train"]["global_batch"])
    share = batch // counts[0]
    probes: list[Probe] = []
    for workers in counts:
        found = probe(subject, pool, workers, sorted({batch, share * workers}))
        probes += found
        speed = found[0].samples_per_s
        told(f"{workers} x {pool.accelerator}: {speed:,.0f} samples/s at batch {found[0].batch}")
    return probed(pool, probes, batch)


def study(found: ProbedPool, own: Own, cost: CostSpec) -> Study:
    """The rows of what was probed, and how many workers pay."""
    fewest = min(each.place.workers for each in found.probes)
    rows = []
    for each in found.probes:
        modes: list[Mode] = ["strong"] if each.batch == found.batch else ["weak"]
        if each.place.workers == fewest:
            modes = ["strong", "weak"]
        rows += [_row(mode, each, found, own, cost) for mode in modes]
    lone = {mode: next(r for r in rows if r.mode == mode) for mode in ("strong", "weak")}
    rows = [replace(row, efficiency=row.efficiency / lone[row.mode].efficiency) for row in rows]
    rows.sort(key=lambda row: (row.mode, row.workers))
    best = knee_of(found)
    machine = here(found, 1, own, cost)
    notes = [
        f"recommended for batch {found.batch}: {best} worker{'s' * (best > 1)}",
        paying(found),
        machine.rate.price,
    ]
    if machine.covers:
        notes.append(f"J are estimates by design power, of: {machine.covers}")
    terms = ", ".join(f"{name} {value:.3g} s" for name, value in found.curve.terms.items())
    notes.append(f"fitted: {terms}")
    return Study(tuple(rows), found, best, tuple(notes))


def _row(mode: Mode, each: Probe, found: ProbedPool, own: Own, cost: CostSpec) -> Row:
    place = each.place
    machine = here(found, -(-place.workers // place.nodes), own, cost)
    usd_per_h, seconds = machine.rate.usd_per_h, place.nodes / each.samples_per_s
    return Row(
        workers=place.workers,
        nodes=place.nodes,
        mode=mode,
        batch=each.batch,
        samples_per_s=each.samples_per_s,
        fitted_samples_per_s=each.batch / found.curve.step_s(place),
        efficiency=each.samples_per_s / place.workers,
        communication=each.shares.get("communication") if found.pool.on_cpus else None,
        usd_per_million=None if usd_per_h is None else usd_per_h / 3600 * seconds * 1e6,
        joules_per_sample=machine.watts.times(seconds) if machine.watts else None,
    )


def plot(study: Study, path: Path) -> Path:
    """Throughput and efficiency by number of workers, as a PNG file."""
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


def track(study: Study, tracker: Any, key: str, plot: Path) -> None:
    """Tell MLflow: each number of workers is a step of the series."""
    for row in sorted(study.rows, key=lambda row: row.workers):
        found = {
            "samples_per_s": row.samples_per_s,
            "fitted_samples_per_s": row.fitted_samples_per_s,
            "efficiency": row.efficiency,
            "communication_share": row.communication,
            "usd_per_million_samples": row.usd_per_million,
            "joules_per_sample": row.joules_per_sample and row.joules_per_sample.middle,
        }
        rows = [
            (f"scaling/{row.mode}/{name}", value, row.workers, now_ms())
            for name, value in found.items()
            if value is not None
        ]
        tracker.log.remote(key, rows, row.workers)
    tracker.note.remote(key, "recommended workers", str(study.recommended))
    tracker.artifact.remote(key, str(plot))
