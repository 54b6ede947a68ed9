"""The worker's side of a probe: the training loop, timed by a reporter."""

import itertools
import math
import os
import pickle
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.base.clock import Moment
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import export_model
from trainers.data.remote import local_dataset
from trainers.data.splits import count_samples
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.planning.pools import ProbeResult
from trainers.planning.step_time import Placement
from trainers.run_folder import CHECKPOINTS
from trainers.runs.ray_train import WorkerConfig, watch_for_stalls, worker_context
from trainers.spec import RunSpec
from trainers.worker import Worker
from trainers.workload import Workload

WARM_UP_STEPS = 4
SKIPPED_STEPS = 2
"""Steps at the start of each measurement that are left out, since they wait for more than a step
takes."""
MIN_TIMED_STEPS = 5
UNBOUNDED_STEPS = 10**9
"""`train.steps` of a measurement, which ends by the clock."""
WINDOWS = 5
"""Number of parts into which the timed steps are cut, to see how much their means differ."""


def probe_loop(config: dict[str, Any]) -> bytes:
    """The code of each worker; returns rank 0's probes, and when it was done, pickled."""
    run: WorkerConfig = pickle.loads(config["worker_config"])
    with worker_context(run) as (spec, workload, worker), watch_for_stalls(run, spec, worker):
        run = replace(run, dataset=local_dataset(run.dataset, spec))
        session = _ProbeSession(spec, workload, worker, run)
        session.warm_up()
        probes = [session.time_steps(batch, config["seconds"]) for batch in config["batches"]]
    return pickle.dumps((probes, Moment.now()))


class _ProbeSession:
    """The measurements of one worker group. Its methods are collective."""

    def __init__(
        self, spec: RunSpec, workload: Workload, worker: Worker, config: WorkerConfig
    ) -> None:
        self._spec, self._workload, self._worker, self._config = spec, workload, worker, config
        self._warm_up = TimingReporter(0.0)
        self._export_s = 0.0

    def warm_up(self) -> None:
        """Train the first steps, with two evaluations, a save and an export of the model."""
        samples = count_samples(self._config.dataset, "train")
        half = WARM_UP_STEPS / 2 * self._spec.train.global_batch / samples
        changes = {"steps": WARM_UP_STEPS, "evaluate_every_epochs": half}
        self._warm_up = self._train("warm", changes, 0.0)
        if self._worker.is_rank_zero:
            latest = Checkpoints(self._config.folder / "warm" / CHECKPOINTS).latest()
            assert latest is not None
            began = time.perf_counter()
            export_model(self._config.folder / "model", self._spec, self._workload, latest)
            self._export_s = time.perf_counter() - began

    def time_steps(self, batch: int, seconds: float) -> ProbeResult | None:
        """Train with global batch `batch` for some seconds; rank 0 returns the measurements."""
        changes = {"global_batch": batch, "steps": UNBOUNDED_STEPS, "evaluate_every_epochs": 1e9}
        timed = self._train(f"timed-{batch}", changes, seconds)
        warm_up, worker = self._warm_up, self._worker
        if not worker.is_rank_zero:
            return None
        step_s, spread = steady_step_time(timed.step_ends)
        rated, flops = worker.hardware.catalog_entry(), warm_up.flop_per_sample()
        speed = None if flops is None else flops * batch / step_s / worker.world_size
        peak = rated.peak_flop_per_s if rated else None
        cores = float(os.cpu_count() or 1) if worker.device.type == "cpu" else None
        nodes = -(-worker.world_size // worker.local_world_size)
        return ProbeResult(
            place=Placement(worker.world_size, nodes, batch / worker.world_size, cores),
            batch=batch,
            step_s=step_s,
            spread=spread,
            start_s=self._config.started.seconds_until(warm_up.first_step),
            evaluation_s=warm_up.evaluation_s,
            test_s=warm_up.test_s,
            save_s=warm_up.save_s,
            end_s=self._export_s,
            shares=timed.shares() or warm_up.shares(),
            flops=flops,
            device=rated.name if rated else worker.hardware.name,
            mfu=speed / peak if speed and peak else None,
            peak_memory_bytes=warm_up.latest_metrics.get("perf/peak_memory_bytes"),
        )

    def _train(self, name: str, changes: Mapping[str, Any], seconds: float) -> "TimingReporter":
        """Run the ordinary training loop with some fields of `train` changed."""
        timing = TimingReporter(seconds)
        reporter = timing if self._worker.is_rank_zero else NullReporter()
        train_spec = self._spec.train.model_copy(update={"epochs": None, **changes})
        # Saves are measured in the warm-up, and nobody reads the checkpoints of a probe.
        saves = {"every_steps": "auto", "keep_best": 0, "uri": None}
        checkpoint_spec = self._spec.checkpoint.model_copy(update=saves)
        spec = self._spec.model_copy(update={"train": train_spec, "checkpoint": checkpoint_spec})
        folder, dataset = self._config.folder / name, self._config.dataset
        train(spec, self._workload, dataset, folder, reporter, self._worker)
        return timing


class TimingReporter(NullReporter):
    """A reporter that measures times, and stops the loop after `seconds` of steps (0: never)."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.step_ends: list[float] = []
        """When each step ended (`time.perf_counter`)."""
        self.first_step = Moment.now()
        """When the first step ended."""
        self.latest_metrics: dict[str, float] = {}
        self.evaluation_s = self.test_s = self.save_s = 0.0
        self._last_log = time.perf_counter()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        now = time.perf_counter()
        evaluated = {name.partition("/")[0] for name in metrics} & {"val", "test"}
        if evaluated == {"val"}:
            self.evaluation_s = now - self._last_log
        elif evaluated:  # after the last step both splits are reported together
            self.test_s = max(0.0, now - self._last_log - self.evaluation_s)
        self.latest_metrics |= metrics
        self._last_log = now

    def on_evaluation_end(
        self, metrics: Mapping[str, float], step: int, checkpoints: Checkpoints
    ) -> None:
        self.save_s = time.perf_counter() - self._last_log

    def on_step_end(self, step: int) -> None:
        if not self.step_ends:
            self.first_step = Moment.now()
        self.step_ends.append(time.perf_counter())

    def should_stop(self) -> bool:
        ends = self.step_ends
        if not self._seconds or len(ends) < SKIPPED_STEPS + MIN_TIMED_STEPS:
            return False
        return ends[-1] - ends[SKIPPED_STEPS] >= self._seconds

    def shares(self) -> dict[str, float]:
        """Shares of a step's time by the loop's newest report; empty without a report."""
        if "perf/step_s" not in self.latest_metrics:
            return {}
        parts = ("data", "compute", "communication", "other")
        return {part: self.latest_metrics.get(f"perf/{part}_share", 0.0) for part in parts}

    def flop_per_sample(self) -> float | None:
        """Model operations of one sample; None if they cannot be counted."""
        metrics = self.latest_metrics
        if "perf/model_flop_per_s" not in metrics:
            return None
        return metrics["perf/model_flop_per_s"] / metrics["perf/samples_per_s"]


def steady_step_time(step_ends: Sequence[float]) -> tuple[float, float]:
    """The mean step time, and its relative error with a confidence of 90 %.

    Leaves out the first steps, and the last step, after which the state is saved.
    """
    kept = step_ends[SKIPPED_STEPS:-1]
    step_s = (kept[-1] - kept[0]) / (len(kept) - 1)
    bounds = [round(i * (len(kept) - 1) / WINDOWS) for i in range(WINDOWS + 1)]
    pairs = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
    means = [(kept[b] - kept[a]) / (b - a) for a, b in pairs]
    if len(means) < 2:
        return step_s, 0.0
    return step_s, 1.645 * statistics.stdev(means) / math.sqrt(len(means)) / step_s
