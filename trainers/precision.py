"""The precision of a model's weights and of its computation."""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

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


def convert_weights(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give the network's weights and buffers the precision of `dtype`, in place.

    Complex tensors stay complex, with parts of that precision. What its author made more precise
    than the other weights, such as a table of times in float64, does not lose its digits.
    Integers stay as they are, and so do 8-bit floats, in which nothing is computed.
    """
    if any(is_lazy(tensor) for tensor in network.parameters()):
        return network.to(dtype)
    sizes: Counter[int] = Counter()
    for weight in network.parameters():
        if _computes(weight):
            sizes[weight.dtype.to_real().itemsize] += weight.numel()
    usual = sizes.most_common(1)[0][0] if sizes else torch.get_default_dtype().itemsize
    # Tensors that modules share are here once.
    for tensor in (*network.parameters(), *network.buffers()):
        size = tensor.dtype.to_real().itemsize if _computes(tensor) else 0
        if size and (size <= usual or size < dtype.itemsize):
            kind = dtype.to_complex() if tensor.is_complex() else dtype
            if tensor.dtype != kind:
                tensor.data = tensor.data.to(kind)
        if tensor.is_conj():  # a lazy conjugate has no view as pairs
            tensor.data = tensor.data.resolve_conj()
    return network


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor [...] as its pairs of real numbers [..., 2], a view; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _computes(tensor: Tensor) -> bool:
    """Whether a tensor has real or complex numbers in a precision that is computed in."""
    return tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize > 1)


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
