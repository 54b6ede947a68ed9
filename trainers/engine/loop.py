"""The training loop, read top to bottom.

What a step does is in `trainers.engine.step`; this is what happens around the steps. All of it is a
function of (spec, step, state), so that a run that was killed and resumed ends with the weights
of one that was not.
"""

import time
from pathlib import Path

from trainers.checkpoints.checkpoints import Checkpoints
from trainers.data.dataset import open_splits, rows
from trainers.engine.coordination import LossAverage, SaveSchedule, _Agreement
from trainers.engine.dropout import OWN_RANDOM
from trainers.engine.evaluate import evaluate, splits_due
from trainers.engine.heartbeat import alive
from trainers.engine.optimizer import learning_rate
from trainers.engine.reporter import Reporter
from trainers.engine.step import Stepper
from trainers.engine.strategy import compile_s, share_buffers
from trainers.outcome import Outcome
from trainers.run_folder import CHECKPOINTS
from trainers.spec import RunSpec
from trainers.worker import Worker
from trainers.workload import Workload

METER_EVERY_S = 2.0
"""Seconds between reports of where the time goes, besides those at evaluations."""


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
    saves = SaveSchedule(spec.checkpoint, total, evaluations, worker)
    if worker.world > 1:
        reporter.note("parallel", f"{stepper.layout.mode}: {stepper.layout.reason}")

    metrics: dict[str, float] = {}
    agreement = _Agreement(worker, reporter, start)
    losses = LossAverage(worker, numbers)

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
