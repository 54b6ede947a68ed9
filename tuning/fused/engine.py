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
from trainers.checkpoints.checkpoints import Checkpoints, interval_s
from trainers.data.dataset import open_splits, rows
from trainers.data.remote import here
from trainers.devices import local_device
from trainers.engine.coordination import FIRST_SAVE_S
from trainers.engine.evaluate import evaluate, splits_due
from trainers.engine.heartbeat import alive, watched
from trainers.engine.loop import milestones
from trainers.engine.optimizer import build_optimizer, learning_rate
from trainers.engine.out_of_memory import is_out_of_memory
from trainers.engine.stall_files import STALLS
from trainers.engine.step import build_network
from trainers.run_folder import CHECKPOINTS
from trainers.runs.ray_train import explain
from trainers.spec import RunSpec, resolve
from trainers.tracking.reporter import TrackerReporter
from trainers.worker import Worker
from tuning.fused.fusion_plan import usual_variant, varied_numbers
from tuning.fused.program import Program, Row, StrangersError
from tuning.fused.program_signature import Variant
from tuning.trials.trial import ENDED, FAILED, LAST, Progress, Sweep, set_threads

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
class _Run:
    """A trial on this engine."""

    number: int
    lease: str
    """Of who trains the trial: its folder has that of the last one who took it."""
    variant: Variant
    folder: Path
    progress: Progress
    reporter: TrackerReporter
    checkpoints: Checkpoints
    evaluations: set[int]
    results: "SimpleQueue[dict[str, Any] | TrainingError]" = field(default_factory=SimpleQueue)
    wanted: bool = False
    """Whether Tune waits for its next evaluation."""
    done: int = 0
    told: int = 0
    """The last step whose evaluation Tune knows of."""
    network: nn.Module | None = None
    """As built, while the trial waits for a slot of `group`."""
    group: "_Group | None" = None
    slot: int = -1
    over: bool = False
    adopted: Row | None = None
    """Another trial's state to begin with, on this device."""
    evaluated: Row | None = None
    """Its state at the last evaluation: what a save keeps, and another trial may take over."""
    metrics: dict[str, float] = field(default_factory=dict)
    saved: int = -1
    loss_sum: float = 0.0
    losses: int = 0
    last_finite: float = math.nan
    numbers: dict[str, float] = field(default_factory=dict)
    """What a save at `evaluated` keeps besides."""
    device_s: float = 0.0
    """The engine's time, divided by the trials that shared it."""
    steps_s: float = 0.0
    """The engine's time since the last evaluation, undivided."""

    def __post_init__(self) -> None:
        self._order = sorted(self.evaluations)

    @property
    def limit(self) -> int:
        """The step of its next evaluation; that of the last one after it."""
        place = bisect.bisect_right(self._order, self.evaluated_step)
        return self._order[min(place, len(self._order) - 1)]

    @property
    def evaluated_step(self) -> int:
        return self.evaluated.done if self.evaluated is not None else 0


@dataclass
class _Group:
    """A program, and who is in its slots."""

    program: Program
    runs: dict[int, _Run] = field(default_factory=dict)
    step_s: float = 1e-3

    def free(self) -> int | None:
        empty = [slot for slot in range(self.program.slots) if slot not in self.runs]
        return empty[0] if empty else None


class Engine:
    """Trains trials in slots; `next` gives a trial's next evaluation."""

    def __init__(
        self, sweep: Sweep, tracker: Any, slots: int, program: Program | None = None
    ) -> None:
        """With `program`, compiled, or else with one that it compiles for the usual trial."""
        self._sweep, self._tracker, self._slots = sweep, tracker, slots
        self._spec, _ = resolve(sweep.data, RunSpec)
        self.device = local_device(self._spec.scale.accelerator)
        self._worker = Worker(hardware=self.device)
        self.splits = open_splits(here(sweep.dataset, self._spec))
        self._samples = rows(sweep.dataset, "train")
        self._runs: dict[str, _Run] = {}
        self._waiting: list[_Run] = []
        self._groups = [_Group(program)] if program else []
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._next_save = time.monotonic() + FIRST_SAVE_S
        if program is None:
            self._commands.put(self._prepare)
        threading.Thread(target=self._work, daemon=True, name="engine").start()

    # What the threads of the trials ask for.

    def start(self, config: Mapping[str, Any]) -> str:
        """Take a trial, from its newest checkpoint if it has one; returns the lease.

        Tune may resume a trial before it has ended what it paused: whoever took it before does
        not save it any more.
        """
        number, lease = int(config["trial"]), uuid4().hex
        folder = self._sweep.trial_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        for other in [run for run in self._runs.values() if run.number == number]:
            self.stop(other.lease)
        write_atomic(folder / LEASE, lease)
        spec, workload = resolve(self._sweep.trial_spec(config), RunSpec)
        total = spec.train.total_steps(self._samples)
        run = _Run(
            number,
            lease,
            Variant(spec, workload, total),
            folder,
            Progress(self._sweep, spec, folder),
            TrackerReporter(self._tracker, self._sweep.trial_key(number), REPORT_S),
            Checkpoints(folder / CHECKPOINTS, spec.checkpoint),
            milestones(spec.train.evaluate_every, spec, self._samples),
        )
        last = json.loads((folder / LAST).read_text()) if (folder / LAST).exists() else {}
        run.told = last.get("step", 0)
        if (folder / FAILED).exists():  # what a second attempt would not change
            run.results.put(TrainingError((folder / FAILED).read_text()))
        elif last and ((folder / ENDED).exists() or last["complete"]):
            run.results.put(last)
        run.over = not run.results.empty()
        self._runs[lease] = run
        return lease

    def next(self, lease: str) -> dict[str, Any]:
        """Wait for a trial's next evaluation; Tune wants it to go on, which it has by then."""
        run = self._runs[lease]
        self._commands.put(lambda: self._want(run))
        found = run.results.get()
        if isinstance(found, TrainingError):
            write_atomic(run.folder / FAILED, str(found))
            raise found
        if found["complete"]:
            run.checkpoints.wait()
            run.reporter.flush()
        write_atomic(run.folder / LAST, json.dumps(found))
        return {**found, "done": found["complete"]}

    def stop(self, lease: str) -> None:
        """End a trial here; its state at the last evaluation is on disk when this returns."""
        run = self._runs.pop(lease, None)
        if run is not None:
            self._ask(lambda: self._stop(run))
            run.checkpoints.wait()
            run.reporter.flush()

    def save(self, lease: str, folder: Path) -> None:
        """Write a trial's state at its last evaluation into a folder of Tune's."""
        run = self._runs[lease]
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        self._ask(lambda: self._save_to(run, checkpoints))
        checkpoints.wait()
        write_atomic(folder / ORIGIN, json.dumps({"trial": run.number, "step": run.evaluated_step}))

    def load(self, lease: str, folder: Path) -> None:
        """Go on from what `save` wrote for another trial, or for this one."""
        run = self._runs[lease]
        origin = json.loads((folder / ORIGIN).read_text())
        self._ask(lambda: self._adopt(run, folder, origin))

    def _ask(self, action: Callable[[], T]) -> T:
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

    def _work(self) -> None:
        try:
            self._train_for_ever()
        except BaseException:  # a mistake of ours: Ray starts the engine again, its trials resume
            traceback.print_exc()
            os._exit(1)

    def _train_for_ever(self) -> None:
        set_threads(self._sweep)
        with watched(self._sweep.folder / STALLS, 0, 1, self._spec.train.stall_timeout_s):
            while True:
                self._admit_waiting()
                busy = sum(self._turn(group) for group in self._groups) > 0  # all take their turn
                self._save_when_due()
                self._obey(wait=not busy)

    def _obey(self, wait: bool) -> None:
        """Do what has been asked for; `wait` until something is."""
        while wait and self._commands.empty():
            alive()
            with contextlib.suppress(Empty):
                self._commands.get(timeout=1.0)()
                wait = False
        while not self._commands.empty():
            self._commands.get()()

    def _prepare(self) -> None:
        variant = usual_variant(self._sweep)
        with contextlib.suppress(Exception):  # the trial that meets it again will tell
            self._group_of(variant, build_network(variant.spec.train, variant.workload))

    def _want(self, run: _Run) -> None:
        run.wanted = True
        if run.group is None and not run.over:
            self._waiting.append(run)

    def _admit_waiting(self) -> None:
        for run in list(self._waiting):
            try:
                if self._admit(run):
                    self._waiting.remove(run)
            except Exception as error:  # of the user's model, or a checkpoint's
                self._waiting.remove(run)
                self._fail(run, explain(error))

    def _admit(self, run: _Run) -> bool:
        """Give a trial a slot; False when those of its program are taken."""
        spec, workload = run.variant.spec, run.variant.workload
        if run.network is None:
            run.network = build_network(spec.train, workload)
            run.group = self._group_of(run.variant, run.network)
        assert run.group is not None
        group, slot = run.group, run.group.free()
        if slot is None:
            return False
        network, run.network = run.network, None
        optimizer = build_optimizer(spec.optimizer, network)
        done, numbers = run.checkpoints.resume(network, optimizer)
        row = group.program.row_of(network, optimizer, done) if done else None
        if run.adopted is not None and run.adopted.done == done:
            row = run.adopted  # from slot to slot, without the way through the host
        group.program.admit(slot, run.variant, network, row)
        group.runs[slot] = run
        self._tell_slots()
        run.slot, run.done, run.saved = slot, done, done
        run.loss_sum, run.losses = numbers.get("loss_sum", 0.0), int(numbers.get("losses", 0))
        run.device_s = numbers.get("device_s", 0.0)
        run.evaluated = group.program.row(slot).copy() if done else None
        run.numbers = dict(numbers)
        if run.done == run.variant.total_steps:  # it had ended, but nobody had heard of it
            self._evaluate(run)
        return True

    def _group_of(self, variant: Variant, network: nn.Module) -> _Group:
        for group in self._groups:
            if group.program.fits(variant, network):
                return group
        awaited = [run.group for run in self._waiting]
        idle = [group for group in self._groups if not group.runs and group not in awaited]
        for group in idle[: len(idle) - IDLE_PROGRAMS + 1]:
            self._groups.remove(group)
        varied = varied_numbers(self._sweep, variant)
        program = Program(variant, self._slots, self.splits["train"], self.device, varied)
        program.compile()
        self._groups.append(_Group(program))
        return self._groups[-1]

    def _turn(self, group: _Group) -> bool:
        """A chunk of steps of one program; False when none of its trials can go on."""
        ready = {slot: run for slot, run in [*group.runs.items()] if self._goes_on(run)}
        if not ready:
            return False
        steps = min(run.limit - run.done for run in ready.values())
        steps = max(1, min(steps, round(CHUNK_S / group.step_s)))
        alive(max(run.done for run in ready.values()))
        began = time.perf_counter()
        strangers: Mapping[int, str] = {}
        try:
            losses = group.program.run(list(ready), steps)
        except StrangersError as error:
            losses, strangers = error.losses, error.strangers
        except Exception as error:
            reason = explain(error)
            if is_out_of_memory(error):
                reason = f"out of memory with {group.program.slots} slots; try fewer in sweep.fuse"
            for run in ready.values():
                self._fail(run, reason)
            return True
        spent_s = time.perf_counter() - began
        group.step_s = spent_s / steps
        live = sum(len(each.runs) for each in self._groups)
        for column, run in enumerate(ready.values()):
            run.steps_s += spent_s
            run.device_s += spent_s / live
            if run.slot in strangers:
                self._fail(run, f"{strangers[run.slot]}; set sweep.fuse: off")
            else:
                self._take_losses(run, [row[column] for row in losses])
        for run in ready.values():
            if not run.over and run.done == run.limit and run.wanted:
                self._evaluate(run)
        return True

    def _goes_on(self, run: _Run) -> bool:
        """Whether a trial has steps to do before its next evaluation; evaluates it if it is due."""
        if run.done == run.limit and run.wanted and not run.over:
            self._evaluate(run)
        return not run.over and run.done < run.limit

    def _take_losses(self, run: _Run, losses: list[float]) -> None:
        spec = run.variant.spec
        for loss in losses:
            run.done += 1
            if not math.isfinite(loss):
                last = f"the last finite one was {run.last_finite:.6g}"
                self._fail(run, f"the loss is {loss} at step {run.done} ({last})")
                return
            run.last_finite = loss
            run.loss_sum, run.losses = run.loss_sum + loss, run.losses + 1
            if run.done % spec.tracking.every_steps == 0 or run.done in run.evaluations:
                measured = {
                    "train/loss": run.loss_sum / run.losses,
                    "train/lr": learning_rate(
                        spec.optimizer, run.done - 1, run.variant.total_steps
                    ),
                    "train/epoch": run.done * spec.train.global_batch / self._samples,
                }
                run.loss_sum, run.losses = 0.0, 0
                run.reporter.log(measured, run.done)
        run.reporter.tick(run.done)

    def _evaluate(self, run: _Run) -> None:
        """Evaluate a trial where it stands, and tell Tune of it."""
        assert run.group is not None
        variant, program, began = run.variant, run.group.program, time.perf_counter()
        row = program.row(run.slot).copy()
        steps = row.done - run.evaluated_step
        network = program.network(row)
        found: dict[str, float] = {}
        try:
            for split in splits_due(row.done, variant.total_steps, run.evaluations, self.splits):
                means = evaluate(
                    variant.spec, variant.workload, network, self.splits[split], self._worker
                )
                found |= {f"{split}/{name}": mean for name, mean in means.items()}
            run.metrics |= found
            result = run.progress.result(run.metrics, row.done)
        except Exception as error:
            self._fail(run, explain(error))
            return
        run.reporter.log(found, row.done)
        if steps > 0 and run.steps_s:
            step_s = run.steps_s / steps
            perf = {"step_s": step_s, "samples_per_s": variant.spec.train.global_batch / step_s}
            run.device_s += time.perf_counter() - began
            perf |= {"device_s": run.device_s, "shared_by": float(len(run.group.runs))}
            run.reporter.log({f"perf/{name}": value for name, value in perf.items()}, row.done)
        run.steps_s = 0.0
        result["device_s"] = run.device_s
        run.evaluated = row
        run.numbers = {
            "loss_sum": run.loss_sum,
            "losses": run.losses,
            "device_s": run.device_s,
        }
        if result["complete"] or self._saves_here(run):
            self._save(run)
        if row.done > run.told or result["complete"]:
            run.told, run.wanted = row.done, False
            run.results.put(result)
        if result["complete"]:
            run.over = True
            self._leave(run)

    def _saves_here(self, run: _Run) -> bool:
        """Whether the spec wants this evaluation on disk, whatever becomes of the trial."""
        spec = run.variant.spec.checkpoint
        every = spec.every_steps
        due = every != "auto" and run.evaluated_step - max(0, run.saved) >= every
        return due or spec.keep_best > 0

    def _save_when_due(self) -> None:
        """From time to time all trials: what a lost engine would lose is worth that much."""
        if time.monotonic() < self._next_save:
            return
        began = time.perf_counter()
        for run in self._runs.values():
            if run.variant.spec.checkpoint.every_steps == "auto":
                self._save(run)
        failure_s = self._spec.checkpoint.failure_every_hours * 3600
        every_s = interval_s(time.perf_counter() - began, failure_s)
        self._next_save = time.monotonic() + max(FIRST_SAVE_S, every_s)

    def _save(self, run: _Run) -> None:
        """Begin to write the state at the last evaluation, if it is not on disk yet."""
        if run.evaluated is None or run.saved >= run.evaluated.done:
            return
        if (run.folder / LEASE).read_text() == run.lease:
            self._save_to(run, run.checkpoints)
            run.saved = run.evaluated.done

    def _save_to(self, run: _Run, checkpoints: Checkpoints) -> None:
        if run.evaluated is None or run.group is None:
            raise TrainingError(f"trial {run.number} has no evaluation to save")
        program, row = run.group.program, run.evaluated
        network = program.network(row)
        checkpoints.save(
            row.done, network, program.optimizer, run.numbers, run.metrics, run.reporter.flush
        )

    def _adopt(self, run: _Run, folder: Path, origin: Mapping[str, int]) -> None:
        source = Checkpoints(folder / CHECKPOINTS).newest()
        if source is None:
            raise TrainingError(f"{folder}: no checkpoint to go on from")
        self._leave(run)
        run.group = None
        if origin["trial"] == run.number and run.saved == origin["step"]:
            return
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
        run.checkpoints.adopt(source)
        run.told, run.evaluated = origin["step"], None
        for other in self._runs.values():
            if (other.number, other.evaluated_step) == (origin["trial"], origin["step"]):
                run.adopted = other.evaluated

    def _stop(self, run: _Run) -> None:
        if not run.over:
            run.over = True
            with contextlib.suppress(ValueError):
                self._waiting.remove(run)
            self._save(run)
        self._leave(run)

    def _fail(self, run: _Run, reason: str) -> None:
        run.over = True
        self._leave(run)
        run.results.put(TrainingError(reason))

    def _leave(self, run: _Run) -> None:
        """Make room in the slot of a trial."""
        if run.group is not None and run.group.runs.get(run.slot) is run:
            del run.group.runs[run.slot]
            run.group.program.release(run.slot)
            self._tell_slots()

    def _tell_slots(self) -> None:
        """Export how many slots there are, and in how many of them is a trial."""
        used = sum(len(group.runs) for group in self._groups)
        slots = sum(group.program.slots for group in self._groups)
        set_gauge("heliostat_slots", slots, self._sweep.key)
        set_gauge("heliostat_slots_in_use", used, self._sweep.key)
