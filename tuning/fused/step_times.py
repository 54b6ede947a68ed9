"""How long a step takes: of a trial alone, and of a compiled program. Measured once per machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trainers.devices import Device
from trainers.engine.step import TrainStep
from trainers.precision import weights_dtype
from trainers.worker import Worker
from trainers.workload import Batch
from tuning.programs.measurements import graph_key, keep_measurement, read_measurement
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant

UNKNOWN_BUSY = 1 / 16
"""The share of the device that a trial is taken to use where its arithmetic cannot be counted; the
compiled program is measured."""


@dataclass(frozen=True)
class UnfusedTime:
    """A step of a trial alone."""

    step_s: float
    busy: float
    """The share of the device's arithmetic that it uses, relative to a product of two large
    matrices in the same precision."""


@dataclass(frozen=True)
class CompiledTime:
    """A step of all slots of a compiled program."""

    step_s: float
    compile_s: float
    """Seconds that compiling it took."""


def measure_unfused(key: str, variant: Variant, samples: Batch, device: Device) -> UnfusedTime:
    """Measure a trial alone, which takes a second, or read what was kept under its key."""
    known = read_measurement(key)
    if not known:
        step_s, busy = _measured_unfused(variant, samples, device)
        known = {"step_s": step_s, "busy": busy}
        keep_measurement(key, known)
    return UnfusedTime(**known)


def _measured_unfused(variant: Variant, samples: Batch, device: Device) -> tuple[float, float]:
    spec, total = variant.spec, variant.total_steps
    train_step = TrainStep(spec, variant.workload, samples, Worker(hardware=device), total)
    flops = train_step.meter.flops
    train_step.network.train()
    steps = iter(range(total))

    def step() -> None:
        train_step.run(next(steps, 0))

    alone_s = _fastest_s(step, device)
    if flops is None:
        return alone_s, UNKNOWN_BUSY
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, dtype=weights_dtype(spec.train), device=device.device)
    product_s = _fastest_s(lambda: matrix @ matrix, device)
    peak_flop_per_s = 2 * size**3 / product_s
    share = flops * spec.train.global_batch / alone_s / peak_flop_per_s
    return alone_s, min(1.0, max(1e-4, share))


def known_compiled(program: Program) -> CompiledTime | None:
    """The times of a program that was compiled and measured on this machine before."""
    known = read_measurement(graph_key(program.graph, program.device))
    return CompiledTime(**known) if known else None


def measure_compiled(program: Program, device: Device) -> CompiledTime:
    """Compile a program and measure it; keeps both times for `known_compiled`."""
    began = time.perf_counter()
    program.compile()
    compile_s = time.perf_counter() - began
    step_s = _fastest_s(lambda: program.run([], 4), device) / 4
    measured = CompiledTime(step_s, compile_s)
    key = graph_key(program.graph, program.device)
    keep_measurement(key, {"step_s": step_s, "compile_s": compile_s})
    return measured


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
