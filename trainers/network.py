"""A workload's network: built from a run's seed, and its buffers by their names."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from trainers.counter_rng import combine_seeds, seed_device
from trainers.devices import Cpu
from trainers.precision import weights_dtype
from trainers.spec import TrainSpec
from trainers.workload import Workload


def build_network(train: TrainSpec, workload: Workload) -> nn.Module:
    """A new network of the workload on the CPU, the same for the same seed; not collective."""
    seed_device(Cpu(), combine_seeds(train.seed))
    network = workload.build().to(weights_dtype(train))
    if train.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


@contextmanager
def random_state_kept() -> Iterator[None]:
    """What is drawn in here from torch's, numpy's and Python's generators changes no later draw."""
    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def saved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of the state_dict, by name; one may have several names."""
    saved = network.state_dict()
    found = network.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in found if name in saved}


def set_buffer(
    network: nn.Module, name: str, value: Tensor | None, persistent: bool = True
) -> None:
    """Make `value` the buffer `name`, which need not have been there; None removes its value."""
    path, _, last = name.rpartition(".")
    module = network.get_submodule(path)
    if hasattr(module, last):
        setattr(module, last, value)
    else:
        module.register_buffer(last, value, persistent)


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy `values` into `tensor`, also where several of its elements are one in memory."""
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            tensor, values = tensor.narrow(dimension, 0, 1), values.narrow(dimension, 0, 1)
    tensor.detach().copy_(values)
