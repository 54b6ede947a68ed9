"""How long a step takes: of a trial alone, and of a compiled program. Measured once per machine.

Measurements are kept beside the compiled programs. A later sweep of the same network finds them,
whatever its data set, seeds and search space. A measurement's key is a hash of all that it may
depend on: the operations or the source, shapes, constants, PyTorch, and the device. Files are
written whole, so that any number of processes may read and write, and be killed.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from cluster.base.files import write_atomic
from trainers.data.workload_code import workload_code
from trainers.devices import Device
from trainers.engine.step import TrainStep
from trainers.precision import weights_dtype
from trainers.worker import Worker
from trainers.workload import Batch
from tuning.programs.program_signature import Variant, signature
from tuning.programs.torch_internals import COMPILE_OPTIONS, compiled_code_folder

if TYPE_CHECKING:
    from tuning.programs.program import Program

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
        known = asdict(_measured_unfused(variant, samples, device))
        keep_measurement(key, known)
    return UnfusedTime(**known)


def known_compiled(program: "Program") -> CompiledTime | None:
    """The times of a program that was compiled and measured on this machine before."""
    known = read_measurement(graph_key(program.graph, program.device))
    return CompiledTime(**known) if known else None


def measure_compiled(program: "Program", device: Device) -> CompiledTime:
    """Compile a program and measure it; keeps both times for `known_compiled`."""
    began = time.perf_counter()
    program.compile()
    compile_s = time.perf_counter() - began
    measured = CompiledTime(_fastest_s(lambda: program.run([], 4), device) / 4, compile_s)
    keep_measurement(graph_key(program.graph, program.device), asdict(measured))
    return measured


def graph_key(graph: GraphModule, device: torch.device) -> str:
    """The key of a traced step on such a device: of its operations, shapes and constants."""
    digest = hashlib.sha256(_machine(device).encode())
    for part in graph.modules():  # control flow has graphs of its own
        if not isinstance(part, GraphModule):
            continue
        digest.update(part.code.encode())
        for node in part.graph.nodes:
            if node.op == "placeholder":
                digest.update(repr(node.meta.get("tensor_meta")).encode())
            value = getattr(part, node.target) if node.op == "get_attr" else None
            if isinstance(value, Tensor):
                digest.update(repr((value.shape, value.dtype)).encode())
                digest.update(value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trial_key(
    variant: Variant, network: nn.Module, varied: Mapping[str, Any], device: Device
) -> str:
    """The key of a trial by itself: of its spec, its network and its workload's source.

    `varied` are the fields of the section `model` that do not count.
    """
    digest = hashlib.sha256(signature(variant, network, varied).encode())
    for path in workload_code(type(variant.workload)).files:
        digest.update(path.read_bytes())
    digest.update(_machine(device.device).encode())
    return digest.hexdigest()


def read_measurement(key: str) -> dict[str, float]:
    """What `keep_measurement` wrote; {} if there is nothing."""
    path = _path(key)
    measured: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return measured


def keep_measurement(key: str, measured: Mapping[str, float]) -> None:
    path = _path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(dict(measured)))


def _measured_unfused(variant: Variant, samples: Batch, device: Device) -> UnfusedTime:
    spec, total = variant.spec, variant.total_steps
    train_step = TrainStep(spec, variant.workload, samples, Worker(hardware=device), total)
    steps = iter(range(total))

    def step() -> None:
        train_step.run(next(steps, 0))

    alone_s = _fastest_s(step, device)
    train_step.read_meter()
    flops = train_step.meter.flops
    if flops is None:
        return UnfusedTime(alone_s, UNKNOWN_BUSY)
    size = 512 if device.type == "cpu" else 4096
    matrix = torch.ones(size, size, dtype=weights_dtype(spec.train), device=device.device)
    product_s = _fastest_s(lambda: matrix @ matrix, device)
    peak_flop_per_s = 2 * size**3 / product_s
    share = flops * spec.train.global_batch / alone_s / peak_flop_per_s
    return UnfusedTime(alone_s, min(1.0, max(1e-4, share)))


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


def _path(key: str) -> Path:
    return compiled_code_folder() / "heliostat" / f"{key}.json"


def _machine(device: torch.device) -> str:
    """The device, and what else decides how fast a step is on it."""
    kind = (
        f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()} {os.cpu_count()}"
        if device.type == "cpu"
        else torch.get_device_module(device.type).get_device_name(device)
    )
    known = (torch.__version__, platform.node(), kind, torch.get_num_threads(), COMPILE_OPTIONS)
    return repr(known)
