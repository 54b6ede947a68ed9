"""In which numbers a model is computed: what a device allows, and layers in fp8."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cluster.base.errors import SpecError
from trainers.devices import Device
from trainers.spec import TrainSpec


def check_precision(precision: str, device: Device) -> None:
    """Raise SpecError unless the device computes `train.precision`."""
    if precision not in device.precisions:
        able = ", ".join(device.precisions)
        raise SpecError(f"train.precision: {precision} is not for {device.name}, only {able}")
    if precision == "fp8" and importlib.util.find_spec("torchao") is None:
        raise SpecError(
            "train.precision: fp8 needs the package torchao (pip install 'heliostat[fp8]')"
        )


def convert_to_fp8(network: nn.Module) -> nn.Module:
    """The network with its linear layers computing in fp8, for use under bf16 autocast.

    In place, with weights and their names kept, unless the network itself is one layer. Layers
    with sizes that are no multiples of 16, as the products need, stay as they are. Scales each
    tensor anew with one factor (torchao's recipe "tensorwise").
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and all(n % 16 == 0 for n in module.weight.shape)

    # In a weight's gradient the inner size is the batch's, which may be any.
    config = Float8LinearConfig(pad_inner_dim=True)
    layers: nn.Module = convert_to_float8_training(network, module_filter_fn=fits, config=config)
    return layers


def weights_dtype(train: TrainSpec) -> torch.dtype:
    """The dtype in which weights and optimizer state are kept."""
    return torch.float64 if train.precision == "fp64" else torch.float32


@contextmanager
def compute_precision(train: TrainSpec, device: torch.device) -> Iterator[None]:
    """Forward passes in here are computed in the spec's precision."""
    dtypes = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}
    if train.precision not in dtypes:
        yield
        return
    with torch.autocast(device.type, dtype=dtypes[train.precision]):
        yield
