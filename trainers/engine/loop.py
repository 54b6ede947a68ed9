"""The training loop, read top to bottom.

`trainers.engine.step` has what happens in a step; this is what happens around the steps. All of
it is a function of (spec, step, state), so that a run that was killed and resumed ends with the
same weights as one that was not.
"""

from pathlib import Path

from trainers.checkpoints.checkpoints import Checkpoints
from trainers.data.splits import count_samples, open_splits
from trainers.engine.coordination import LossWindow, SaveSchedule, StepCoordinator
from trainers.engine.evaluate import Evaluator
from trainers.engine.heartbeat import heartbeat
from trainers.engine.reporter import Reporter
from trainers.engine.step import TrainStep
from trainers.modeling.dropout import NATIVE_RNG_NOTE
from trainers.outcome import Outcome
from trainers.run_folder import CHECKPOINTS
from trainers.spec import RunSpec
from trainers.stores import external_wait
from trainers.torch_internals import compile_time_s
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
    """Train from the latest checkpoint in `folder`, or from the start, to the last step.

    Stops early, with its state saved, when the reporter says so. `dataset` is a folder that
    `prepare_dataset` returned, `started` the Unix time of the user's command, from which goodput
    counts. Every worker calls this with the same arguments but its own `worker` and `reporter`.
    """
    samples = count_samples(dataset, "train")
    total = spec.train.total_steps(samples)
    splits = open_splits(dataset)
    steps = TrainStep(spec, workload, splits["train"], worker or Worker(), total, started)
    worker, meter = steps.worker, steps.meter
    with Checkpoints(folder / CHECKPOINTS, spec.checkpoint, worker) as checkpoints:
        start, scalars = steps.resume(checkpoints)
        evaluator = Evaluator(spec, workload, splits, steps, reporter)
        saves = SaveSchedule(spec.checkpoint, total, evaluator.steps, worker)
        coordinator = StepCoordinator(worker, reporter, start)
        losses = LossWindow(worker, scalars)
        _log_strategy(steps, reporter)
        evaluator.resume(start, checkpoints)

        done = start
        for step in range(start, total):
            heartbeat(step)
            done = step + 1
            losses.add(steps.run(step), done)
            if step == start:
                _log_first_step(spec, steps, reporter)

            decision = coordinator.decide(done, saves.is_due)
            evaluates = done in evaluator.steps
            if evaluates or done % spec.tracking.every_steps == 0:
                epoch = done * spec.train.global_batch / samples
                progress = {"train/loss": losses.mean(done), "train/epoch": epoch}
                reporter.log_metrics(progress | _step_metrics(steps, step, evaluates), done)
            evaluated = evaluator.run(done)
            if decision.saves or saves.is_scheduled(done):
                state = losses.state_dict(done) | meter.state_dict(stopped=decision.stop)
                blocked_s = steps.save(checkpoints, done, state, evaluated, reporter.flush)
                saves.record_save(done, blocked_s, reporter)
            if decision.save_every_step:  # the next step may be the last one here
                checkpoints.wait()
            if evaluates:
                reporter.on_evaluation_end(evaluator.latest, done, checkpoints)
            reporter.on_step_end(done)
            meter.mark("other")
            if decision.stop:
                break

        _end_together(checkpoints, reporter, worker)
        return Outcome(done, total, evaluator.latest, meter.samples_per_s())


def _end_together(checkpoints: Checkpoints, reporter: Reporter, worker: Worker) -> None:
    """Return when everything is on a disk, on all workers. Collective."""
    with external_wait():
        checkpoints.wait()
        reporter.flush()
        worker.barrier()


def _step_metrics(steps: TrainStep, step: int, evaluates: bool) -> dict[str, float]:
    """The learning rate, and where the time goes if that is due."""
    metrics = {"train/lr": steps.learning_rate(step)}
    steps.meter.mark("compute")  # a GPU has been waited for
    if evaluates or steps.meter.unreported_s() > PERF_INTERVAL_S:
        metrics |= steps.read_meter()
    if steps.skipped_steps:
        metrics["train/skipped_steps"] = steps.skipped_steps
    return metrics


def _log_strategy(steps: TrainStep, reporter: Reporter) -> None:
    """Log how the model is spread over the workers, if there are several."""
    if steps.worker.world_size > 1:
        reporter.log_note("parallel", f"{steps.strategy.mode}: {steps.strategy.reason}")


def _log_first_step(spec: RunSpec, steps: TrainStep, reporter: Reporter) -> None:
    """Log what is known only when a step has been done."""
    if spec.train.compile != "off":
        reporter.log_note("compile", f"{compile_time_s():.1f} s")
    device = steps.meter.catalogued
    if device is not None:
        reporter.log_note("device", f"{device.name}, {device.peak_text()}")
    if steps.uses_native_rng:
        reporter.log_note("random", NATIVE_RNG_NOTE)
