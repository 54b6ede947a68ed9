"""The training loop, read top to bottom.

What a step does is in `trainers.step`; this is what happens around the steps. All of it is a
function of (spec, step, state), so that a run that was killed and resumed ends with the weights
of one that was not.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster.errors import TrainingError
from trainers.checkpoint import Checkpoints
from trainers.data import Batches, on_device, open_split, rows, share
from trainers.folder import CHECKPOINTS
from trainers.health import alive
from trainers.optimize import learning_rate
from trainers.parallel import Worker, compute_precision, weights_dtype
from trainers.reporter import Reporter
from trainers.spec import RunSpec
from trainers.step import Stepper, check_per_sample
from trainers.workloads.base import Workload

EVALUATION_BATCH = 512
AGREE_EVERY_S = 1.0
"""How often several workers ask the first one what it has heard: to stop, or to hurry."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    metrics: Mapping[str, float]
    """The newest value of each metric of evaluation: `val/...`, at the end `test/...`."""
    samples_per_s: float
    """Training samples per second over all workers, since this start, evaluation left out."""

    @property
    def complete(self) -> bool:
        return self.step == self.total_steps


def train(
    spec: RunSpec,
    workload: Workload,
    dataset: Path,
    folder: Path,
    reporter: Reporter,
    worker: Worker | None = None,
) -> Outcome:
    """Train from the newest checkpoint in `folder`, or from the start, to the last step.

    Stops early, with its state saved, when the reporter says so. `dataset` is what
    `trainers.data.prepare` made. Every worker calls this with the same arguments but its own
    `worker` and `reporter`.
    """
    worker = worker or Worker()
    first = worker.rank == 0
    samples = rows(dataset, "train")
    total = spec.train.total_steps(samples)
    evaluations = milestones(spec.train.evaluate_every, spec, samples)
    saves = save_points(spec, samples)

    train_split = open_split(dataset, "train")
    batch_size = spec.train.global_batch
    batches = Batches(train_split, spec.train.seed, batch_size, worker.rank, worker.world)
    stepper = Stepper(spec, workload, batches, worker, total)
    network = stepper.network
    checkpoints = Checkpoints(folder / CHECKPOINTS, spec.checkpoint.keep)
    newest = worker.decided_by_first(checkpoints.newest() if first else None)
    start = stepper.load(newest) if newest else 0

    metrics: dict[str, float] = {}
    meter = _Meter()
    agreement = _Agreement(worker, reporter, start)
    loss_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
    losses = 0

    network.train()
    done = start
    for step in range(start, total):
        alive(step)
        loss_sum += stepper.take(step)
        losses += 1
        done = step + 1
        meter.samples += batch_size

        stop, preempted = agreement.after(done)
        save = done in saves or done == total or stop or preempted
        if done % spec.tracking.every_steps == 0 or done in evaluations or save:
            mean_loss = worker.sum(loss_sum).item() / worker.world / losses
            loss_sum.zero_()
            losses = 0
            measured = {
                "train/loss": mean_loss,
                "train/lr": learning_rate(spec.optimizer, step, total),
                "train/epoch": done * batch_size / samples,
                "train/samples_per_s": meter.samples_per_s(),
            }
            if stepper.skipped:
                measured["train/skipped_steps"] = stepper.skipped
            reporter.log(measured, done)
            if not math.isfinite(mean_loss):
                raise TrainingError(f"the loss is {mean_loss} at step {done}")
        for split in _splits_due(done, total, evaluations, dataset):
            with meter.paused():
                found = evaluate(spec, workload, network, dataset, split, worker)
            metrics |= found
            reporter.log(found, done)
        if save and first:
            stepper.save(checkpoints, done, before_commit=reporter.flush)
        if preempted:  # the next step may be the last one here
            checkpoints.wait()
        if done in evaluations:
            reporter.evaluated(metrics, done, checkpoints)
        reporter.tick(done)
        if stop:
            break

    if first:
        checkpoints.wait()
        reporter.flush()
    worker.wait_for_all()
    return Outcome(done, total, metrics, meter.samples_per_s())


def milestones(every_epochs: float, spec: RunSpec, samples: int) -> set[int]:
    """The steps that end each stretch of `every_epochs` epochs, and the last step of the run."""
    total = spec.train.total_steps(samples)
    steps = {total}
    count = 1
    while (step := spec.train.steps_at(count * every_epochs, samples)) < total:
        steps.add(step)
        count += 1
    return steps


def save_points(spec: RunSpec, samples: int) -> set[int]:
    """The steps after which the state is saved, by `checkpoint.every_steps` or once an epoch."""
    every, total = spec.checkpoint.every_steps, spec.train.total_steps(samples)
    if every is None:
        return milestones(1.0, spec, samples)
    return {*range(every, total, every), total}


def _splits_due(done: int, total: int, evaluations: set[int], dataset: Path) -> list[str]:
    due = ["val"] if done in evaluations else []
    return [*due, "test"] if done == total and rows(dataset, "test") else due


def evaluate(
    spec: RunSpec,
    workload: Workload,
    network: nn.Module,
    dataset: Path,
    split: str,
    worker: Worker,
) -> dict[str, float]:
    """Means of the loss and the workload's metrics over a split, as `split/name`; collective.

    Each worker takes a contiguous share; sums are kept in float64, so that the number of workers
    does not matter beyond rounding.
    """
    samples = open_split(dataset, split)
    count = rows(dataset, split)
    start, stop = share(count, worker.rank, worker.world)
    sums: dict[str, Tensor] = {}
    network.eval()
    with torch.inference_mode(), compute_precision(spec.train, worker.device):
        for low in range(start, stop, EVALUATION_BATCH):
            alive()
            high = min(stop, low + EVALUATION_BATCH)
            batch = {name: values[low:high] for name, values in samples.items()}
            batch = on_device(batch, worker.device, weights_dtype(spec.train))
            output = workload.forward(network, batch)
            found = {"loss": workload.loss(output, batch), **workload.metrics(output, batch)}
            for name, values_B in found.items():
                check_per_sample(name, values_B, high - low)
                total = values_B.double().sum()
                sums[name] = sums[name] + total if name in sums else total
    network.train()
    if worker.world == 1:
        return {f"{split}/{name}": total.item() / count for name, total in sums.items()}
    # A worker without samples knows no names; the first one always has some.
    names = worker.decided_by_first(list(sums))
    zero = torch.zeros((), dtype=torch.float64, device=worker.device)
    totals = worker.sum(torch.stack([sums.get(name, zero) for name in names]))
    means = (totals / count).tolist()
    return {f"{split}/{name}": mean for name, mean in zip(names, means, strict=True)}


class _Meter:
    """Training samples per second since it was made, without the time in `paused`."""

    def __init__(self) -> None:
        self.samples = 0
        self._since = time.perf_counter()

    def samples_per_s(self) -> float:
        return self.samples / (time.perf_counter() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


class _Agreement:
    """Whether to stop, and whether a machine is about to go, alike on all workers."""

    def __init__(self, worker: Worker, reporter: Reporter, step: int) -> None:
        self._worker, self._reporter = worker, reporter
        self._asked_step, self._asked_s = step, time.monotonic()
        self._next = step + 1
        self._preempted = False

    def after(self, step: int) -> tuple[bool, bool]:
        """Whether to stop, and whether to save after every step from now on.

        Collective from time to time: the first worker decides, and when to ask next.
        """
        if self._worker.world == 1:
            return self._reporter.should_stop(), self._reporter.preempted()
        if step < self._next:
            return False, self._preempted
        now = time.monotonic()
        steps = step - self._asked_step
        # The first steps are slow; a gap that grows by degrees never becomes a long silence.
        gap = min(4 * steps, round(AGREE_EVERY_S * steps / max(1e-6, now - self._asked_s)))
        heard = (self._reporter.should_stop(), self._reporter.preempted(), max(1, gap))
        stop, self._preempted, gap = self._worker.decided_by_first(heard)
        self._asked_step, self._asked_s, self._next = step, now, step + gap
        return stop, self._preempted
