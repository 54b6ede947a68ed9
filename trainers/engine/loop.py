"""The training loop, read top to bottom.

What a step does is in `trainers.engine.step`; this is what happens around the steps. All of it is a
function of (spec, step, state), so that a run that was killed and resumed ends with the weights
of one that was not.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cluster.base.errors import TrainingError
from trainers.checkpoints.checkpoints import Checkpoints, interval_s
from trainers.data.dataset import (on_device, open_splits, rows, share)
from trainers.engine.dropout import OWN_RANDOM
from trainers.run_folder import CHECKPOINTS
from trainers.engine.heartbeat import alive
from trainers.engine.optimizer import learning_rate
from trainers.worker import Worker
from trainers.engine.strategy import compile_s, share_buffers
from trainers.precision import compute_precision, weights_dtype
from trainers.engine.reporter import Reporter
from trainers.spec import CheckpointSpec, RunSpec
from trainers.engine.step import Stepper, check_per_sample
from trainers.workload import Batch, Workload

AGREE_EVERY_S = 1.0
"""How often several workers ask the first one what it has heard: to stop, to save, to hurry."""
UNREAD_LOSSES = 256
"""How many losses may stay on a device, where reports are rare."""
METER_EVERY_S = 2.0
"""Seconds between reports of where the time goes, besides those at evaluations."""
FIRST_SAVE_S = 30.0
"""Seconds to the first save when its interval is chosen by what a save costs."""


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
    started: float | None = None,
) -> Outcome:
    """Train from the newest checkpoint in `folder`, or from the start, to the last step.

    Stops early, with its state saved, when the reporter says so. `dataset` is what
    `trainers.data.dataset.prepare` made; `started` is when the command was given, in Unix time, from
    which goodput counts. Every worker calls this with the same arguments but its own
    `worker` and `reporter`.
    """
    samples = rows(dataset, "train")
    total = spec.train.total_steps(samples)
    batch_size = spec.train.global_batch
    evaluations = milestones(spec.train.evaluate_every, spec, samples)
    splits = open_splits(dataset)
    stepper = Stepper(spec, workload, splits["train"], worker or Worker(), total, started)
    worker, meter = stepper.worker, stepper.meter
    checkpoints = Checkpoints(folder / CHECKPOINTS, spec.checkpoint, worker)
    start, numbers = stepper.resume(checkpoints)
    saves = _Saves(spec.checkpoint, total, evaluations, worker)
    if worker.world > 1:
        reporter.note("parallel", f"{stepper.layout.mode}: {stepper.layout.reason}")

    metrics: dict[str, float] = {}
    agreement = _Agreement(worker, reporter, start)
    losses = _Losses(worker, numbers)

    stepper.network.train()
    done = start
    meter.mark("start")
    for step in range(start, total):
        alive(step)
        done = step + 1
        losses.add(stepper.take(step), done)
        if step == start:
            _note_first_step(spec, stepper, reporter)

        wishes = agreement.after(done, saves.due)
        save = wishes.save or wishes.stop or wishes.hurry or saves.planned(done)
        if done % spec.tracking.every_steps == 0 or done in evaluations:
            measured = {
                "train/loss": losses.mean(done),
                "train/lr": learning_rate(spec.optimizer, step, total),
                "train/epoch": done * batch_size / samples,
            }
            meter.mark("compute")  # a GPU has been waited for
            if done in evaluations or meter.unread_s() > METER_EVERY_S:
                measured |= meter.read()
            if stepper.skipped:
                measured["train/skipped_steps"] = stepper.skipped
            reporter.log(measured, done)
        found: dict[str, float] = {}
        for split in splits_due(done, total, evaluations, splits):
            share_buffers(stepper.network, stepper.layout)
            means = evaluate(spec, workload, stepper.network, splits[split], worker)
            found |= {f"{split}/{name}": mean for name, mean in means.items()}
            meter.mark("evaluation")
        if found:
            metrics |= found
            reporter.log(found, done)
        if save:
            began = time.monotonic()
            state = {**losses.numbers(done), **meter.state(stopped=wishes.stop)}
            stepper.save(checkpoints, done, state, found, reporter.flush)
            saves.saved(done, time.monotonic() - began, reporter)
        if wishes.hurry:  # the next step may be the last one here
            checkpoints.wait()
        if done in evaluations:
            reporter.evaluated(metrics, done, checkpoints)
        reporter.tick(done)
        meter.mark("other")
        if wishes.stop:
            break

    checkpoints.wait()
    reporter.flush()
    worker.wait_for_all()
    return Outcome(done, total, metrics, meter.samples_per_s())


def _note_first_step(spec: RunSpec, stepper: Stepper, reporter: Reporter) -> None:
    """What is known only when a step has been done."""
    if spec.train.compile != "off":
        reporter.note("compile", f"{compile_s():.1f} s")
    if stepper.meter.rated is not None:
        rated = stepper.meter.rated
        reporter.note("device", f"{rated.name}, {rated.note_of_peak()}")
    if stepper.draws_natively:
        reporter.note("random", OWN_RANDOM)


def milestones(every_epochs: float, spec: RunSpec, samples: int) -> set[int]:
    """The steps that end each stretch of `every_epochs` epochs, and the last step of the run."""
    total = spec.train.total_steps(samples)
    steps = {total}
    count = 1
    while (step := spec.train.steps_at(count * every_epochs, samples)) < total:
        steps.add(step)
        count += 1
    return steps


def splits_due(
    done: int, total: int, evaluations: set[int], splits: Mapping[str, Batch]
) -> list[str]:
    """The splits to evaluate on after `done` steps: the test split only at the very end."""
    due = ["val"] if done in evaluations else []
    return [*due, "test"] if done == total and "test" in splits else due


def evaluate(
    spec: RunSpec,
    workload: Workload,
    network: nn.Module,
    samples: Batch,
    worker: Worker,
) -> dict[str, float]:
    """The loss and the workload's metrics over a split, by name; collective.

    Each worker takes a contiguous share; sums are kept in float64, so that the number of workers
    does not matter beyond rounding.
    """
    count = len(next(iter(samples.values())))
    start, stop = share(count, worker.data_rank, worker.data_world)
    # Workers of a sharded model go through it equally often, if need be with nothing to count.
    rounds = math.ceil(math.ceil(count / worker.data_world) / workload.evaluation_batch)
    sums: dict[str, Tensor] = {}
    network.eval()
    with torch.inference_mode(), compute_precision(spec.train, worker.device):
        for turn in range(rounds):
            alive()
            low, high = (start + bound for bound in share(stop - start, turn, rounds))
            part = slice(min(low, count - 1), max(high, low + 1))
            batch = {name: values[part] for name, values in samples.items()}
            batch = on_device(batch, worker.device, weights_dtype(spec.train))
            output = workload.forward(network, batch)
            found = {"loss": workload.loss(output, batch), **workload.metrics(output, batch)}
            for name, values_B in found.items():
                check_per_sample(name, values_B, len(next(iter(batch.values()))))
                total = values_B[: high - low].double().sum()
                sums[name] = sums[name] + total if name in sums else total
    network.train()
    means = (worker.sum(torch.stack(list(sums.values()))) / count).tolist()
    return workload.summary(dict(zip(sums, means, strict=True)))


class _Losses:
    """The mean loss over the steps since it was last asked for, whatever was saved in between.

    Losses stay on the device until then, so that no step waits for them.
    """

    def __init__(self, worker: Worker, numbers: Mapping[str, float]) -> None:
        """`numbers` are those of the checkpoint that training goes on from."""
        self._worker = worker
        self._sum, self._count = numbers.get("loss_sum", 0.0), int(numbers.get("losses", 0))
        self._last = math.nan
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor, step: int) -> None:
        """Take what `Stepper.take` gave for the step that ends the first `step`; see `mean`."""
        self._unread.append(loss)
        if len(self._unread) == UNREAD_LOSSES:
            self._read(step)

    def mean(self, step: int) -> float:
        """Collective. Raises TrainingError where the loss has ceased to be a number."""
        self._read(step)
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        return mean

    def numbers(self, step: int) -> dict[str, float]:
        """What a checkpoint keeps, so that no window of the mean begins at a restart; likewise."""
        self._read(step)
        return {"loss_sum": self._sum, "losses": self._count}

    def _read(self, step: int) -> None:
        if not self._unread:
            return
        parts_S = torch.stack(self._unread).double()
        losses = (self._worker.sum(parts_S) / self._worker.data_world).tolist()
        self._unread = []
        for number, loss in enumerate(losses, start=step - len(losses) + 1):
            if not math.isfinite(loss):
                last = f"the last finite one was {self._last:.6g}"
                raise TrainingError(f"the loss is {loss} at step {number} ({last})")
            self._last = loss
            self._sum += loss
        self._count += len(losses)


class _Saves:
    """When the state is saved."""

    def __init__(
        self, spec: CheckpointSpec, total: int, evaluations: set[int], worker: Worker
    ) -> None:
        self._spec, self._total = spec, total
        self._evaluations = evaluations if spec.keep_best else set()
        self._failure_s = spec.failure_every_hours * 3600 / worker.world
        self._next = time.monotonic() + FIRST_SAVE_S
        self._noted_s = 0.0

    def planned(self, step: int) -> bool:
        """Whether the spec says that the state is saved after `step` steps."""
        every = self._spec.every_steps
        if every != "auto" and step % every == 0:
            return True
        return step == self._total or step in self._evaluations

    def due(self) -> bool:
        """Whether it is time to save, if the spec leaves this open."""
        return self._spec.every_steps == "auto" and time.monotonic() >= self._next

    def saved(self, step: int, stopped_s: float, reporter: Reporter) -> None:
        """Take note of a save after `step` steps, for which training stopped for `stopped_s`."""
        every = interval_s(stopped_s, self._failure_s)
        self._next = time.monotonic() + every
        goes_on = step < self._total
        if goes_on and self._spec.every_steps == "auto" and not 0.5 < self._noted_s / every < 2:
            self._noted_s = every
            reporter.note(
                "checkpoint interval",
                f"{every:.0f} s: a save stops training for {stopped_s * 1e3:.0f} ms, a failure is "
                f"expected every {self._failure_s / 3600:.3g} h",
            )


@dataclass(frozen=True)
class _Wishes:
    """What all workers do after a step, besides going on."""

    stop: bool = False
    save: bool = False
    hurry: bool = False
    """A machine is about to go: save after every step from now on."""


class _Agreement:
    """What the first worker decides, taken up by all workers after the same step."""

    def __init__(self, worker: Worker, reporter: Reporter, step: int) -> None:
        self._worker, self._reporter = worker, reporter
        self._asked_step, self._asked_s = step, time.monotonic()
        self._next = step + 1
        self._hurry = False

    def after(self, step: int, save_is_due: Callable[[], bool]) -> _Wishes:
        """Collective from time to time: the first worker decides, and when to ask next."""
        if self._worker.world == 1:
            return self._heard(save_is_due)
        if step < self._next:
            return _Wishes(hurry=self._hurry)
        now = time.monotonic()
        steps = step - self._asked_step
        # The first steps are slow; a gap that grows by degrees never becomes a long silence.
        gap = min(4 * steps, round(AGREE_EVERY_S * steps / max(1e-6, now - self._asked_s)))
        decided = self._worker.decided_by_first((self._heard(save_is_due), max(1, gap)))
        wishes, gap = cast(tuple[_Wishes, int], decided)
        self._asked_step, self._asked_s, self._next = step, now, step + gap
        self._hurry = wishes.hurry
        return wishes

    def _heard(self, save_is_due: Callable[[], bool]) -> _Wishes:
        reporter = self._reporter
        return _Wishes(reporter.should_stop(), save_is_due(), reporter.preempted())
