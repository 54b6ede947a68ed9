"""What FSDP alone would get wrong of users' models: other weights, writes, buffers."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.base.errors import TrainingError
from trainers.worker import is_distributed, local_tensor

_SMALL = 1 << 16
"""Elements of a buffer that is shared in each step; larger ones are shared if they were changed."""


def stays_whole(weight: nn.Parameter) -> bool:
    """Whether each worker keeps the whole weight: FSDP cannot shard it, or would lose its hooks."""
    hooked = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    plain = weight.ndim and weight.numel() and weight.is_contiguous() and not weight.is_complex()
    return bool(hooked) or not plain


def refuse_written_weights(module: nn.Module) -> None:
    """Have the first forward pass of `module` refused if it writes into gathered weights.

    What it writes would be lost when they are freed. To be called before FSDP has the module, so
    that the weights are there when the hooks are called.
    """
    sums: dict[str, tuple[float, float]] = {}

    def gathered() -> dict[str, tuple[float, float]]:
        return {
            name: (weight.detach().double().sum().item(), weight.detach().double().norm().item())
            for name, weight in module.named_parameters()
            if not is_distributed(weight) and not weight.is_complex()
        }

    def before(*_: Any) -> None:
        sums.update(gathered())

    def after(*_: Any) -> None:
        for handle in handles:
            handle.remove()
        written = [name for name, value in gathered().items() if sums.get(name, value) != value]
        if written:
            raise TrainingError(
                f"scale.parallel: the forward pass writes into the weight {written[0]} of a "
                f"{type(module).__name__}, which is lost where weights are sharded; use ddp"
            )

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def share_buffers_each_step(forward: nn.Module) -> None:
    """Give all workers the buffers of rank 0 in each training pass, as replicas do it."""
    buffers = [local_tensor(buffer) for buffer in forward.buffers()]
    shared = [buffer for buffer in buffers if buffer.is_contiguous() and buffer.numel()]
    versions = {id(buffer): buffer._version for buffer in shared}

    def share(*_: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for buffer in shared:
            if buffer.numel() <= _SMALL or versions[id(buffer)] != buffer._version:
                dist.broadcast(buffer.reshape(-1).view(torch.uint8), src=0)
                versions[id(buffer)] = buffer._version

    if shared:
        forward.register_forward_pre_hook(share)


def average_gradients(weights: list[nn.Parameter]) -> None:
    """Average the gradients of weights that each worker keeps whole; collective."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        values: Tensor = weight.grad
        dist.all_reduce(torch.view_as_real(values) if values.is_complex() else values)
        values /= dist.get_world_size()
