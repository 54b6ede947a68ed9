"""What FSDP alone would get wrong of users' models: other weights, writes, buffers."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.base.errors import SpecError, TrainingError
from trainers.modeling.forward import Forward
from trainers.worker import is_distributed, local_tensor

_SMALL = 1 << 16
"""Elements of a buffer that is shared in each step; larger ones are shared if they were changed."""


def stays_whole(weight: nn.Parameter) -> bool:
    """Whether each worker keeps the whole weight: FSDP cannot shard it, or would lose its hooks."""
    hooked = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    plain = weight.ndim and weight.numel() and weight.is_contiguous() and not weight.is_complex()
    return bool(hooked) or not plain


def check_can_be_sharded(network: nn.Module) -> None:
    """Raise SpecError for a part that FSDP takes but cannot train."""
    for name, part in network.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise SpecError(
                f"scale.parallel: {name or 'the model'} is compiled by torch.jit, which cannot "
                "have its weights sharded; use ddp, or leave it as it is written"
            )
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise SpecError(
                f"scale.parallel: {name or 'the model'} gives sparse gradients, which cannot be "
                "sharded: set sparse=False"
            )


def refuse_written_weights(module: nn.Module, name: str) -> None:
    """Have the first forward pass of `module` refused if it writes into gathered weights.

    What it writes would be lost when they are freed. To be called before FSDP has the module, so
    that the weights are there when the hooks are called. `name` is the module's in the model.
    """
    versions: dict[str, tuple[nn.Parameter, int]] = {}

    def before(*_: Any) -> None:
        for path, weight in module.named_parameters(prefix=name):
            if not is_distributed(weight):
                versions[path] = weight, weight._version

    def after(*_: Any) -> None:
        for handle in handles:
            handle.remove()
        written = [
            path.removeprefix("network.")
            for path, (weight, version) in versions.items()
            if weight._version != version and not stays_whole(weight)
        ]
        if written:
            raise TrainingError(
                f"scale.parallel: the forward pass writes into {written[0]}, and where weights are "
                "sharded that is lost; use ddp"
            )

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def share_buffers_each_step(forward: Forward) -> None:
    """Give all workers the buffers of rank 0 in the first pass of each step, as replicas do it.

    Those that the model was built with: all workers have them, whatever their batches are.
    """
    shapes = {name: buffer.shape for name, buffer in forward.named_buffers()}
    versions: dict[str, tuple[Tensor, int]] = {
        name: (buffer, buffer._version) for name, buffer in forward.named_buffers()
    }

    def share(*_: Any) -> None:
        if not torch.is_grad_enabled() or not forward.begins_step:
            return
        for name, buffer in forward.named_buffers():
            if shapes.get(name) != buffer.shape or not buffer.numel():
                continue
            known, version = versions[name]
            if buffer.numel() <= _SMALL or buffer is not known or buffer._version != version:
                values = local_tensor(buffer)
                sent = values if values.is_contiguous() else values.contiguous()
                dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)
                if sent is not values:
                    values.copy_(sent)
            versions[name] = buffer, buffer._version

    if shapes:
        forward.register_forward_pre_hook(share)


def average_gradients(weights: list[nn.Parameter]) -> None:
    """Average the gradients of weights that each worker keeps whole; collective."""
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        values: Tensor = weight.grad
        dist.all_reduce(torch.view_as_real(values) if values.is_complex() else values)
        values /= dist.get_world_size()
