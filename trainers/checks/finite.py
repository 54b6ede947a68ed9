"""Whether numbers are finite: those of a gradient, of weights and moments, of buffers."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainers.worker import local_tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor, or of this worker's shard of it, are finite; waits."""
    return bool(torch.isfinite(local_tensor(tensor.detach())).all())


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite, by the norm of all tensors; False may be an overflow."""
    local = [local_tensor(tensor.detach()) for tensor in tensors]
    return math.isfinite(nn.utils.get_total_norm(local).item())


def is_spoilt(buffer: Tensor) -> bool:
    """Whether a buffer has NaN or plus infinity; minus infinity is what masks are made of."""
    values = local_tensor(buffer.detach())
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if not values.is_floating_point() or not values.numel() or values.layout != torch.strided:
        return False
    return not bool(values.float().amax() < math.inf)  # NaN is larger than all numbers


def not_finite(loss: float, step: int, last_loss: float) -> str:
    """The line for a step, counted from 1, whose loss or gradient is not finite.

    `last_loss` is the last loss that was finite, NaN before the first one.
    """
    if math.isfinite(loss):
        return f"the gradient is not finite at step {step}, though the loss is {loss:.6g}"
    return f"the loss is {loss} at step {step} (the last finite one was {last_loss:.6g})"


def state_not_finite(names: list[str], done: int) -> str:
    """The line for a state whose weights or buffers of these names are not finite."""
    return f"not finite after step {done}: {listed(names)}; this state is not kept"


def listed(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
