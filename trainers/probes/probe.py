"""Probes: a few seconds of the ordinary training loop under Ray Train, to measure it.

Each number of workers is one start of Ray Train. Its workers first train four steps to warm up,
compile, evaluate, save and export. Then they train once for each global batch, until rank 0 has
measured for long enough. Nothing is sent to MLflow, and no files stay.
"""

import logging
import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.base.clock import Moment
from cluster.base.config import flatten, with_value
from cluster.base.errors import ClusterError, HeliostatError, SpecError
from trainers.planning.pools import Pool, ProbedPool, ProbeResult, probed_pool
from trainers.probes.timing import probe_loop
from trainers.run_folder import unique_name
from trainers.runs.failure_policy import failure_reason, traceback_of
from trainers.runs.ray_train import WorkerConfig, fit, resources_per_worker
from trainers.spec import RunSpec, resolve

logger = logging.getLogger(__name__)

CAPACITY_TIMEOUT_S = 60.0
"""How long to wait for free resources: Ray is slow to release those of the last probe."""


@dataclass(frozen=True)
class ProbeTarget:
    """The run that is probed: its spec as plain data, and its data set."""

    spec_data: Mapping[str, Any]
    dataset: Path
    seconds: float = 4.0
    """Seconds of steps, for each number of workers and each global batch."""

    def spec_data_for(self, pool: Pool, workers: int, batch: int) -> dict[str, Any]:
        """The spec of the run on `workers` of the pool."""
        data = with_value(self.spec_data, "scale.workers", workers)
        data = with_value(data, "scale.accelerator", pool.accelerator)
        return with_value(data, "train.global_batch", batch)


def probe_pool(
    target: ProbeTarget, pool: Pool, log_line: Callable[[str], None] = lambda line: None
) -> ProbedPool:
    """Probe the pool with several numbers of workers, each at the run's global batch and at half.

    Half the batch shows how much of a step's time does not depend on the batch. `log_line` is
    called with a line for each number of workers. Numbers that the spec does not allow, or that
    the cluster cannot provide, are reported and left out. If nothing could be measured, raises
    the error that the run would raise.
    """
    refused: SpecError | None = None
    batch = int(flatten(target.spec_data)["train.global_batch"])
    probes: list[ProbeResult] = []
    for workers in pool.counts_to_probe(batch):
        batches = [batch, batch // 2] if batch % (2 * workers) == 0 else [batch]
        try:
            found = probe(target, pool, workers, batches)
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


def probe(
    target: ProbeTarget, pool: Pool, workers: int, batches: Sequence[int]
) -> tuple[ProbeResult, ...]:
    """Measure the run on `workers` at each of the global batches, in the connected Ray.

    Blocks for seconds. Raises the error of a run that cannot go on.
    """
    largest = target.spec_data_for(pool, workers, max(batches))
    resolve(largest, RunSpec)  # a mistake in it is raised before Ray starts anything
    wait_for_capacity(largest)
    folder = Path(str(target.spec_data["storage"])) / f".{unique_name('probe')}"
    folder.mkdir(parents=True)
    started = Moment.now()
    config = WorkerConfig(largest, target.dataset, folder, folder.name, started)
    timing = {"seconds": target.seconds, "batches": list(batches)}
    try:
        pickled = fit(probe_loop, config, timing)
    except Exception as error:
        reason = failure_reason(error, folder)
        logger.error("%s: %s\n%s", folder.name, reason, traceback_of(reason))
        raise reason from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ended = Moment.now()
    probes, loop_ended = pickle.loads(pickled)
    end_s = loop_ended.seconds_until(ended)
    return tuple(replace(each, end_s=each.end_s + end_s) for each in probes)


def wait_for_capacity(spec_data: Mapping[str, Any], timeout_s: float = CAPACITY_TIMEOUT_S) -> None:
    """Return when the cluster has enough free resources for the run's workers.

    Raises ClusterError after `timeout_s`, where Ray Train alone would wait for ever.
    """
    import ray

    spec, _ = resolve(spec_data, RunSpec)
    per_worker = resources_per_worker(spec.scale)
    deadline_s = time.monotonic() + timeout_s
    while True:
        free = ray.available_resources()
        wanted = {name: n * spec.scale.max_workers for name, n in per_worker.items()}
        lacking = [name for name, n in wanted.items() if n > free.get(name, 0)]
        if not lacking:
            return
        if time.monotonic() > deadline_s:
            name = lacking[0]
            raise ClusterError(
                f"the cluster is busy: {wanted[name]:g} {name} are not free "
                f"(free: {free.get(name, 0):g})"
            )
        time.sleep(0.2)
