"""The precision of a model's weights and of its computation."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cluster.base.errors import SpecError
from trainers.devices import Device
from trainers.spec import TrainSpec


def check_precision(precision: str, device: Device) -> None:
    """Raise SpecError unless the device supports `train.precision`."""
    if precision not in device.precisions:
        able = ", ".join(device.precisions)
        raise SpecError(f"train.precision: {device.name} does not support {precision}, only {able}")
    if precision == "fp8" and importlib.util.find_spec("torchao") is None:
        raise SpecError(
            "train.precision: fp8 needs the package torchao (pip install 'heliostat[fp8]')"
        )


def convert_to_fp8(network: nn.Module) -> nn.Module:
    """The network with its linear layers in fp8, for use under bf16 autocast.

    Converts in place and keeps the weights and their names, unless the network itself is a single
    layer. Layers whose sizes are not multiples of 16, as fp8 products require, stay unchanged.
    Each tensor is scaled by one factor of its own (torchao's recipe "tensorwise").
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and all(n % 16 == 0 for n in module.weight.shape)

    # The inner dimension of a weight's gradient is the batch, of any size.
    config = Float8LinearConfig(pad_inner_dim=True)
    layers: nn.Module = convert_to_float8_training(network, module_filter_fn=fits, config=config)
    return layers


def weights_dtype(train: TrainSpec) -> torch.dtype:
    """The dtype in which weights and optimizer state are kept."""
    return torch.float64 if train.precision == "fp64" else torch.float32


def column_dtype(column: torch.dtype, weights: torch.dtype) -> torch.dtype:
    """The dtype in which a column comes in batches, for weights of a dtype.

    Its own, or a wider one: a floating-point or complex column is never narrower than the weights.
    """
    if column.is_floating_point or column.is_complex:
        return torch.promote_types(column, weights)
    return column


@contextmanager
def compute_precision(train: TrainSpec, device: torch.device) -> Iterator[None]:
    """Context in which forward passes run in the spec's precision."""
    dtypes = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}
    if train.precision not in dtypes:
        yield
        return
    with torch.autocast(device.type, dtype=dtypes[train.precision]):
        yield
