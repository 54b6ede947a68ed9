"""The optimizer and its learning rate, as functions of the spec and the step."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from trainers.modeling.strategy import mesh_of
from trainers.spec import OptimizerSpec, ScheduleSpec
from trainers.torch_internals import OptimizerT, without_compile_guards
from trainers.worker import is_distributed, local_tensor

AdamW = without_compile_guards(torch.optim.AdamW)
SGD = without_compile_guards(torch.optim.SGD)


@contextmanager
def real_views(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In here the optimizer's complex weights, gradients and moments are pairs of real numbers.

    Fused kernels take no others. All of it is views: the updates reach the complex tensors.
    """
    whole = [group["params"] for group in optimizer.param_groups]
    views: dict[Tensor, Tensor] = {}
    for group, weights in zip(optimizer.param_groups, whole, strict=True):
        views |= {weight: _real_view(weight) for weight in weights if weight.is_complex()}
        group["params"] = [views.get(weight, weight) for weight in weights]
    for weight, view in views.items():
        if weight in optimizer.state:
            held = optimizer.state.pop(weight)
            optimizer.state[view] = _moments(held, torch.view_as_real)
    try:
        yield
    finally:
        for weight, view in views.items():
            if view in optimizer.state:
                held = optimizer.state.pop(view)
                optimizer.state[weight] = _moments(held, torch.view_as_complex)
        for group, weights in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = weights


def _real_view(weight: Tensor) -> Tensor:
    view = torch.view_as_real(weight.detach())
    if weight.grad is not None:
        weight.grad = weight.grad.resolve_conj()
        view.grad = torch.view_as_real(weight.grad)
    return view


def _moments(held: dict[str, Tensor], convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {part: value if part == "step" else convert(value) for part, value in held.items()}


@contextmanager
def _shards(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In here the optimizer's weights, gradients and moments are this worker's shards of them.

    They share their memory. The optimizer must have all of its state already.
    """
    whole = [group["params"] for group in optimizer.param_groups]
    shards: dict[Tensor, Tensor] = {}
    for group, weights in zip(optimizer.param_groups, whole, strict=True):
        shards |= {weight: _shard(weight) for weight in weights if is_distributed(weight)}
        group["params"] = [shards.get(weight, weight) for weight in weights]
    held = {weight: optimizer.state.pop(weight) for weight in shards if weight in optimizer.state}
    for weight, parts in held.items():
        optimizer.state[shards[weight]] = {k: local_tensor(part) for k, part in parts.items()}
    try:
        yield
    finally:
        for weight, shard in shards.items():
            optimizer.state.pop(shard, None)
            if weight in held:
                optimizer.state[weight] = held[weight]
        for group, weights in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = weights


def _shard(weight: Any) -> Tensor:
    shard, gradient = local_tensor(weight).detach(), weight.grad
    if gradient is not None:
        if gradient.placements != weight.placements:
            gradient = gradient.redistribute(placements=weight.placements)  # as of partial sums
        shard.grad = local_tensor(gradient)
    return shard


def _on_shards(kind: type[OptimizerT]) -> type[OptimizerT]:
    """The class of optimizers whose steps update the shards of distributed weights.

    For a kernel that takes no distributed tensors, and updates each number by itself.
    """

    def step(self: Any, closure: None = None) -> None:
        with torch.no_grad(), _shards(self):
            kind.step(self)

    return type(kind.__name__, (kind,), {"step": step})


def _for_complex(kind: type[OptimizerT]) -> type[OptimizerT]:
    """The class of optimizers with steps that also take complex weights, as pairs of numbers."""

    def step(self: Any, closure: None = None) -> None:
        with real_views(self):
            kind.step(self)

    return type(kind.__name__, (kind,), {"step": step})


def build_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """The spec's optimizer over all parameters that are trained; complex ones as pairs of numbers.

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
    takes_complex = any(weight.is_complex() for _, group in ordered for weight in group)
    if spec.name == "adamw":
        adamw = _for_complex(AdamW) if takes_complex else AdamW
        return adamw(params, lr=spec.lr, betas=spec.betas, fused=True)
    # PyTorch has no sharding rule for the fused kernel of SGD.
    kind = _on_shards(SGD) if any(mesh is not None for _, mesh in groups) else SGD
    kind, momentum = _for_complex(kind) if takes_complex else kind, spec.momentum
    sgd = kind(params, lr=spec.lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    if momentum:
        # Without them, PyTorch's kernel takes only weights that had a gradient in the first step,
        # and does not initialise the buffers if that step is skipped on the device.
        for weight in trained_weights(sgd):
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight, requires_grad=False)
    return sgd


def trained_weights(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters that an optimizer updates."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


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
