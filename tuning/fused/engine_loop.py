"""The computing thread of an engine, and all that only this thread may touch.

It trains the trials in their slots, chunk by chunk, and runs commands of other threads between two
chunks. A trial goes on while Tune decides about its last evaluation, up to its next one: nothing
that Tune does stalls the device. What a stopped trial did after its last evaluation is discarded.

Trials that differ in batched values only share the slots of a program. Programs take turns. A trial
that finds all slots of its program taken waits.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from cluster.base.errors import TrainingError
from trainers.checks.finite import not_finite, state_not_finite
from trainers.data.remote import local_dataset
from trainers.data.splits import open_splits
from trainers.devices import local_device
from trainers.engine.evaluate import check_ranking, evaluate, splits_due
from trainers.engine.heartbeat import heartbeat, stall_watchdog
from trainers.engine.host_memory import keep_freed_memory
from trainers.engine.metrics import MetricsError
from trainers.engine.out_of_memory import is_out_of_memory
from trainers.engine.stall_files import STALLS
from trainers.modeling.forward import Forward
from trainers.modeling.optimizer import learning_rate
from trainers.runs.failure_policy import format_error, is_outage, log_traceback
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker
from trainers.workload import Batch
from tuning.fused.engine_trial import EngineTrial, SupersededError, TrialRegistry
from tuning.fused.program_pool import ProgramPool, ProgramSlots
from tuning.fused.trial_saver import TrialSaver
from tuning.programs.program import Program, TrialMismatchError
from tuning.programs.trial_state import TrialState
from tuning.trials.trial import Sweep, set_threads

CHUNK_S = 0.02
"""About how long the device computes before the thread looks for commands."""

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class EngineLoop:
    """The state and the work of the computing thread.

    Other threads call `post` and `call`, and nothing else. All other methods run in the computing
    thread, where `run` or a command calls them. The trials themselves are shared: see
    `EngineTrial` and `TrialRegistry`.
    """

    def __init__(
        self, sweep: Sweep, slots: int, trials: TrialRegistry, program: Program | None
    ) -> None:
        """`slots` are those of each program. Without a `program`, `run` first compiles one."""
        self._sweep = sweep
        self._spec, _ = resolve(sweep.spec_data, RunSpec)
        device = local_device(self._spec.scale.accelerator)
        self._worker = Worker(hardware=device)
        self._splits: dict[Path, dict[str, Batch]] = {}
        """The splits of each data set that trials have used."""
        self._splits_of(self._spec)

        def samples_of(spec: RunSpec) -> Batch:
            return self._splits_of(spec)["train"]

        self._pool = ProgramPool(sweep, slots, samples_of, device, program)
        self._saver = TrialSaver(self._spec, trials)
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        if program is None:
            self._commands.put(self._pool.compile_reference_program)

    def _splits_of(self, spec: RunSpec) -> dict[str, Batch]:
        """The data set of a trial with this spec."""
        dataset = self._sweep.dataset_of(spec)
        if dataset not in self._splits:
            self._splits[dataset] = open_splits(local_dataset(dataset, spec))
        return self._splits[dataset]

    # What other threads call.

    def post(self, command: Callable[[], None]) -> None:
        """Have the computing thread run a command, which must not raise, between two chunks."""
        self._commands.put(command)

    def call(self, action: Callable[[], T]) -> T:
        """Run an action in the computing thread; returns or raises what it does."""
        answer: Future[T] = Future()

        def command() -> None:
            try:
                answer.set_result(action())
            except BaseException as error:  # it is raised where the answer is waited for
                answer.set_exception(error)

        self._commands.put(command)
        return answer.result()

    # Commands.

    def request_next(self, trial: EngineTrial) -> None:
        """Tune waits for a trial's next evaluation."""
        trial.result_requested = True
        if trial.program_slots is None and not trial.ended:
            self._pool.wait_for_slot(trial)

    def stop(self, trial: EngineTrial) -> None:
        """End a trial, and begin to save its last evaluated state."""
        trial.results.put(SupersededError(trial.lease))  # for a call that still waits
        try:
            if not trial.ended:
                trial.ended = True
                self._pool.stop_waiting(trial)
                self._saver.save(trial)
        finally:
            self._pool.free(trial)

    # The loop.

    def run(self) -> None:
        """Train for ever; an outage or an unforeseen error ends the process."""
        try:
            set_threads(self._sweep)
            keep_freed_memory()
            stalls, timeout_s = self._sweep.folder / STALLS, self._spec.train.stall_timeout_s
            with stall_watchdog(stalls, 0, 1, timeout_s):
                while True:
                    self._load_waiting()
                    busy = [self._run_chunk(each) for each in self._pool.programs]
                    self._save_periodically()
                    self._run_commands(wait=not any(busy))
        except BaseException:  # Ray starts the engine again, and its trials resume
            _logger.exception("the engine's thread failed; its process ends")
            os._exit(1)

    def _run_commands(self, wait: bool) -> None:
        """Run the commands that have been posted; `wait` until there is one."""
        while wait and self._commands.empty():
            heartbeat()
            with contextlib.suppress(Empty):
                self._commands.get(timeout=1.0)()
                wait = False
        while not self._commands.empty():
            self._commands.get()()

    def _load_waiting(self) -> None:
        for trial in self._pool.waiting:
            try:
                loaded = self._pool.load(trial)
            except Exception as error:  # of the user's model, or of a checkpoint
                self._fail_by(trial, error)
                continue
            # It may have been saved after an evaluation that Tune was not told of.
            if loaded and trial.unreported_evaluation:
                self._evaluate(trial)

    def _run_chunk(self, held: ProgramSlots) -> bool:
        """Do some steps of one program; False if none of its trials can go on."""
        ready = {slot: trial for slot, trial in [*held.trials.items()] if self._can_step(trial)}
        if not ready:
            return False
        steps = min(trial.next_evaluation_step - trial.steps_done for trial in ready.values())
        steps = max(1, min(steps, round(CHUNK_S / held.step_s)))
        heartbeat(max(trial.steps_done for trial in ready.values()))
        began = time.perf_counter()
        mismatches: Mapping[int, str] = {}
        try:
            losses = held.program.run(list(ready), steps)
        except TrialMismatchError as error:
            losses, mismatches = error.losses, error.reasons
        except Exception as error:
            reason = None
            if is_out_of_memory(error):
                reason = f"out of memory with {held.program.slots} slots; try fewer in sweep.fuse"
            for trial in ready.values():
                self._fail_by(trial, error, reason)
            return True
        spent_s = time.perf_counter() - began
        held.step_s = spent_s / steps
        sharing = self._pool.trials_in_slots()
        for column, trial in enumerate(ready.values()):
            trial.steps_s += spent_s
            trial.device_s += spent_s / sharing
            if trial.slot in mismatches:
                self._fail(trial, f"{mismatches[trial.slot]}; set sweep.fuse: off")
            else:
                self._record_losses(trial, [row[column] for row in losses])
        for trial in ready.values():
            if trial.evaluation_due:
                self._evaluate(trial)
        return True

    def _can_step(self, trial: EngineTrial) -> bool:
        """Whether a trial has steps to do before its next evaluation; evaluates it if it is due."""
        if trial.evaluation_due:
            self._evaluate(trial)
        return not trial.ended and trial.steps_done < trial.next_evaluation_step

    def _record_losses(self, trial: EngineTrial, losses: list[float]) -> None:
        spec = trial.variant.spec
        for loss in losses:
            trial.steps_done += 1
            step = trial.steps_done
            if not math.isfinite(loss):
                assert trial.program_slots is not None
                failed = trial.program_slots.program.failed_loss(trial.slot)
                self._fail(trial, not_finite(failed, step, trial.last_finite))
                return
            trial.last_finite = loss
            trial.loss_sum, trial.losses = trial.loss_sum + loss, trial.losses + 1
            if step % spec.tracking.every_steps == 0 or step in trial.evaluation_steps:
                samples = len(next(iter(self._splits_of(spec)["train"].values())))
                rate = learning_rate(spec.optimizer, step - 1, trial.variant.total_steps)
                measured = {
                    "train/loss": trial.loss_sum / trial.losses,
                    "train/lr": rate,
                    "train/epoch": step * spec.train.global_batch / samples,
                }
                trial.loss_sum, trial.losses = 0.0, 0
                trial.reporter.log_metrics(measured, step)
        trial.reporter.on_step_end(trial.steps_done)

    def _evaluate(self, trial: EngineTrial) -> None:
        """Evaluate a trial at its present step, save it if due, and report the result to Tune."""
        assert trial.program_slots is not None
        began = time.perf_counter()
        state = trial.program_slots.program.state_of(trial.slot).copy()
        steps = state.steps_done - trial.evaluated_step
        spoilt = trial.program_slots.program.not_finite(state)
        if spoilt:
            self._fail(trial, state_not_finite(spoilt, state.steps_done))
            return
        try:
            found = self._evaluation_metrics(trial, state)
            trial.metrics |= found
            result = trial.progress.result(trial.metrics, state.steps_done)
        except Exception as error:
            mistake = error.error if isinstance(error, MetricsError) else error
            self._fail_by(trial, mistake)
            return
        trial.reporter.log_metrics(found, state.steps_done)
        if steps > 0 and trial.steps_s:
            trial.device_s += time.perf_counter() - began
            self._report_performance(trial, steps, state.steps_done)
        trial.steps_s = 0.0
        result["device_s"] = trial.device_s
        trial.evaluated_state = state
        trial.saved_scalars = {
            "loss_sum": trial.loss_sum,
            "losses": trial.losses,
            "device_s": trial.device_s,
        }
        save = self._saver.save if result["complete"] else self._saver.save_if_due
        if not self._saved(trial, save):
            return
        if state.steps_done > trial.reported_step or result["complete"]:
            trial.reported_step, trial.result_requested = state.steps_done, False
            trial.results.put(result)
        if result["complete"]:
            trial.ended = True
            self._pool.free(trial)

    def _evaluation_metrics(self, trial: EngineTrial, state: TrialState) -> dict[str, float]:
        """The metrics of the splits that are due at the state's step."""
        assert trial.program_slots is not None
        variant, step = trial.variant, state.steps_done
        network = trial.program_slots.program.network_with(state)
        forward = Forward(variant.workload, network)
        found: dict[str, float] = {}
        splits = self._splits_of(variant.spec)
        for split in splits_due(step, variant.total_steps, trial.evaluation_steps, splits):
            samples = splits[split]
            means = evaluate(variant.spec, variant.workload, forward, samples, self._worker)
            found |= {f"{split}/{name}": mean for name, mean in means.items()}
        check_ranking(variant.spec, found)
        return found

    def _report_performance(self, trial: EngineTrial, steps: int, step: int) -> None:
        """Log the speed of the `steps` steps that ended at `step`."""
        assert trial.program_slots is not None
        step_s = trial.steps_s / steps
        perf = {
            "step_s": step_s,
            "samples_per_s": trial.variant.spec.train.global_batch / step_s,
            "device_s": trial.device_s,
            "shared_by": float(len(trial.program_slots.trials)),
        }
        trial.reporter.log_metrics({f"perf/{name}": value for name, value in perf.items()}, step)

    def _save_periodically(self) -> None:
        """From time to time save all trials: the engine may be lost."""
        if not self._saver.periodic_save_due():
            return
        began = time.monotonic()
        for trial in self._saver.saved_periodically():
            self._saved(trial, self._saver.save)
        self._saver.schedule_next(began)

    def _saved(self, trial: EngineTrial, save: Callable[[EngineTrial], None]) -> bool:
        """Save a trial; if that fails, `_fail_by` decides."""
        try:
            save(trial)
        except Exception as error:
            self._fail_by(trial, error)
            return False
        return True

    def _fail_by(self, trial: EngineTrial, error: Exception, reason: str | None = None) -> None:
        """End a trial with the line of its error, or with `reason`.

        An outage is raised instead: it ends this process, and the trials are started again.
        """
        if is_outage(error):
            raise error
        log_traceback(self._sweep.folder, error)
        self._fail(trial, reason or format_error(error))

    def _fail(self, trial: EngineTrial, reason: str) -> None:
        trial.ended = True
        self._pool.stop_waiting(trial)
        self._pool.free(trial)
        trial.results.put(TrainingError(reason))
