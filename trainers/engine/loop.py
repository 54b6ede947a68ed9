"""The training loop, read top to bottom.

What a step does is in `trainers.engine.step`; this is what happens around the steps. All of it is a
function of (spec, step, state), so that a run that was killed and resumed ends with the weights
of one that was not.
"""

import time
from pathlib import Path

from trainers.checkpoints.checkpoints import Checkpoints
from trainers.data.splits import count_samples, open_splits
from trainers.engine.coordination import LossWindow, SaveSchedule, StepCoordinator
from trainers.engine.dropout import NATIVE_RNG_NOTE
from trainers.engine.evaluate import evaluate, splits_due
from trainers.engine.heartbeat import heartbeat
from trainers.engine.optimizer import learning_rate
from trainers.engine.reporter import Reporter
from trainers.engine.step import TrainStep
from trainers.engine.strategy import broadcast_buffers, compile_time_s
from trainers.outcome import Outcome
from trainers.run_folder import CHECKPOINTS
from trainers.spec import RunSpec
from trainers.worker import Worker
from trainers.workload import Workload

PERF_INTERVAL_S = 2.0
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
    `trainers.data.dataset.prepare_dataset` made; `started` is when the command was given, in Unix time, from
    which goodput counts. Every worker calls this with the same arguments but its own
    `worker` and `reporter`.
    """
    samples = count_samples(dataset, "train")
    total = spec.train.total_steps(samples)
    batch_size = spec.train.global_batch
    evaluations = evaluation_steps(spec.train.evaluate_every_epochs, spec, samples)
    splits = open_splits(dataset)
    stepper = TrainStep(spec, workload, splits["train"], worker or Worker(), total, started)
    worker, meter = stepper.worker, stepper.meter
    checkpoints = Checkpoints(folder / CHECKPOINTS, spec.checkpoint, worker)
    start, numbers = stepper.resume(checkpoints)
    saves = SaveSchedule(spec.checkpoint, total, evaluations, worker)
    if worker.world_size > 1:
        reporter.log_note("parallel", f"{stepper.strategy.mode}: {stepper.strategy.reason}")

    metrics: dict[str, float] = {}
    agreement = StepCoordinator(worker, reporter, start)
    losses = LossWindow(worker, numbers)

    stepper.network.train()
    done = start
    meter.mark("start")
    for step in range(start, total):
        heartbeat(step)
        done = step + 1
        losses.add(stepper.run(step), done)
        if step == start:
            _log_first_step(spec, stepper, reporter)

        wishes = agreement.decide(done, saves.is_due)
        save = wishes.save or wishes.stop or wishes.save_every_step or saves.is_scheduled(done)
        if done % spec.tracking.every_steps == 0 or done in evaluations:
            measured = {
                "train/loss": losses.mean(done),
                "train/lr": learning_rate(spec.optimizer, step, total),
                "train/epoch": done * batch_size / samples,
            }
            meter.mark("compute")  # a GPU has been waited for
            if done in evaluations or meter.unreported_s() > PERF_INTERVAL_S:
                measured |= meter.read()
            if stepper.skipped_steps:
                measured["train/skipped_steps"] = stepper.skipped_steps
            reporter.log_metrics(measured, done)
        found: dict[str, float] = {}
        for split in splits_due(done, total, evaluations, splits):
            broadcast_buffers(stepper.network, stepper.strategy)
            means = evaluate(spec, workload, stepper.network, splits[split], worker)
            found |= {f"{split}/{name}": mean for name, mean in means.items()}
            meter.mark("evaluation")
        if found:
            metrics |= found
            reporter.log_metrics(found, done)
        if save:
            began = time.monotonic()
            state = {**losses.state_dict(done), **meter.state_dict(stopped=wishes.stop)}
            stepper.save(checkpoints, done, state, found, reporter.flush)
            saves.record_save(done, time.monotonic() - began, reporter)
        if wishes.save_every_step:  # the next step may be the last one here
            checkpoints.wait()
        if done in evaluations:
            reporter.on_evaluation_end(metrics, done, checkpoints)
        reporter.on_step_end(done)
        meter.mark("other")
        if wishes.stop:
            break

    checkpoints.wait()
    reporter.flush()
    worker.barrier()
    return Outcome(done, total, metrics, meter.samples_per_s())


def _log_first_step(spec: RunSpec, stepper: TrainStep, reporter: Reporter) -> None:
    """What is known only when a step has been done."""
    if spec.train.compile != "off":
        reporter.log_note("compile", f"{compile_time_s():.1f} s")
    if stepper.meter.catalogued is not None:
        rated = stepper.meter.catalogued
        reporter.log_note("device", f"{rated.name}, {rated.peak_text()}")
    if stepper.uses_native_rng:
        reporter.log_note("random", NATIVE_RNG_NOTE)


def evaluation_steps(every_epochs: float, spec: RunSpec, samples: int) -> set[int]:
    """The steps that end each stretch of `every_epochs` epochs, and the last step of the run."""
    total = spec.train.total_steps(samples)
    steps = {total}
    count = 1
    while (step := spec.train.steps_for_epochs(count * every_epochs, samples)) < total:
        steps.add(step)
        count += 1
    return steps
