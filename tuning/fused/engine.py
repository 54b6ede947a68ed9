"""An engine: one device, and the trials of a sweep that are trained on it as slots of programs.

One thread does all that is computed, and all that is asked for between two chunks of steps; the
threads that wait for a trial's next evaluation only wait. A trial goes on while Ray Tune decides
about its last evaluation, up to its next one: nothing that Tune does stalls the device. What a
trial that is stopped did beyond its last evaluation is thrown away.

Trials that are one program but for numbers share a program's slots; where there are several
programs they take turns, chunk by chunk. A trial that finds all slots of its program taken waits.
"""

import bisect
import contextlib
import json
import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from uuid import uuid4

from torch import nn

from cluster.base.errors import TrainingError
from cluster.base.files import write_atomic
from cluster.connection.run_gauges import set_gauge
from trainers.checkpoints.checkpoints import Checkpoints, save_interval_s
from trainers.data.remote import local_dataset
from trainers.data.splits import count_samples, open_splits
from trainers.devices import local_device
from trainers.engine.coordination import FIRST_SAVE_S
from trainers.engine.evaluate import evaluate, splits_due
from trainers.engine.heartbeat import heartbeat, stall_watchdog
from trainers.engine.out_of_memory import is_out_of_memory
from trainers.engine.stall_files import STALLS
from trainers.modeling.build import build_network
from trainers.modeling.optimizer import build_optimizer, learning_rate
from trainers.run_folder import CHECKPOINTS
from trainers.runs.worker_errors import format_error
from trainers.spec import RunSpec, resolve
from trainers.tracking.reporter import TrackerReporter
from trainers.worker import Worker
from tuning.fused.fusion_plan import reference_variant, varied_floats
from tuning.fused.program import Program, TrialMismatchError, TrialState
from tuning.fused.program_signature import Variant
from tuning.trials.trial import (
    ENDED_FILE,
    FAILED_FILE,
    LAST_RESULT_FILE,
    Sweep,
    TuneReporter,
    set_threads,
)

CHUNK_S = 0.02
"""About how long the device computes before it is asked again what else there is to do."""
REPORT_S = 5.0
"""Seconds between what a trial sends to the tracker: there are many trials, and MLflow takes 10 to
30 ms for each of them whatever it is sent."""
IDLE_PROGRAMS = 4
"""Programs without trials that are kept for the next one."""
LEASE = "lease"
ORIGIN = "origin.json"
"""Beside a checkpoint that Tune hands from trial to trial: whose it is."""

T = TypeVar("T")


@dataclass
class _EngineTrial:
    """A trial on this engine."""

    number: int
    lease: str
    """Of who trains the trial: its folder has that of the last one who took it."""
    variant: Variant
    folder: Path
    progress: TuneReporter
    reporter: TrackerReporter
    checkpoints: Checkpoints
    evaluation_steps: set[int]
    results: "SimpleQueue[dict[str, Any] | TrainingError]" = field(default_factory=SimpleQueue)
    result_requested: bool = False
    """Whether Tune waits for its next evaluation."""
    steps_done: int = 0
    reported_step: int = 0
    """The last step whose evaluation Tune knows of."""
    network: nn.Module | None = None
    """As built, while the trial waits for a slot of `group`."""
    program_slots: "_ProgramSlots | None" = None
    slot: int = -1
    ended: bool = False
    donor_state: TrialState | None = None
    """Another trial's state to begin with, on this device."""
    evaluated_state: TrialState | None = None
    """Its state at the last evaluation: what a save keeps, and another trial may take over."""
    metrics: dict[str, float] = field(default_factory=dict)
    saved_step: int = -1
    loss_sum: float = 0.0
    losses: int = 0
    last_finite: float = math.nan
    saved_counters: dict[str, float] = field(default_factory=dict)
    """What a save at `evaluated` keeps besides."""
    device_s: float = 0.0
    """The engine's time, divided by the trials that shared it."""
    steps_s: float = 0.0
    """The engine's time since the last evaluation, undivided."""

    def __post_init__(self) -> None:
        self._order = sorted(self.evaluation_steps)

    @property
    def next_evaluation_step(self) -> int:
        """The step of its next evaluation; that of the last one after it."""
        place = bisect.bisect_right(self._order, self.evaluated_step)
        return self._order[min(place, len(self._order) - 1)]

    @property
    def evaluated_step(self) -> int:
        return self.evaluated_state.steps_done if self.evaluated_state is not None else 0


@dataclass
class _ProgramSlots:
    """A program, and who is in its slots."""

    program: Program
    trials: dict[int, _EngineTrial] = field(default_factory=dict)
    step_s: float = 1e-3

    def free_slot(self) -> int | None:
        empty = [slot for slot in range(self.program.slots) if slot not in self.trials]
        return empty[0] if empty else None


class Engine:
    """Trains trials in slots; `next` gives a trial's next evaluation."""

    def __init__(
        self, sweep: Sweep, tracker: Any, slots: int, program: Program | None = None
    ) -> None:
        """With `program`, compiled, or else with one that it compiles for the usual trial."""
        self._sweep, self._tracker, self._slots = sweep, tracker, slots
        self._spec, _ = resolve(sweep.spec_data, RunSpec)
        self.device = local_device(self._spec.scale.accelerator)
        self._worker = Worker(hardware=self.device)
        self.splits = open_splits(local_dataset(sweep.dataset, self._spec))
        self._samples = count_samples(sweep.dataset, "train")
        self._trials: dict[str, _EngineTrial] = {}
        self._waiting: list[_EngineTrial] = []
        self._programs = [_ProgramSlots(program)] if program else []
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._next_save = time.monotonic() + FIRST_SAVE_S
        if program is None:
            self._commands.put(self._compile_reference_program)
        threading.Thread(target=self._run_thread, daemon=True, name="engine").start()

    # What the threads of the trials ask for.

    def start(self, config: Mapping[str, Any]) -> str:
        """Take a trial, from its newest checkpoint if it has one; returns the lease.

        Tune may resume a trial before it has ended what it paused: whoever took it before does
        not save it any more.
        """
        number, lease = int(config["trial"]), uuid4().hex
        folder = self._sweep.trial_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        for other in [run for run in self._trials.values() if run.number == number]:
            self.stop(other.lease)
        write_atomic(folder / LEASE, lease)
        spec, workload = resolve(self._sweep.trial_spec_data(config), RunSpec)
        total = spec.train.total_steps(self._samples)
        run = _EngineTrial(
            number,
            lease,
            Variant(spec, workload, total),
            folder,
            TuneReporter(self._sweep, spec, folder),
            TrackerReporter(self._tracker, self._sweep.trial_key(number), REPORT_S),
            Checkpoints(folder / CHECKPOINTS, spec.checkpoint),
            spec.train.evaluation_steps(self._samples),
        )
        last = (
            json.loads((folder / LAST_RESULT_FILE).read_text())
            if (folder / LAST_RESULT_FILE).exists()
            else {}
        )
        run.reported_step = last.get("step", 0)
        if (folder / FAILED_FILE).exists():  # what a second attempt would not change
            run.results.put(TrainingError((folder / FAILED_FILE).read_text()))
        elif last and ((folder / ENDED_FILE).exists() or last["complete"]):
            run.results.put(last)
        run.ended = not run.results.empty()
        self._trials[lease] = run
        return lease

    def next(self, lease: str) -> dict[str, Any]:
        """Wait for a trial's next evaluation; Tune wants it to go on, which it has by then."""
        run = self._trials[lease]
        self._commands.put(lambda: self._request_next(run))
        found = run.results.get()
        if isinstance(found, TrainingError):
            write_atomic(run.folder / FAILED_FILE, str(found))
            raise found
        if found["complete"]:
            run.checkpoints.wait()
            run.reporter.flush()
        write_atomic(run.folder / LAST_RESULT_FILE, json.dumps(found))
        return {**found, "done": found["complete"]}

    def stop(self, lease: str) -> None:
        """End a trial here; its state at the last evaluation is on disk when this returns."""
        run = self._trials.pop(lease, None)
        if run is not None:
            self._call(lambda: self._stop(run))
            run.checkpoints.wait()
            run.reporter.flush()

    def save(self, lease: str, folder: Path) -> None:
        """Write a trial's state at its last evaluation into a folder of Tune's."""
        run = self._trials[lease]
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        self._call(lambda: self._save_to(run, checkpoints))
        checkpoints.wait()
        write_atomic(folder / ORIGIN, json.dumps({"trial": run.number, "step": run.evaluated_step}))

    def load(self, lease: str, folder: Path) -> None:
        """Go on from what `save` wrote for another trial, or for this one."""
        run = self._trials[lease]
        origin = json.loads((folder / ORIGIN).read_text())
        self._call(lambda: self._import_checkpoint(run, folder, origin))

    def _call(self, action: Callable[[], T]) -> T:
        """Have the computing thread do something between two chunks; its result or its error."""
        answer: Future[T] = Future()

        def command() -> None:
            try:
                answer.set_result(action())
            except BaseException as error:  # it is raised where the answer is waited for
                answer.set_exception(error)

        self._commands.put(command)
        return answer.result()

    # What the computing thread does.

    def _run_thread(self) -> None:
        try:
            self._train_forever()
        except BaseException:  # a mistake of ours: Ray starts the engine again, its trials resume
            traceback.print_exc()
            os._exit(1)

    def _train_forever(self) -> None:
        set_threads(self._sweep)
        with stall_watchdog(self._sweep.folder / STALLS, 0, 1, self._spec.train.stall_timeout_s):
            while True:
                self._load_waiting()
                busy = (
                    sum(self._run_chunk(group) for group in self._programs) > 0
                )  # all take their turn
                self._save_when_due()
                self._run_commands(wait=not busy)

    def _run_commands(self, wait: bool) -> None:
        """Do what has been asked for; `wait` until something is."""
        while wait and self._commands.empty():
            heartbeat()
            with contextlib.suppress(Empty):
                self._commands.get(timeout=1.0)()
                wait = False
        while not self._commands.empty():
            self._commands.get()()

    def _compile_reference_program(self) -> None:
        variant = reference_variant(self._sweep)
        with contextlib.suppress(Exception):  # the trial that meets it again will tell
            self._program_for(variant, build_network(variant.spec.train, variant.workload))

    def _request_next(self, run: _EngineTrial) -> None:
        run.result_requested = True
        if run.program_slots is None and not run.ended:
            self._waiting.append(run)

    def _load_waiting(self) -> None:
        for run in list(self._waiting):
            try:
                if self._load_into_slot(run):
                    self._waiting.remove(run)
            except Exception as error:  # of the user's model, or a checkpoint's
                self._waiting.remove(run)
                self._fail(run, format_error(error))

    def _load_into_slot(self, run: _EngineTrial) -> bool:
        """Give a trial a slot; False when those of its program are taken."""
        spec, workload = run.variant.spec, run.variant.workload
        if run.network is None:
            run.network = build_network(spec.train, workload)
            run.program_slots = self._program_for(run.variant, run.network)
        assert run.program_slots is not None
        group, slot = run.program_slots, run.program_slots.free_slot()
        if slot is None:
            return False
        network, run.network = run.network, None
        optimizer = build_optimizer(spec.optimizer, network)
        done, numbers = run.checkpoints.resume(network, optimizer)
        row = group.program.state_from(network, optimizer, done) if done else None
        if run.donor_state is not None and run.donor_state.steps_done == done:
            row = run.donor_state  # from slot to slot, without the way through the host
        group.program.load_trial(slot, run.variant, network, row)
        group.trials[slot] = run
        self._export_slot_gauges()
        run.slot, run.steps_done, run.saved_step = slot, done, done
        run.loss_sum, run.losses = numbers.get("loss_sum", 0.0), int(numbers.get("losses", 0))
        run.device_s = numbers.get("device_s", 0.0)
        run.evaluated_state = group.program.state_of(slot).copy() if done else None
        run.saved_counters = dict(numbers)
        if run.steps_done == run.variant.total_steps:  # it had ended, but nobody had heard of it
            self._evaluate(run)
        return True

    def _program_for(self, variant: Variant, network: nn.Module) -> _ProgramSlots:
        for group in self._programs:
            if group.program.fits(variant, network):
                return group
        awaited = [run.program_slots for run in self._waiting]
        idle = [group for group in self._programs if not group.trials and group not in awaited]
        for group in idle[: len(idle) - IDLE_PROGRAMS + 1]:
            self._programs.remove(group)
        varied = varied_floats(self._sweep, variant)
        program = Program(variant, self._slots, self.splits["train"], self.device, varied)
        program.compile()
        self._programs.append(_ProgramSlots(program))
        return self._programs[-1]

    def _run_chunk(self, group: _ProgramSlots) -> bool:
        """A chunk of steps of one program; False when none of its trials can go on."""
        ready = {slot: run for slot, run in [*group.trials.items()] if self._is_runnable(run)}
        if not ready:
            return False
        steps = min(run.next_evaluation_step - run.steps_done for run in ready.values())
        steps = max(1, min(steps, round(CHUNK_S / group.step_s)))
        heartbeat(max(run.steps_done for run in ready.values()))
        began = time.perf_counter()
        strangers: Mapping[int, str] = {}
        try:
            losses = group.program.run(list(ready), steps)
        except TrialMismatchError as error:
            losses, strangers = error.losses, error.reasons
        except Exception as error:
            reason = format_error(error)
            if is_out_of_memory(error):
                reason = f"out of memory with {group.program.slots} slots; try fewer in sweep.fuse"
            for run in ready.values():
                self._fail(run, reason)
            return True
        spent_s = time.perf_counter() - began
        group.step_s = spent_s / steps
        live = sum(len(each.trials) for each in self._programs)
        for column, run in enumerate(ready.values()):
            run.steps_s += spent_s
            run.device_s += spent_s / live
            if run.slot in strangers:
                self._fail(run, f"{strangers[run.slot]}; set sweep.fuse: off")
            else:
                self._record_losses(run, [row[column] for row in losses])
        for run in ready.values():
            if (
                not run.ended
                and run.steps_done == run.next_evaluation_step
                and run.result_requested
            ):
                self._evaluate(run)
        return True

    def _is_runnable(self, run: _EngineTrial) -> bool:
        """Whether a trial has steps to do before its next evaluation; evaluates it if it is due."""
        if run.steps_done == run.next_evaluation_step and run.result_requested and not run.ended:
            self._evaluate(run)
        return not run.ended and run.steps_done < run.next_evaluation_step

    def _record_losses(self, run: _EngineTrial, losses: list[float]) -> None:
        spec = run.variant.spec
        for loss in losses:
            run.steps_done += 1
            if not math.isfinite(loss):
                last = f"the last finite one was {run.last_finite:.6g}"
                self._fail(run, f"the loss is {loss} at step {run.steps_done} ({last})")
                return
            run.last_finite = loss
            run.loss_sum, run.losses = run.loss_sum + loss, run.losses + 1
            if (
                run.steps_done % spec.tracking.every_steps == 0
                or run.steps_done in run.evaluation_steps
            ):
                measured = {
                    "train/loss": run.loss_sum / run.losses,
                    "train/lr": learning_rate(
                        spec.optimizer, run.steps_done - 1, run.variant.total_steps
                    ),
                    "train/epoch": run.steps_done * spec.train.global_batch / self._samples,
                }
                run.loss_sum, run.losses = 0.0, 0
                run.reporter.log_metrics(measured, run.steps_done)
        run.reporter.on_step_end(run.steps_done)

    def _evaluate(self, run: _EngineTrial) -> None:
        """Evaluate a trial where it stands, and tell Tune of it."""
        assert run.program_slots is not None
        variant, program, began = run.variant, run.program_slots.program, time.perf_counter()
        row = program.state_of(run.slot).copy()
        steps = row.steps_done - run.evaluated_step
        network = program.network_with(row)
        found: dict[str, float] = {}
        try:
            for split in splits_due(
                row.steps_done, variant.total_steps, run.evaluation_steps, self.splits
            ):
                means = evaluate(
                    variant.spec, variant.workload, network, self.splits[split], self._worker
                )
                found |= {f"{split}/{name}": mean for name, mean in means.items()}
            run.metrics |= found
            result = run.progress.result(run.metrics, row.steps_done)
        except Exception as error:
            self._fail(run, format_error(error))
            return
        run.reporter.log_metrics(found, row.steps_done)
        if steps > 0 and run.steps_s:
            step_s = run.steps_s / steps
            perf = {"step_s": step_s, "samples_per_s": variant.spec.train.global_batch / step_s}
            run.device_s += time.perf_counter() - began
            perf |= {"device_s": run.device_s, "shared_by": float(len(run.program_slots.trials))}
            run.reporter.log_metrics(
                {f"perf/{name}": value for name, value in perf.items()}, row.steps_done
            )
        run.steps_s = 0.0
        result["device_s"] = run.device_s
        run.evaluated_state = row
        run.saved_counters = {
            "loss_sum": run.loss_sum,
            "losses": run.losses,
            "device_s": run.device_s,
        }
        if result["complete"] or self._is_save_due(run):
            self._save(run)
        if row.steps_done > run.reported_step or result["complete"]:
            run.reported_step, run.result_requested = row.steps_done, False
            run.results.put(result)
        if result["complete"]:
            run.ended = True
            self._free_slot(run)

    def _is_save_due(self, run: _EngineTrial) -> bool:
        """Whether the spec wants this evaluation on disk, whatever becomes of the trial."""
        spec = run.variant.spec.checkpoint
        every = spec.every_steps
        due = every != "auto" and run.evaluated_step - max(0, run.saved_step) >= every
        return due or spec.keep_best > 0

    def _save_when_due(self) -> None:
        """From time to time all trials: what a lost engine would lose is worth that much."""
        if time.monotonic() < self._next_save:
            return
        began = time.perf_counter()
        for run in self._trials.values():
            if run.variant.spec.checkpoint.every_steps == "auto":
                self._save(run)
        failure_s = self._spec.checkpoint.failure_every_hours * 3600
        every_s = save_interval_s(time.perf_counter() - began, failure_s)
        self._next_save = time.monotonic() + max(FIRST_SAVE_S, every_s)

    def _save(self, run: _EngineTrial) -> None:
        """Begin to write the state at the last evaluation, if it is not on disk yet."""
        if run.evaluated_state is None or run.saved_step >= run.evaluated_state.steps_done:
            return
        if (run.folder / LEASE).read_text() == run.lease:
            self._save_to(run, run.checkpoints)
            run.saved_step = run.evaluated_state.steps_done

    def _save_to(self, run: _EngineTrial, checkpoints: Checkpoints) -> None:
        if run.evaluated_state is None or run.program_slots is None:
            raise TrainingError(f"trial {run.number} has no evaluation to save")
        program, row = run.program_slots.program, run.evaluated_state
        network = program.network_with(row)
        checkpoints.save(
            row.steps_done,
            network,
            program.optimizer,
            run.saved_counters,
            run.metrics,
            run.reporter.flush,
        )

    def _import_checkpoint(
        self, run: _EngineTrial, folder: Path, origin: Mapping[str, int]
    ) -> None:
        source = Checkpoints(folder / CHECKPOINTS).latest()
        if source is None:
            raise TrainingError(f"{folder}: no checkpoint to go on from")
        self._free_slot(run)
        run.program_slots = None
        if origin["trial"] == run.number and run.saved_step == origin["step"]:
            return
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
        run.checkpoints.import_from(source)
        run.reported_step, run.evaluated_state = origin["step"], None
        for other in self._trials.values():
            if (other.number, other.evaluated_step) == (origin["trial"], origin["step"]):
                run.donor_state = other.evaluated_state

    def _stop(self, run: _EngineTrial) -> None:
        if not run.ended:
            run.ended = True
            with contextlib.suppress(ValueError):
                self._waiting.remove(run)
            self._save(run)
        self._free_slot(run)

    def _fail(self, run: _EngineTrial, reason: str) -> None:
        run.ended = True
        self._free_slot(run)
        run.results.put(TrainingError(reason))

    def _free_slot(self, run: _EngineTrial) -> None:
        """Make room in the slot of a trial."""
        if run.program_slots is not None and run.program_slots.trials.get(run.slot) is run:
            del run.program_slots.trials[run.slot]
            run.program_slots.program.free(run.slot)
            self._export_slot_gauges()

    def _export_slot_gauges(self) -> None:
        """Export how many slots there are, and in how many of them is a trial."""
        used = sum(len(group.trials) for group in self._programs)
        slots = sum(group.program.slots for group in self._programs)
        set_gauge("heliostat_slots", slots, self._sweep.key)
        set_gauge("heliostat_slots_in_use", used, self._sweep.key)
