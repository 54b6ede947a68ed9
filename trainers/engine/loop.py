"""The training loop, read top to bottom.

`trainers.engine.step` has what happens in a step; this is what happens around the steps. All of
it is a function of (spec, step, state), so that a run that was killed and resumed ends with the
same weights as one that was not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checks.finite import listed
from trainers.checks.modes import held_in_evaluation, normalises_batches
from trainers.data.splits import count_samples, open_splits
from trainers.engine.coordination import LossWindow, SaveSchedule, StepCoordinator
from trainers.engine.evaluate import Evaluator
from trainers.engine.heartbeat import heartbeat
from trainers.engine.host_memory import keep_freed_memory
from trainers.engine.reporter import Reporter
from trainers.engine.step import TrainStep
from trainers.modeling.dropout import NATIVE_RNG_NOTE
from trainers.outcome import Outcome
from trainers.run_folder import CHECKPOINTS
from trainers.spec import RunSpec, spec_parts
from trainers.stores import external_wait
from trainers.torch_internals import compile_time_s
from trainers.worker import Worker
from trainers.workload import Batch, Workload

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

    Where the spec changes, the state is saved, and the model and optimizer are built once more.
    """
    keep_freed_memory()
    worker = worker or Worker()
    total = spec.train.total_steps(count_samples(dataset, "train"))
    parts = [part for part in spec_parts(spec, workload) if part[0] < total]
    ends = [first for first, *_ in parts[1:]] + [total]
    begin = 0
    if len(parts) > 1:
        done = Checkpoints(folder / CHECKPOINTS, spec.checkpoint, worker).newest_step()
        begin = next((n for n, end in enumerate(ends) if done < end), len(ends) - 1)
    splits = open_splits(dataset)
    for number in range(begin, len(parts)):
        first, part_spec, part_workload = parts[number]
        part = _Part(part_spec, part_workload, splits, first, ends[number], number > begin)
        outcome = _train_part(part, total, folder, reporter, worker, started)
        if outcome.step < ends[number]:
            break
    return outcome


@dataclass(frozen=True)
class _Part:
    """The steps of a run between two changes of its spec, or all of them."""

    spec: RunSpec
    workload: Workload
    splits: Mapping[str, Batch]
    first: int
    """Step after which the spec changed to this one; 0 where the run begins."""
    end: int
    follows: bool
    """Whether this process has just trained the part before."""


def _train_part(
    part: _Part,
    total: int,
    folder: Path,
    reporter: Reporter,
    worker: Worker,
    started: float | None,
) -> Outcome:
    """Train from the latest checkpoint to the end of a part of the run's `total` steps."""
    spec, workload, splits = part.spec, part.workload, part.splits
    samples = len(next(iter(splits["train"].values())))
    steps = TrainStep(spec, workload, splits["train"], worker, total, started)
    worker, meter = steps.worker, steps.meter
    with Checkpoints(folder / CHECKPOINTS, spec.checkpoint, worker) as checkpoints:
        start, scalars = steps.resume(checkpoints, changed_at=part.first or None)
        evaluator = Evaluator(spec, workload, splits, steps, reporter)
        saves = SaveSchedule(spec.checkpoint, part.end, evaluator.steps, worker)
        coordinator = StepCoordinator(worker, reporter, start)
        losses = LossWindow(worker, scalars, skips=spec.train.on_nonfinite == "skip")
        _log_start(steps, checkpoints, reporter)
        evaluator.resume(start, checkpoints, reported=part.follows)
        done = start
        for step in range(start, part.end):
            heartbeat(step)
            done = step + 1
            losses.add(steps.run(step), steps.fault, done)
            _log_findings(spec, steps, reporter, first=step == start)
            if step < start + 2:
                _log_unsaved(steps, checkpoints, reporter, second=step > start)
            decision = coordinator.decide(done, saves.is_due)
            evaluates = done in evaluator.steps
            if evaluates or done % spec.tracking.every_steps == 0:
                progress = {"train/epoch": done * spec.train.global_batch / samples}
                progress |= _step_metrics(steps, losses, step, evaluates)
                reporter.log_metrics(progress, done)
            evaluated = evaluator.run(done)
            if decision.saves or saves.is_scheduled(done) or evaluator.mistake:
                state = losses.state_dict(done) | meter.state_dict(stopped=decision.stop)
                blocked_s = steps.save(checkpoints, done, state, evaluated, reporter.flush)
                saves.record_save(done, blocked_s, reporter)
            evaluator.raise_mistake()
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


def _step_metrics(
    steps: TrainStep, losses: LossWindow, step: int, evaluates: bool
) -> dict[str, float]:
    """The mean loss, the learning rate, and where the time goes if that is due. Collective."""
    metrics = {"train/loss": losses.mean(step + 1), "train/lr": steps.learning_rate(step)}
    steps.meter.mark("compute")  # a GPU has been waited for
    if evaluates or steps.meter.unreported_s() > PERF_INTERVAL_S:
        metrics |= steps.read_meter()
    if losses.skipped:
        metrics["train/skipped_steps"] = losses.skipped
    return metrics


def _log_start(steps: TrainStep, checkpoints: Checkpoints, reporter: Reporter) -> None:
    """Log what was taken from another run, and how the model is spread over several workers."""
    if checkpoints.taken is not None:
        reporter.log_note("from", checkpoints.taken)
    if steps.worker.world_size > 1:
        reporter.log_note("parallel", f"{steps.strategy.mode}: {steps.strategy.reason}")


def _log_unsaved(
    steps: TrainStep, checkpoints: Checkpoints, reporter: Reporter, second: bool
) -> None:
    """Log what steps change and checkpoints do not hold. The first step may only fill a cache."""
    unsaved = checkpoints.unsaved(steps.network)
    if unsaved and second:
        reporter.log_note(
            "state",
            f"steps change {listed(unsaved)}, which checkpoints do not hold; if it is not a cache, "
            "make it a buffer (register_buffer), or return it by get_extra_state",
        )


def _log_findings(spec: RunSpec, steps: TrainStep, reporter: Reporter, first: bool) -> None:
    """Log what is known only when a step has been done, the `first` one or another."""
    if steps.draws_unreported():
        reporter.log_note("random", NATIVE_RNG_NOTE)
    if not first:
        return
    if spec.train.compile != "off":
        reporter.log_note("compile", f"{compile_time_s():.1f} s")
    device = steps.meter.catalogued
    if device is not None:
        reporter.log_note("device", f"{device.name}, {device.peak_text()}")
    evaluating = held_in_evaluation(steps.network)
    if evaluating:
        names = listed([name or "the whole model" for name in evaluating])
        reporter.log_note("modes", f"in evaluation mode, as build left it: {names}")
    together, batch = steps.samples_at_once, spec.train.global_batch
    if together < batch and normalises_batches(steps.network):
        reporter.log_note(
            "batch norm",
            f"statistics of {together} samples at a time, not of the {batch} of a step: other "
            "numbers of workers, or another train.micro_batch, change the results",
        )
