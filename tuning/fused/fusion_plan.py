"""Whether the trials of a sweep are fused, and into how many slots: decided by measurements.

The decision is kept in the sweep's folder, so that a resumed sweep goes on with it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from cluster.base.files import write_atomic
from trainers.data.remote import local_dataset
from trainers.data.splits import open_split
from trainers.devices import Device, local_device
from trainers.engine.host_memory import keep_freed_memory
from trainers.modeling.build import build_network
from trainers.runs.failure_policy import format_error
from trainers.spec import RunSpec, resolve
from trainers.workload import Batch
from tuning.fused.sweep_variants import distinct_programs, reference_variant, varied_floats
from tuning.programs.measurements import (
    keep_measurement,
    known_compiled,
    measure_compiled,
    measure_unfused,
    read_measurement,
    trial_key,
)
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant, unsupported_reason
from tuning.programs.torch_internals import trace_operations
from tuning.programs.vmap_rewrites import NotFusibleError
from tuning.search.samplers import algorithm
from tuning.spaces.rungs import expected_step_share
from tuning.spaces.searches import WITHOUT_MEMORY
from tuning.trials.trial import Sweep, set_threads

PLAN_FILE = "fuse.json"
MIN_STEPS_TO_FUSE = 5000
"""Steps of all trials together below which compiling costs more time than it can save."""
MAX_SLOTS = 64
MAX_TRIED_PROGRAMS = 8
"""Programs that are traced before a sweep begins; others are traced when a trial needs them."""
COMPILE_PER_TRACE = 30
"""Compiling a step takes about so many times the CPU time of tracing it. Measured: 26 for an MLP,
40 for a CNN. So the estimate holds on slow machines too."""
PROCESS_TRIAL_S = 0.5
"""Seconds that a trial in a running process costs besides its steps."""
GENERATIONS = 4
"""Rounds of trials that a search which learns from them gets at least."""
MEMORY_SHARE = 0.5
"""Share of the free memory that slots may take."""
FIRST_CPU_SLOTS = 4
"""Slots that are tried first on a CPU. There a compiled step has little overhead: few slots fill a
core, and more make each trial slower. On a GPU the first number is what its idle share has room
for, since there slots cost a trial nothing."""


@dataclass(frozen=True)
class FusionPlan:
    """The decision for a sweep."""

    slots: int
    """Slots of each program; 0 where each trial gets a process."""
    line: str
    """The reason, for the user; empty if there is nothing to tell."""

    def save(self, sweep: Sweep) -> None:
        """Keep the plan in the sweep's folder."""
        write_atomic(sweep.folder / PLAN_FILE, json.dumps(asdict(self)))


def load_plan(sweep: Sweep) -> FusionPlan | None:
    """The plan with which the sweep began; None before that."""
    path = sweep.folder / PLAN_FILE
    return FusionPlan(**json.loads(path.read_text())) if path.exists() else None


def planned_slots(sweep: Sweep) -> int:
    """The slots of each of the sweep's programs; 0 if it is not fused."""
    plan = load_plan(sweep)
    return plan.slots if plan else 0


def plan_from_spec(sweep: Sweep) -> FusionPlan | None:
    """The plan of a sweep whose spec rules fusing out; None if it has to be tried."""
    if sweep.spec.fuse == "off":
        return FusionPlan(0, "")
    spec, _ = resolve(sweep.spec_data, RunSpec)
    reason = unsupported_reason(spec)
    if reason:
        return FusionPlan(0, f"not fused: {reason}")
    steps = sweep.spec.total_trials * spec.train.total_steps(sweep.samples)
    return FusionPlan(0, "") if sweep.spec.fuse == "auto" and steps < MIN_STEPS_TO_FUSE else None


def try_plan(
    sweep: Sweep, engines: int, on_compile: Callable[[], None]
) -> tuple[FusionPlan, Program | None]:
    """`make_plan`, but a sweep whose trials cannot even be built is not fused."""
    threads = torch.get_num_threads()
    keep_freed_memory()
    try:
        return make_plan(sweep, engines, on_compile=on_compile)
    except Exception as error:  # a trial in a process of its own will report what is wrong
        return FusionPlan(0, f"not fused: {format_error(error)}"), None
    finally:
        torch.set_num_threads(threads)


def make_plan(
    sweep: Sweep,
    engines: int,
    free_bytes: int | None = None,
    on_compile: Callable[[], None] = lambda: None,
) -> tuple[FusionPlan, Program | None]:
    """Decide for a sweep on `engines` devices like the one of this process.

    Takes some seconds to measure the step of a trial alone, and compiles if that promises to pay
    off, after a call of `on_compile`. What an earlier sweep has measured is not measured again.
    Returns the program if one was compiled. Slots may take half of `free_bytes`, which is the
    device's free memory if not given.
    """
    set_threads(sweep)
    try:
        if isinstance(sweep.spec.fuse, int):
            _trace(sweep)
            return FusionPlan(sweep.spec.fuse, _fused_message(sweep.spec.fuse, engines)), None
        return _Planner(sweep, engines, free_bytes, on_compile).fastest_plan()
    except NotFusibleError as error:
        return FusionPlan(0, f"not fused: {error}"), None


@dataclass(frozen=True)
class _Traced:
    """A sweep whose trials can be traced as programs."""

    one_slot: Program
    """The program of the reference trial, with one slot."""
    programs: int
    """How many programs the sweep's trials need."""


def _trace(sweep: Sweep) -> _Traced:
    """Trace the sweep's programs; raises NotFusibleError for the first that cannot be."""
    device = _device(sweep)
    variants, programs = distinct_programs(sweep, MAX_TRIED_PROGRAMS)
    for variant in variants:
        _check_supported(variant.spec)
    first, *_ = [
        Program(variant, 1, _samples(sweep, variant), device, varied_floats(sweep, variant))
        for variant in variants
    ]
    return _Traced(first, programs)


def _check_supported(spec: RunSpec) -> None:
    reason = unsupported_reason(spec)
    if reason:
        raise NotFusibleError(reason)


def _device(sweep: Sweep) -> Device:
    spec, _ = resolve(sweep.spec_data, RunSpec)
    return local_device(spec.scale.accelerator)


def _samples(sweep: Sweep, variant: Variant) -> Batch:
    """The training split of a trial."""
    dataset = local_dataset(sweep.dataset_of(variant.spec), variant.spec)
    return open_split(dataset, "train")


@dataclass(frozen=True)
class _SweepTime:
    """Estimates how long the steps of a sweep take."""

    steps: int
    """Of all trials together."""
    trial_steps: int
    """Of the longest trial."""
    engines: int

    def seconds(self, step_s: float, slots: int) -> float:
        """The time of all steps if `slots` trials at a time take a step in `step_s`.

        The steps of the longest trial are counted once more: at the end few trials are left, and
        their slots' neighbours are idle.
        """
        return step_s * (self.steps / slots / self.engines + self.trial_steps)


class _Planner:
    """Finds the plan with the shortest sweep."""

    def __init__(
        self,
        sweep: Sweep,
        engines: int,
        free_bytes: int | None,
        on_compile: Callable[[], None],
    ) -> None:
        self._sweep, self._engines, self._free_bytes = sweep, engines, free_bytes
        self._on_compile = on_compile
        self._device, self._variant = _device(sweep), reference_variant(sweep)
        self._samples = _samples(sweep, self._variant)
        _check_supported(self._variant.spec)
        network = build_network(self._variant.spec.train, self._variant.workload)
        self._varied = varied_floats(sweep, self._variant)
        self._key = trial_key(self._variant, network, self._varied, self._device)
        self._alone = measure_unfused(self._key, self._variant, self._samples, self._device)
        trials, trial_steps = sweep.spec.total_trials, self._variant.total_steps
        samples = sweep.samples_of(self._variant.spec)
        epochs = trial_steps * self._variant.spec.train.global_batch / samples
        every = self._variant.spec.train.evaluate_every_epochs
        share = expected_step_share(sweep.spec.scheduler, epochs, every)
        self._time_of = _SweepTime(round(trials * trial_steps * share), trial_steps, engines)
        self._unfused_s = (
            self._time_of.seconds(self._alone.step_s, 1) + PROCESS_TRIAL_S * trials / engines
        )

    def fastest_plan(self) -> tuple[FusionPlan, Program | None]:
        """Raises NotFusibleError if the sweep is expected to be faster without fusing."""
        best, compile_s = self._first_program()
        traced = _trace(self._sweep)
        most = self._max_slots(traced.one_slot, best)
        best = best if best.slots <= most else self._program(most)
        measured, compiled = known_compiled(best), None
        if measured is None:
            guess_s = self._time_of.seconds(self._guess_s(best.slots), best.slots)
            self._check_worth(guess_s, compile_s * traced.programs, 0.8)
            self._on_compile()
            measured, compiled = measure_compiled(best, self._device), best
        # At best, twice as many slots take a step in the same time.
        while 2 * best.slots <= most:
            now_s = self._time_of.seconds(measured.step_s, best.slots)
            at_best_s = self._time_of.seconds(measured.step_s, 2 * best.slots)
            wider = self._program(2 * best.slots)
            times, wider_compiled = known_compiled(wider), None
            if times is None:
                if now_s - at_best_s <= measured.compile_s:
                    break
                times, wider_compiled = measure_compiled(wider, self._device), wider
            if self._time_of.seconds(times.step_s, wider.slots) > now_s:
                break
            best, measured, compiled = wider, times, wider_compiled
        fused_s = self._time_of.seconds(measured.step_s, best.slots)
        self._check_worth(fused_s, (traced.programs - 1) * measured.compile_s, 0.9)
        gain = self._alone.step_s / measured.step_s * best.slots
        line = f"{_fused_message(best.slots, self._engines)}, {gain:.1f} times as fast as alone"
        return FusionPlan(best.slots, line), compiled

    def _first_program(self) -> tuple[Program, float]:
        """The program that is tried first, and the estimated time of compiling one.

        Tracing a large network takes seconds: where the estimate, of now or of an earlier sweep,
        already rules fusing out, nothing more is traced.
        """
        on_cpu, busy = self._device.type == "cpu", self._alone.busy
        slots = FIRST_CPU_SLOTS if on_cpu else min(MAX_SLOTS, 2 ** round(math.log2(1 / busy)))
        guess_s = self._time_of.seconds(self._guess_s(slots), slots)
        key = f"{self._key}-compile"
        self._check_worth(guess_s, read_measurement(key).get("compile_s", 0.0), 0.8)
        trace_operations(torch.neg, [torch.ones(1)])  # what it imports is not to be timed
        program = self._program(max(2, slots))
        compile_s = COMPILE_PER_TRACE * program.trace_s
        if known_compiled(program) is None:
            try:
                self._check_worth(guess_s, compile_s, 0.8)
            except NotFusibleError:
                keep_measurement(key, {"compile_s": compile_s})
                raise
        return program, compile_s

    def _program(self, slots: int) -> Program:
        return Program(self._variant, slots, self._samples, self._device, self._varied)

    def _guess_s(self, slots: int) -> float:
        """The time of a compiled step of so many slots.

        Assumes half of the device's peak, and a fixed part of the time for starting kernels.
        """
        return self._alone.step_s * max(0.3, 2 * self._alone.busy * slots)

    def _check_worth(self, fused_s: float, compile_s: float, share: float) -> None:
        """Raise NotFusibleError unless both together are below a share of the unfused time."""
        if fused_s + compile_s <= share * self._unfused_s:
            return
        busy = self._alone.busy
        if busy > 0.25 or not compile_s:
            raise NotFusibleError(f"a lone trial keeps {busy:.0%} of its device busy")
        raise NotFusibleError(
            f"compiling takes about {compile_s:.0f} s, "
            f"and all trials without it {self._unfused_s:.0f} s"
        )

    def _max_slots(self, one_slot: Program, more: Program) -> int:
        """The most slots that the sweep can use, and the memory has room for; at least 2."""
        one_bytes = one_slot.peak_bytes()
        slot_bytes = (more.peak_bytes() - one_bytes) / (more.slots - 1)
        spec, engines = self._sweep.spec, self._engines
        free = self._device.memory().free if self._free_bytes is None else self._free_bytes
        room = math.inf if free is None else MEMORY_SHARE * free
        if self._device.type == "cpu":
            room /= engines
        most = min(MAX_SLOTS, math.ceil(spec.total_trials / engines))
        if algorithm(spec) not in (*WITHOUT_MEMORY, "qmc"):
            most = min(most, math.ceil(spec.total_trials / engines / GENERATIONS))
        most = min(most, spec.concurrency or most)
        if room < math.inf:
            most = min(most, int((room - one_bytes) / max(1, slot_bytes)) + 1)
        if most < 2:
            raise NotFusibleError("there is no room for two trials on a device")
        return most


def _fused_message(slots: int, engines: int) -> str:
    where = "one device" if engines == 1 else f"each of {engines} devices"
    return f"fused: {slots} trials as one program on {where}"
