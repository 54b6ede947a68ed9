"""Whether a sweep's trials are fused, and into how many slots: decided by what is measured."""

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
from trainers.runs.worker_errors import format_error
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant, program_key, unsupported_reason
from tuning.programs.vmap_rewrites import NotFusibleError
from tuning.trials.trial import Sweep, set_threads

PLAN_FILE = "fuse.json"
MIN_STEPS_TO_FUSE = 5000
"""Steps of all trials together below which compiling takes longer than it can save."""
MAX_SLOTS = 64
MAX_TRIED_PROGRAMS = 8
"""Programs that are tried before a sweep begins; what a trial beyond them needs shows later."""
COMPILE_S_PER_NODE = 0.03
"""Seconds of compiling for each operation of a step, on one core; measured, on the safe side."""
EXPECTED_STEP_SHARE = {"asha": 0.5, "median": 0.7}
"""Share of all trials' steps that a scheduler is expected to let them do."""
PROCESS_TRIAL_S = 0.5
"""Seconds that a trial in a process costs besides its steps, its process being there already."""
ADAPTIVE_SEARCHES, GENERATIONS = ("tpe", "cmaes"), 4
"""Searches that learn from trials, and how often their trials fill all slots at least."""
MEMORY_SHARE = 0.5
"""How much of the memory that is free may be slots."""
FIRST_CPU_SLOTS = 4
"""Slots that are tried first on a CPU, where a compiled step costs little besides computing: few
fill a core, and more make each trial slower. On a GPU it is as many as its idle share has room for,
since there they cost a trial nothing."""


@dataclass(frozen=True)
class FusionPlan:
    """What was decided for a sweep."""

    slots: int
    """Slots of each program; 0 where each trial gets a process."""
    line: str
    """Why, for the user; empty where nothing was asked for."""

    def save(self, sweep: Sweep) -> None:
        """Keep the plan with the sweep, which goes on with it whenever it is resumed."""
        write_atomic(sweep.folder / PLAN_FILE, json.dumps(asdict(self)))


def load_plan(sweep: Sweep) -> FusionPlan | None:
    """The plan that the sweep began with; None before that."""
    path = sweep.folder / PLAN_FILE
    return FusionPlan(**json.loads(path.read_text())) if path.exists() else None


def planned_slots(sweep: Sweep) -> int:
    """Slots of each of the sweep's programs; 0 where it is not fused."""
    plan = load_plan(sweep)
    return plan.slots if plan else 0


def plan_from_spec(sweep: Sweep) -> FusionPlan | None:
    """That a sweep is not fused, where its spec says enough; None where it has to be tried."""
    if sweep.spec.fuse == "off":
        return FusionPlan(0, "")
    spec, _ = resolve(sweep.spec_data, RunSpec)
    reason = unsupported_reason(spec)
    if reason:
        return FusionPlan(0, f"not fused: {reason}")
    steps = sweep.spec.total_trials * spec.train.total_steps(count_samples(sweep.dataset, "train"))
    return FusionPlan(0, "") if sweep.spec.fuse == "auto" and steps < MIN_STEPS_TO_FUSE else None


def try_plan(sweep: Sweep, engines: int) -> tuple[FusionPlan, Program | None]:
    """As `make_plan`; a sweep whose trials cannot even be tried is not fused."""
    threads = torch.get_num_threads()
    try:
        return make_plan(sweep, engines)
    except Exception as error:  # a trial in a process of its own will say what is wrong
        return FusionPlan(0, f"not fused: {format_error(error)}"), None
    finally:
        torch.set_num_threads(threads)


def make_plan(
    sweep: Sweep, engines: int, free_bytes: int | None = None
) -> tuple[FusionPlan, Program | None]:
    """The plan for a sweep on `engines` devices like this process' own, where it is made.

    Takes some seconds to measure a lone trial's step, and compiles where that promises to pay;
    a program that was compiled for the plan comes with it. Slots get half of `free_bytes`, of
    what the device has when that is None.
    """
    set_threads(sweep)
    spec, _ = resolve(sweep.spec_data, RunSpec)
    device = local_device(spec.scale.accelerator)
    samples = open_split(local_dataset(sweep.dataset, spec), "train")
    variants, programs = _distinct_programs(sweep)
    for variant in variants:
        reason = unsupported_reason(variant.spec)
        if reason:
            return FusionPlan(0, f"not fused: {reason}"), None

    def program(slots: int, variant: Variant = variants[0]) -> Program:
        return Program(variant, slots, samples, device, varied_floats(sweep, variant))

    try:
        first, *_ = [program(1, variant) for variant in variants]
    except NotFusibleError as error:
        return FusionPlan(0, f"not fused: {error}"), None
    if isinstance(sweep.spec.fuse, int):
        return FusionPlan(sweep.spec.fuse, _fused_message(sweep.spec.fuse, engines)), None
    slot_bytes = program(2).peak_bytes() - first.peak_bytes()
    free = device.memory().free if free_bytes is None else free_bytes
    room = math.inf if free is None else MEMORY_SHARE * free
    if device.type == "cpu":
        room /= engines
    most = min(MAX_SLOTS, math.ceil(sweep.spec.total_trials / engines))
    if sweep.spec.search in ADAPTIVE_SEARCHES:
        most = min(most, math.ceil(sweep.spec.total_trials / engines / GENERATIONS))
    most = min(most, sweep.spec.concurrency or most)
    most = min(most, int((room - first.peak_bytes()) / max(1, slot_bytes)) + 1)
    if most < 2:
        return FusionPlan(0, "not fused: there is no room for two trials on a device"), None
    alone_s, busy = _measure_unfused_step(variants[0], samples, device)
    steps = sweep.spec.total_trials * variants[0].total_steps
    steps = round(steps * EXPECTED_STEP_SHARE.get(sweep.spec.scheduler.name, 1.0))
    compile_s = COMPILE_S_PER_NODE * len(first.graph.graph.nodes)

    def takes_s(step_s: float, slots: int) -> float:
        """Seconds that all trials' steps take when `slots` at a time take one in `step_s`.

        All work, and once more the longest trial: at the end few are left, and wait for no one.
        """
        return step_s * (steps / slots / engines + variants[0].total_steps)

    unfused_s = takes_s(alone_s, 1) + PROCESS_TRIAL_S * sweep.spec.total_trials / engines
    start = FIRST_CPU_SLOTS if device.type == "cpu" else 2 ** round(math.log2(1 / busy))
    best = program(min(most, start))
    guess_s = alone_s * max(0.3, 2 * busy * best.slots)  # half of the peak, and what a start costs
    if takes_s(guess_s, best.slots) + programs * compile_s > 0.8 * unfused_s:
        return FusionPlan(0, _not_worth_message(busy, unfused_s, compile_s * programs)), None
    step_s = _compiled_step_s(best, device)
    # At best, twice as many slots take a step in the same time.
    while 2 * best.slots <= most and (
        takes_s(step_s, best.slots) - takes_s(step_s, 2 * best.slots) > compile_s
    ):
        wider = program(2 * best.slots)
        wider_s = _compiled_step_s(wider, device)
        if takes_s(wider_s, wider.slots) > takes_s(step_s, best.slots):
            break
        best, step_s = wider, wider_s
    if takes_s(step_s, best.slots) + (programs - 1) * compile_s > 0.9 * unfused_s:
        return FusionPlan(0, _not_worth_message(busy, unfused_s, compile_s * programs)), None
    gain = alone_s / step_s * best.slots
    line = f"{_fused_message(best.slots, engines)}, {gain:.1f} times as fast as alone"
    return FusionPlan(best.slots, line), best


def _fused_message(slots: int, engines: int) -> str:
    where = "one device" if engines == 1 else f"each of {engines} devices"
    return f"fused: {slots} trials as one program on {where}"


def _not_worth_message(busy: float, alone_s: float, compile_s: float) -> str:
    if busy > 0.25:
        return f"not fused: a lone trial keeps {busy:.0%} of its device busy"
    return (
        f"not fused: compiling takes about {compile_s:.0f} s, and all trials without it "
        f"{alone_s:.0f} s"
    )


def _distinct_programs(sweep: Sweep) -> tuple[list[Variant], int]:
    """A variant for each value that needs a program of its own, and how many programs there are.

    The first is as the others in all but one field.
    """
    found, count = {}, 1
    first = reference_variant(sweep)
    found[program_key(first, varied_floats(sweep, first))] = first
    for path, distribution in sweep.spec.parameters.items():
        others = [
            reference_variant(sweep, **{path: value}) for value in distribution.boundary_values()
        ]
        keys = {program_key(each, varied_floats(sweep, each)): each for each in others}
        found = {**keys, **found}
        if len(keys) > 1 and distribution.choice is None:
            low, high = distribution.bounds or (0, 0)
            count *= int(high - low + 1)
        else:
            count *= len(keys)
    chosen = [first, *(each for each in found.values() if each is not first)]
    return chosen[:MAX_TRIED_PROGRAMS], min(count, sweep.spec.total_trials)


def reference_variant(sweep: Sweep, **changed: Any) -> Variant:
    """A trial of the sweep, with some of its parameters `changed`."""
    usual = {path: d.boundary_values()[-1] for path, d in sweep.spec.parameters.items()}
    spec, workload = resolve(sweep.trial_spec_data({**usual, **changed}), RunSpec)
    return Variant(spec, workload, spec.train.total_steps(count_samples(sweep.dataset, "train")))


def varied_floats(sweep: Sweep, variant: Variant) -> dict[str, list[float]]:
    """The numbers of the section `model` that the sweep varies, with some of their values."""
    model = variant.workload.model
    fields = {
        path.removeprefix("model."): distribution
        for path, distribution in sweep.spec.parameters.items()
        if path.startswith("model.")
    }
    return {
        name: [float(value) for value in distribution.boundary_values()]
        for name, distribution in fields.items()
        if isinstance(getattr(model, name, None), float)
    }


def _measure_unfused_step(variant: Variant, samples: Any, device: Device) -> tuple[float, float]:
    """Seconds of a lone trial's step, and the share of the device's arithmetic that it uses.

    The share is that of the fastest product of two matrices in the same precision.
    """
    spec, total = variant.spec, variant.total_steps
    stepper = TrainStep(spec, variant.workload, samples, Worker(hardware=device), total)
    flops = stepper.meter.flops
    stepper.network.train()
    steps = iter(range(total))

    def step() -> None:
        stepper.run(next(steps, 0))

    alone_s = _fastest_s(step, device)
    if flops is None:
        return alone_s, 1 / 16  # a guess; the compiled program is measured
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, dtype=weights_dtype(spec.train), device=device.device)
    product_s = _fastest_s(lambda: matrix @ matrix, device)
    peak_flop_per_s = 2 * size**3 / product_s
    share = flops * spec.train.global_batch / alone_s / peak_flop_per_s
    return alone_s, min(1.0, max(1e-4, share))


def _compiled_step_s(program: Program, device: Device) -> float:
    """Seconds that a step of all slots takes."""
    program.compile()
    return _fastest_s(lambda: program.run([], 4), device) / 4


def _fastest_s(action: Callable[[], Any], device: Device, budget_s: float = 0.5) -> float:
    """Seconds that `action` takes when nothing else is in its way."""
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
