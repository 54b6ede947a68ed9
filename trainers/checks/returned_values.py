"""Checks of what a workload's methods return: one line that names the method and its duty.

All are made before the first update. Those of each step look at nothing on a device.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cluster.base.errors import TrainingError
from trainers.workload import Workload


def check_network(workload: Workload, network: Any) -> None:
    """Raise a TrainingError unless `build` has returned a network with weights to train."""
    method = _method(workload, "build")
    if not isinstance(network, nn.Module):
        raise TrainingError(f"{method} must return a torch.nn.Module (got {_described(network)})")
    weights = list(network.parameters())
    if not weights:
        raise TrainingError(
            f"{method} must return a network with parameters to train "
            f"({type(network).__name__} has none)"
        )
    if not any(weight.requires_grad for weight in weights):
        raise TrainingError(
            f"{method} must return a network of which something is trained "
            f"(all {len(weights)} parameters are frozen: requires_grad is False)"
        )


def check_augmented(workload: Workload, batch: Any, samples: int) -> None:
    """Raise a TrainingError unless `augment` has returned a batch of as many samples."""
    if isinstance(batch, dict) and batch and len(next(iter(batch.values()))) == samples:
        return
    raise TrainingError(
        f"{_method(workload, 'augment')} must return the batch, a dict of columns with {samples} "
        f"samples each (got {_described(batch)})"
    )


def check_loss(workload: Workload, loss_B: Any, samples: int) -> None:
    """Raise a TrainingError unless `loss` has returned one floating-point number per sample."""
    if (
        isinstance(loss_B, Tensor)
        and loss_B.shape == (samples,)
        and loss_B.is_floating_point()
        and not loss_B.is_sparse
    ):
        return
    raise TrainingError(
        f"{_method(workload, 'loss')} must return one value per sample, a floating-point tensor of "
        f"shape [{samples}] (got {_described(loss_B)})"
    )


def check_differentiable(workload: Workload, loss_B: Tensor) -> None:
    """Raise a TrainingError if the loss does not depend on any weight that is trained."""
    if not loss_B.requires_grad:
        raise TrainingError(
            f"{_method(workload, 'loss')} must depend on the weights that are trained (got a "
            "tensor without a gradient: detached, made under no_grad, or from frozen parts alone)"
        )


def check_dense_gradients(workload: Workload, network: nn.Module) -> None:
    """Raise a TrainingError if a backward pass has given a weight a sparse gradient."""
    for name, weight in network.named_parameters():
        if weight.grad is not None and weight.grad.is_sparse:
            raise TrainingError(
                f"{_method(workload, 'build')} must make layers with dense gradients (that of "
                f"{name} is sparse): set sparse=False"
            )


def check_per_sample(name: str, values: Any, samples: int) -> None:
    """Raise a TrainingError unless a metric of the workload has one value per sample."""
    if not isinstance(values, Tensor) or values.shape != (samples,):
        raise TrainingError(
            f"the workload's {name} must have one value per sample, shape [{samples}] "
            f"(got {_described(values)})"
        )


def _method(workload: Workload, name: str) -> str:
    return f"{type(workload).__name__}.{name}"


def _described(value: Any) -> str:
    """A value in a few words: the shape of a tensor, the keys or the length of a container."""
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, Tensor):
        layout = "a sparse tensor of " if value.is_sparse else ""
        return f"{layout}shape {list(value.shape)}, {_dtype(value.dtype)}"
    if isinstance(value, dict):
        shown = ", ".join(f"{key}: {_size(each)}" for key, each in [*value.items()][:3])
        return f"a dict of {len(value)}: {shown}" if value else "an empty dict"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _dtype(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _size(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
