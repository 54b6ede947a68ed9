"""The modes of modules: training or evaluation, each as the workload's `build` left it.

A part that `build` puts into evaluation mode, such as a frozen backbone, stays in it: its
normalisation keeps its statistics, and its dropout is off.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def begin_training(network: nn.Module) -> None:
    """Put the network into training mode, but for the modules that are in evaluation mode now.

    `network.train()` is called: a module's own version of it may have more to do.
    """
    held = [module for module in network.modules() if not module.training]
    network.train()
    for module in held:
        module.training = False


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """In here the network is in evaluation mode; afterwards each module has its mode again."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        network.train()
        for module, training in before:
            module.training = training


def held_in_evaluation(network: nn.Module) -> list[str]:
    """The names of the largest parts that are in evaluation mode while the network trains.

    The name of the whole network is empty.
    """
    found: list[str] = []
    for name, module in network.named_modules():
        if not module.training and not any(_is_within(name, part) for part in found):
            found.append(name)
    return found


def normalises_batches(network: nn.Module) -> bool:
    """Whether a layer takes statistics from the samples that are in a forward pass together."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return any(isinstance(module, kinds) and module.training for module in network.modules())


def _is_within(name: str, part: str) -> bool:
    return not part or name.startswith(f"{part}.")
