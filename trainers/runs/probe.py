"""Probes: a few seconds of the ordinary training loop under Ray Train, and what they took.

Every number of workers is one start of Ray Train. Its workers go through the loop once for four
steps, so that all is warm, compiled and evaluated, and then once for each global batch, until
the first worker has seen enough. MLflow hears nothing of it, and nothing is left behind.
"""

import itertools
import math
import os
import pickle
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.base.config import flatten, with_value
from cluster.base.errors import ClusterError, HeliostatError, SpecError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import export_model
from trainers.data.remote import local_dataset
from trainers.data.splits import count_samples
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.planning.pools import Pool, ProbedPool, ProbeResult, probed_pool
from trainers.planning.step_time import Placement
from trainers.run_folder import CHECKPOINTS, unique_name
from trainers.runs.ray_train import (
    WorkerConfig,
    failure_reason,
    ray_trainer,
    scaling_config,
    watch_for_stalls,
    worker_context,
)
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker
from trainers.workload import Workload

CAPACITY_TIMEOUT_S = 60.0
"""How long to wait for room on the cluster: what the last probe held is given back late."""
WARM_UP_STEPS = 4
SKIPPED_STEPS = 2
"""Of each timed stretch: what the first steps wait for is not what a step takes."""
MIN_TIMED_STEPS = 5
UNBOUNDED_STEPS = 10**9
"""Steps of a stretch that is stopped by the clock."""
WINDOWS = 5
"""Into which the timed steps are cut, to see how much they differ."""


@dataclass(frozen=True)
class ProbeTarget:
    """What is probed: a run as plain data, its data set, and how long to look."""

    spec_data: Mapping[str, Any]
    dataset: Path
    seconds: float = 4.0
    """Of steps, for each number of workers and global batch."""

    def spec_data_for(self, pool: Pool, workers: int, batch: int) -> dict[str, Any]:
        """The run as it would be there."""
        data = with_value(self.spec_data, "scale.workers", workers)
        data = with_value(data, "scale.accelerator", pool.accelerator)
        return with_value(data, "train.global_batch", batch)


def probe(
    target: ProbeTarget, pool: Pool, workers: int, batches: Sequence[int]
) -> tuple[ProbeResult, ...]:
    """Measure steps over each of the global batches; blocks for seconds, in a Ray that is there.

    Raises what a run raises that cannot go on.
    """
    largest = target.spec_data_for(pool, workers, max(batches))
    resolve(largest, RunSpec)  # what is wrong with it is told before Ray starts anything
    wait_for_capacity(largest)
    folder = Path(str(target.spec_data["storage"])) / f".{unique_name('probe')}"
    folder.mkdir(parents=True)
    started = time.time()
    job = WorkerConfig(largest, target.dataset, folder, folder.name, started)
    config = {"seconds": target.seconds, "batches": list(batches)}
    try:
        found = ray_trainer(_probe_loop, job, config).fit().return_value
    except Exception as error:
        raise failure_reason(error, folder) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    gone = time.time()
    probes, left = pickle.loads(found)
    return tuple(replace(each, end_s=each.end_s + max(0.0, gone - left)) for each in probes)


def wait_for_capacity(spec_data: Mapping[str, Any], timeout_s: float = CAPACITY_TIMEOUT_S) -> None:
    """Return when the run's workers fit beside what else the cluster does.

    Raises ClusterError when they do not in time: Ray Train alone would wait for ever.
    """
    import ray

    spec, _ = resolve(spec_data, RunSpec)
    config = scaling_config(spec.scale)
    deadline = time.monotonic() + timeout_s
    while True:
        free = ray.available_resources()
        wanted = {
            name: n * spec.scale.max_workers for name, n in config.resources_per_worker.items()
        }
        lacking = [name for name, n in wanted.items() if n > free.get(name, 0)]
        if not lacking:
            return
        if time.monotonic() > deadline:
            name = lacking[0]
            raise ClusterError(
                f"the cluster is busy: {wanted[name]:g} {name} are not free "
                f"(free: {free.get(name, 0):g})"
            )
        time.sleep(0.2)


def _probe_loop(config: dict[str, Any]) -> bytes:
    """What each worker does; the first one's probes, and when it was done."""
    job: WorkerConfig = pickle.loads(config["job"])
    with worker_context(job) as (spec, workload, worker), watch_for_stalls(job, spec, worker):
        seen = _ProbeSession(
            spec, workload, worker, replace(job, dataset=local_dataset(job.dataset, spec))
        )
        seen.warm_up()
        probes = [seen.time_steps(batch, config["seconds"]) for batch in config["batches"]]
    return pickle.dumps((probes, time.time()))


class _ProbeSession:
    """One group of workers looking at the loop."""

    def __init__(
        self, spec: RunSpec, workload: Workload, worker: Worker, job: WorkerConfig
    ) -> None:
        self._spec, self._workload, self._worker, self._job = spec, workload, worker, job
        self._warm = _TimingReporter(0.0)
        self._export_s = 0.0

    def warm_up(self) -> None:
        """The first steps, two evaluations, a save and the export of what comes of it."""
        samples = count_samples(self._job.dataset, "train")
        half = WARM_UP_STEPS / 2 * self._spec.train.global_batch / samples
        self._warm = self._train(
            "warm", {"steps": WARM_UP_STEPS, "evaluate_every_epochs": half}, 0.0
        )
        if self._worker.is_rank_zero:
            newest = Checkpoints(self._job.folder / "warm" / CHECKPOINTS).latest()
            assert newest is not None
            began = time.perf_counter()
            export_model(self._job.folder / "model", self._spec, self._workload, newest)
            self._export_s = time.perf_counter() - began

    def time_steps(self, batch: int, seconds: float) -> ProbeResult | None:
        """Steps over `batch` samples for some seconds; the first worker tells what they took."""
        changes = {"global_batch": batch, "steps": UNBOUNDED_STEPS, "evaluate_every_epochs": 1e9}
        watch = self._train(f"timed-{batch}", changes, seconds)
        warm, worker = self._warm, self._worker
        if not worker.is_rank_zero:
            return None
        step_s, spread = steady_step_time(watch.step_ends)
        rated, flops = worker.hardware.catalog_entry(), warm.flop_per_sample()
        speed = None if flops is None else flops * batch / step_s / worker.world_size
        peak = rated.peak_flop_per_s if rated else None
        cores = float(os.cpu_count() or 1) if worker.device.type == "cpu" else None
        nodes = -(-worker.world_size // worker.local_world_size)
        return ProbeResult(
            place=Placement(worker.world_size, nodes, batch / worker.world_size, cores),
            batch=batch,
            step_s=step_s,
            spread=spread,
            start_s=warm.first_step - self._job.started,
            evaluation_s=warm.evaluation_s,
            test_s=warm.test_s,
            save_s=warm.save_s,
            end_s=self._export_s,
            shares=watch.shares() or warm.shares(),
            flops=flops,
            device=rated.name if rated else worker.hardware.name,
            mfu=speed / peak if speed and peak else None,
            peak_memory_bytes=warm.latest_metrics.get("perf/peak_memory_bytes"),
        )

    def _train(self, name: str, changes: Mapping[str, Any], seconds: float) -> "_TimingReporter":
        """Go through the ordinary loop; collective."""
        watch = _TimingReporter(seconds)
        reporter = watch if self._worker.is_rank_zero else NullReporter()
        train_spec = self._spec.train.model_copy(update={"epochs": None, **changes})
        # Saves are asked about apart, and those of a probe are nobody's.
        saves = {"every_steps": "auto", "keep_best": 0, "uri": None}
        spec = self._spec.model_copy(
            update={
                "train": train_spec,
                "checkpoint": self._spec.checkpoint.model_copy(update=saves),
            }
        )
        folder, dataset = self._job.folder / name, self._job.dataset
        train(spec, self._workload, dataset, folder, reporter, self._worker)
        return watch


class _TimingReporter(NullReporter):
    """The reporter that takes the times; stops the loop when it has looked for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.step_ends: list[float] = []
        """When each step ended (`time.perf_counter`)."""
        self.first_step = 0.0
        """When the first one did, in Unix time."""
        self.latest_metrics: dict[str, float] = {}
        self.evaluation_s = self.test_s = self.save_s = 0.0
        self._last = time.perf_counter()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now = time.perf_counter()
        evaluated = {name.partition("/")[0] for name in metrics} & {"val", "test"}
        if evaluated == {"val"}:
            self.evaluation_s = now - self._last
        elif evaluated:  # at the very end both splits are told of together
            self.test_s = max(0.0, now - self._last - self.evaluation_s)
        self.latest_metrics |= metrics
        self._last = now

    def on_evaluation_end(
        self, metrics: Mapping[str, float], step: int, checkpoints: Checkpoints
    ) -> None:
        self.save_s = time.perf_counter() - self._last

    def on_step_end(self, step: int) -> None:
        if not self.step_ends:
            self.first_step = time.time()
        self.step_ends.append(time.perf_counter())

    def should_stop(self) -> bool:
        ticks = self.step_ends
        if not self._seconds or len(ticks) < SKIPPED_STEPS + MIN_TIMED_STEPS:
            return False
        return ticks[-1] - ticks[SKIPPED_STEPS] >= self._seconds

    def shares(self) -> dict[str, float]:
        """Of a step's time, by the newest report of the loop's own meter; empty without one."""
        if "perf/step_s" not in self.latest_metrics:
            return {}
        parts = ("data", "compute", "communication", "other")
        return {part: self.latest_metrics.get(f"perf/{part}_share", 0.0) for part in parts}

    def flop_per_sample(self) -> float | None:
        """Operations of a sample; None where they cannot be counted."""
        if "perf/model_flop_per_s" not in self.latest_metrics:
            return None
        return (
            self.latest_metrics["perf/model_flop_per_s"] / self.latest_metrics["perf/samples_per_s"]
        )


def steady_step_time(step_ends: Sequence[float]) -> tuple[float, float]:
    """The mean step time, and how far 9 of 10 such means would lie from it (relative).

    `ticks` are when steps ended. The first steps are left out, and the last, which saves.
    """
    kept = step_ends[SKIPPED_STEPS:-1]
    step_s = (kept[-1] - kept[0]) / (len(kept) - 1)
    bounds = [round(i * (len(kept) - 1) / WINDOWS) for i in range(WINDOWS + 1)]
    pairs = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
    means = [(kept[b] - kept[a]) / (b - a) for a, b in pairs]
    if len(means) < 2:
        return step_s, 0.0
    return step_s, 1.645 * statistics.stdev(means) / math.sqrt(len(means)) / step_s


def probe_pool(
    target: ProbeTarget, pool: Pool, log_line: Callable[[str], None] = lambda line: None
) -> ProbedPool:
    """Probe the pool on some numbers of workers, each at the run's global batch and at half.

    The half tells what a step takes whatever its batch. `told` hears a line for each of them.
    A number of workers that the spec does not allow, or that cannot be had, is told and left out;
    raises what a run raises when nothing could be measured.
    """
    refused: SpecError | None = None
    batch = int(flatten(target.spec_data)["train.global_batch"])
    probes: list[ProbeResult] = []
    for workers in pool.counts_to_probe(batch):
        halves = [batch, batch // 2] if batch % (2 * workers) == 0 else [batch]
        try:
            found = probe(target, pool, workers, halves)
        except HeliostatError as error:
            if isinstance(error, SpecError):
                refused = error
            elif not probes:
                raise
            log_line(f"{workers} x {pool.accelerator}: not probed: {error}")
            continue
        probes += found
        log_line(f"{workers} x {pool.accelerator}: {found[0].step_s * 1e3:.3g} ms a step")
    if refused and not probes:
        raise refused
    return probed_pool(pool, probes, batch)
