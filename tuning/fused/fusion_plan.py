"""Whether the trials of a sweep are fused, and into how many slots: decided by measurements.

The decision is kept in the sweep's folder, so that a resumed sweep goes on with it.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cluster.base.files import write_atomic
from trainers.data.remote import local_dataset
from trainers.data.splits import count_samples, open_split
from trainers.devices import Device, local_device
from trainers.engine.step import TrainStep
from trainers.precision import weights_dtype
from trainers.runs.failure_policy import format_error
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker
from trainers.workload import Batch
from tuning.fused.sweep_variants import distinct_programs, varied_floats
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant, unsupported_reason
from tuning.programs.vmap_rewrites import NotFusibleError
from tuning.trials.trial import Sweep, set_threads

PLAN_FILE = "fuse.json"
MIN_STEPS_TO_FUSE = 5000
"""Steps of all trials together below which compiling costs more time than it can save."""
MAX_SLOTS = 64
MAX_TRIED_PROGRAMS = 8
"""Programs that are traced before a sweep begins; others are traced when a trial needs them."""
COMPILE_S_PER_NODE = 0.03
"""Seconds of compiling per operation of a step, on one core: measured, and rounded up."""
EXPECTED_STEP_SHARE = {"asha": 0.5, "median": 0.7}
"""Share of all trials' steps that are expected to be done under a scheduler."""
PROCESS_TRIAL_S = 0.5
"""Seconds that a trial in a running process costs besides its steps."""
ADAPTIVE_SEARCHES, GENERATIONS = ("tpe", "cmaes"), 4
"""Searches that learn from earlier trials, and how many rounds of trials they get at least."""
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
    steps = sweep.spec.total_trials * spec.train.total_steps(count_samples(sweep.dataset, "train"))
    return FusionPlan(0, "") if sweep.spec.fuse == "auto" and steps < MIN_STEPS_TO_FUSE else None


def try_plan(sweep: Sweep, engines: int) -> tuple[FusionPlan, Program | None]:
    """`make_plan`, but a sweep whose trials cannot even be built is not fused."""
    threads = torch.get_num_threads()
    try:
        return make_plan(sweep, engines)
    except Exception as error:  # a trial in a process of its own will report what is wrong
        return FusionPlan(0, f"not fused: {format_error(error)}"), None
    finally:
        torch.set_num_threads(threads)


def make_plan(
    sweep: Sweep, engines: int, free_bytes: int | None = None
) -> tuple[FusionPlan, Program | None]:
    """Decide for a sweep on `engines` devices like the one of this process.

    Takes some seconds to measure the step of a trial alone, and compiles if that promises to pay
    off; returns the program that was compiled, if any. Slots may take half of `free_bytes`, which
    is the device's free memory if not given.
    """
    set_threads(sweep)
    try:
        probe = _probe(sweep)
        if isinstance(sweep.spec.fuse, int):
            return FusionPlan(sweep.spec.fuse, _fused_message(sweep.spec.fuse, engines)), None
        most = _max_slots(sweep, engines, probe, free_bytes)
        return _fastest_plan(sweep, engines, probe, most)
    except NotFusibleError as error:
        return FusionPlan(0, f"not fused: {error}"), None


@dataclass(frozen=True)
class _Probe:
    """A sweep whose trials can be traced as programs."""

    sweep: Sweep
    device: Device
    samples: Batch
    variant: Variant
    """The reference trial."""
    one_slot: Program
    """Its program, with one slot."""
    programs: int
    """How many programs the sweep's trials need."""

    def program(self, slots: int) -> Program:
        varied = varied_floats(self.sweep, self.variant)
        return Program(self.variant, slots, self.samples, self.device, varied)

    @property
    def compile_s(self) -> float:
        """Estimated time of compiling one program."""
        return COMPILE_S_PER_NODE * len(self.one_slot.graph.graph.nodes)


def _probe(sweep: Sweep) -> _Probe:
    """Trace the sweep's programs; raises NotFusibleError for the first that cannot be."""
    spec, _ = resolve(sweep.spec_data, RunSpec)
    device = local_device(spec.scale.accelerator)
    samples = open_split(local_dataset(sweep.dataset, spec), "train")
    variants, programs = distinct_programs(sweep, MAX_TRIED_PROGRAMS)
    for variant in variants:
        reason = unsupported_reason(variant.spec)
        if reason:
            raise NotFusibleError(reason)
    first, *_ = [
        Program(variant, 1, samples, device, varied_floats(sweep, variant)) for variant in variants
    ]
    return _Probe(sweep, device, samples, variants[0], first, programs)


def _max_slots(sweep: Sweep, engines: int, probe: _Probe, free_bytes: int | None) -> int:
    """The most slots that the sweep can use, and the memory has room for; at least 2."""
    one_bytes = probe.one_slot.peak_bytes()
    slot_bytes = probe.program(2).peak_bytes() - one_bytes
    free = probe.device.memory().free if free_bytes is None else free_bytes
    room = math.inf if free is None else MEMORY_SHARE * free
    if probe.device.type == "cpu":
        room /= engines
    most = min(MAX_SLOTS, math.ceil(sweep.spec.total_trials / engines))
    if sweep.spec.search in ADAPTIVE_SEARCHES:
        most = min(most, math.ceil(sweep.spec.total_trials / engines / GENERATIONS))
    most = min(most, sweep.spec.concurrency or most)
    if room < math.inf:
        most = min(most, int((room - one_bytes) / max(1, slot_bytes)) + 1)
    if most < 2:
        raise NotFusibleError("there is no room for two trials on a device")
    return most


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


def _fastest_plan(
    sweep: Sweep, engines: int, probe: _Probe, most: int
) -> tuple[FusionPlan, Program]:
    """The plan with the shortest sweep, of at most `most` slots.

    Raises NotFusibleError if the sweep is expected to be faster without fusing.
    """
    alone_s, busy = _measure_unfused_step(probe.variant, probe.samples, probe.device)
    trials, trial_steps = sweep.spec.total_trials, probe.variant.total_steps
    share = EXPECTED_STEP_SHARE.get(sweep.spec.scheduler.name, 1.0)
    time_of = _SweepTime(round(trials * trial_steps * share), trial_steps, engines)
    unfused_s = time_of.seconds(alone_s, 1) + PROCESS_TRIAL_S * trials / engines
    compile_s, programs = probe.compile_s, probe.programs
    not_worth = NotFusibleError(_not_worth_message(busy, unfused_s, compile_s * programs))
    start = FIRST_CPU_SLOTS if probe.device.type == "cpu" else 2 ** round(math.log2(1 / busy))
    best = probe.program(min(most, start))
    # Assumes half of the device's peak, and a fixed part of the time for starting kernels.
    guess_s = alone_s * max(0.3, 2 * busy * best.slots)
    if time_of.seconds(guess_s, best.slots) + programs * compile_s > 0.8 * unfused_s:
        raise not_worth
    step_s = _compiled_step_s(best, probe.device)
    # At best, twice as many slots take a step in the same time.
    while 2 * best.slots <= most and (
        time_of.seconds(step_s, best.slots) - time_of.seconds(step_s, 2 * best.slots) > compile_s
    ):
        wider = probe.program(2 * best.slots)
        wider_s = _compiled_step_s(wider, probe.device)
        if time_of.seconds(wider_s, wider.slots) > time_of.seconds(step_s, best.slots):
            break
        best, step_s = wider, wider_s
    if time_of.seconds(step_s, best.slots) + (programs - 1) * compile_s > 0.9 * unfused_s:
        raise not_worth
    gain = alone_s / step_s * best.slots
    line = f"{_fused_message(best.slots, engines)}, {gain:.1f} times as fast as alone"
    return FusionPlan(best.slots, line), best


def _fused_message(slots: int, engines: int) -> str:
    where = "one device" if engines == 1 else f"each of {engines} devices"
    return f"fused: {slots} trials as one program on {where}"


def _not_worth_message(busy: float, alone_s: float, compile_s: float) -> str:
    if busy > 0.25:
        return f"a lone trial keeps {busy:.0%} of its device busy"
    return f"compiling takes about {compile_s:.0f} s, and all trials without it {alone_s:.0f} s"


def _measure_unfused_step(variant: Variant, samples: Batch, device: Device) -> tuple[float, float]:
    """The time of a step of a trial alone, and the share of the device's arithmetic it uses.

    The share is relative to a product of two large matrices in the same precision.
    """
    spec, total = variant.spec, variant.total_steps
    train_step = TrainStep(spec, variant.workload, samples, Worker(hardware=device), total)
    train_step.network.train()
    steps = iter(range(total))

    def step() -> None:
        train_step.run(next(steps, 0))

    alone_s = _fastest_s(step, device)
    train_step.read_meter()
    flops = train_step.meter.flops
    if flops is None:
        return alone_s, 1 / 16  # a guess; the compiled program is measured
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, dtype=weights_dtype(spec.train), device=device.device)
    product_s = _fastest_s(lambda: matrix @ matrix, device)
    peak_flop_per_s = 2 * size**3 / product_s
    share = flops * spec.train.global_batch / alone_s / peak_flop_per_s
    return alone_s, min(1.0, max(1e-4, share))


def _compiled_step_s(program: Program, device: Device) -> float:
    """Compile a program, and return the time of a step of all slots."""
    program.compile()
    return _fastest_s(lambda: program.run([], 4), device) / 4


def _fastest_s(action: Callable[[], Any], device: Device, budget_s: float = 0.5) -> float:
    """The time of an action, little disturbed by other processes: the lower quartile."""
    for _ in range(3):
        action()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 100):
        device.synchronize()
        began = time.perf_counter()
        action()
        device.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 4]
