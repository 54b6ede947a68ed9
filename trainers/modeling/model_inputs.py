"""Columns that hold more than the model's weights: what a workload gets, and what its model gets.

A workload's methods get float64 and complex128 columns as they are. The model computes in the dtype
of its weights, so its inputs are converted when it is called. Where PyTorch refuses to mix the two
dtypes, as in a product with a weight, the narrower one is taken.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainers.workload import Batch

NARROWER = {torch.float64: torch.float32, torch.complex128: torch.complex64}
"""The dtypes of columns that hold more than float32 weights, and what the model gets instead."""
REFUSED_BACKWARD = frozenset({F.huber_loss})
"""Functions that take two dtypes, but refuse them in the backward pass."""
_converting: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_wide(batch: Batch) -> bool:
    """Whether a column of a batch may hold more than the weights: see `column_dtype`."""
    return any(values.dtype in NARROWER for values in batch.values())


def convert_inputs(network: nn.Module, batch: Batch, dtype: torch.dtype) -> None:
    """Have the network convert its inputs if a column of `batch` holds more than `dtype`.

    The network converts what it is called with, and each layer of PyTorch's what it would refuse.
    What is wide on purpose within the network stays so, and so does a network that keeps weights
    or buffers in float64 itself. Calling this again changes nothing.
    """
    if dtype in NARROWER or not is_wide(batch):
        return
    for module in network.modules():
        if module in _converting:
            continue
        own = _dtypes(module, recurse=module is network)
        refuses = module is network or (bool(own) and _is_layer(module))
        if refuses and not own & NARROWER.keys():
            module.register_forward_pre_hook(_convert, with_kwargs=True)
            _converting.add(module)


def _dtypes(module: nn.Module, recurse: bool) -> set[torch.dtype]:
    """The dtypes of a module's weights and buffers that are no integers."""
    held = itertools.chain(module.parameters(recurse), module.buffers(recurse))
    return {each.dtype for each in held if each.is_floating_point() or each.is_complex()}


def _is_layer(module: nn.Module) -> bool:
    """Whether a module's class is, or is derived from, a layer of PyTorch's."""
    layers = (each for each in type(module).__mro__ if each is not nn.Module)
    return any(each.__module__.startswith("torch.nn.modules") for each in layers)


def _convert(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook."""
    return _narrow(args), _narrow(kwargs)


def _narrow(value: Any) -> Any:
    """`value` with its wide tensors converted, in lists, tuples and dictionaries too."""
    if isinstance(value, Tensor):
        return value.to(NARROWER[value.dtype]) if value.dtype in NARROWER else value
    if isinstance(value, dict):
        return {key: _narrow(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [_narrow(each) for each in value]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class MixedDtypes(TorchFunctionMode):
    """In this context, functions of PyTorch that refuse two dtypes take the narrower one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in REFUSED_BACKWARD:
            try:
                return func(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if not _mixes(args, kwargs):
                    raise
        return func(*_narrow(args), **_narrow(kwargs))


def _mixes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether some tensors are wide, and others not but of real or complex numbers too."""
    found = {each.dtype for each in _tensors([*args, *kwargs.values()])}
    inexact = {dtype for dtype in found if dtype.is_floating_point or dtype.is_complex}
    return bool(inexact & NARROWER.keys()) and bool(inexact - NARROWER.keys())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def mixed_dtypes(batch: Batch) -> contextlib.AbstractContextManager[Any]:
    """The context `MixedDtypes` where a column of the batch is wide; otherwise none."""
    return MixedDtypes() if is_wide(batch) else contextlib.nullcontext()
