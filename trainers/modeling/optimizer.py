"""The optimizer and its learning rate, as functions of the spec and the step."""

import math

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from trainers.modeling.strategy import mesh_of
from trainers.spec import OptimizerSpec, ScheduleSpec
from trainers.torch_internals import without_compile_guards

AdamW = without_compile_guards(torch.optim.AdamW)
SGD = without_compile_guards(torch.optim.SGD)


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """The spec's optimizer over all parameters that are trained.

    Matrices and kernels have weight decay; biases and norms have none, as is usual.
    """
    # As few groups as possible: each is a kernel launch of its own, over one device mesh.
    groups: dict[tuple[float, DeviceMesh | None], list[nn.Parameter]] = {}
    for weight in model.parameters():
        if weight.requires_grad:
            decay = spec.weight_decay if has_weight_decay(weight) else 0.0
            groups.setdefault((decay, mesh_of(weight)), []).append(weight)
    # Groups with decay come first, so that the order depends on the model's shape alone.
    ordered = sorted(groups.items(), key=lambda item: -item[0][0])
    params = [{"params": group, "weight_decay": decay} for (decay, _), group in ordered]
    if spec.name == "adamw":
        return AdamW(params, lr=spec.lr, betas=spec.betas, fused=True)
    nesterov = spec.momentum > 0
    return SGD(params, lr=spec.lr, momentum=spec.momentum, nesterov=nesterov, fused=True)


def has_weight_decay(weight: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter."""
    return weight.ndim > 1


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(spec: OptimizerSpec, step: int, total_steps: int) -> float:
    """The learning rate of step `step`, counted from 0, in a run of `total_steps`."""
    return spec.lr * _schedule_factor(spec.schedule, step, total_steps)


def _schedule_factor(schedule: ScheduleSpec, step: int, total_steps: int) -> float:
    warmup_steps = round(schedule.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule.name == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, progress)
    fall = progress if schedule.name == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - schedule.final) * fall
