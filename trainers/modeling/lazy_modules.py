"""Lazy modules, such as `nn.LazyLinear`, which take their shapes from their first input."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from trainers.workload import Batch, Workload


def give_shapes(workload: Workload, network: nn.Module, samples: Batch, dtype: torch.dtype) -> None:
    """Give the lazy modules of a network their shapes and first weights, if it has any.

    Runs the workload's forward pass on the first two of `samples`, on the CPU and in evaluation
    mode: optimizers and the strategies of several workers need to know the parameters.
    """
    if not any(map(is_lazy, (*network.parameters(), *network.buffers()))):
        return
    batch = {
        name: values[:2].to(dtype if values.is_floating_point() else None, copy=True)
        for name, values in samples.items()
    }
    modes = {module: module.training for module in network.modules()}
    network.eval()
    with torch.no_grad():
        workload.forward(network, batch)
    for module, training in modes.items():
        module.training = training
