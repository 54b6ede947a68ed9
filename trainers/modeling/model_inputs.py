"""Columns that hold more than the model's weights: what a workload gets, and what its model gets.

A workload's methods get float64 and complex128 columns as they are. The model computes in the dtype
of its weights, so its inputs are converted when it is called. Where PyTorch refuses to mix the two
dtypes, as in a product with a weight, the narrower one is taken.
"""

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from trainers.workload import Batch

NARROWER = {torch.float64: torch.float32, torch.complex128: torch.complex64}
"""The dtypes of columns that hold more than float32 weights, and what the model gets instead."""
REFUSED_BACKWARD = frozenset({F.huber_loss})
"""Functions that take two dtypes, but refuse them in the backward pass."""


@dataclass
class _Conversion:
    """How a network converts its inputs: what the first passes have shown to be needed."""

    learns: bool
    layers: list[tuple[nn.Module, RemovableHandle]] = field(default_factory=list)
    """The layers that may convert something, and the hooks that make them do so."""
    mixes: dict[bool, bool] = field(default_factory=dict)
    """Whether gradients are recorded -> whether a function had to mix two dtypes then."""

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        recorded = torch.is_grad_enabled()
        with MixedDtypes() as mode:
            yield
        if not self.learns:
            return
        self.mixes[recorded] = mode.mixed or self.mixes.get(recorded, False)
        if recorded:  # a hook costs as much as a small operation
            for layer, hook in self.layers:
                if layer not in _converted:
                    hook.remove()
            self.layers.clear()


_conversions: weakref.WeakKeyDictionary[nn.Module, _Conversion] = weakref.WeakKeyDictionary()
_converted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that have converted an input."""


def convert_inputs(
    network: nn.Module, batch: Batch, dtype: torch.dtype, compiled: bool = False
) -> None:
    """Have the network convert its inputs if a column of `batch` holds more than `dtype`.

    The network converts what it is called with, and each layer of PyTorch's what it would refuse.
    What is wide on purpose within the network stays so, and so does a network that keeps weights
    or buffers in float64 itself. The layers that do not convert anything in the first training
    pass are left alone from then on, unless the network is `compiled`, which would be done again.
    Calling this again changes nothing.
    """
    wide = any(values.dtype in NARROWER for values in batch.values())
    if dtype in NARROWER or not wide or network in _conversions:
        return
    conversion = _conversions[network] = _Conversion(learns=not compiled)
    for module in network.modules():
        own = _dtypes(module, recurse=module is network)
        refuses = module is network or (bool(own) and _is_layer(module))
        if refuses and not own & NARROWER.keys():
            hook = module.register_forward_pre_hook(_convert, with_kwargs=True)
            if module is not network:
                conversion.layers.append((module, hook))


def mixed_dtypes(network: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The context in which a network that converts its inputs is run, with its loss and metrics.

    Functions of PyTorch that refuse two dtypes take the narrower one there. The first pass shows
    whether any does. Without wide columns, and later if none does, the context is empty.
    """
    conversion = _conversions.get(network)
    if conversion is None or conversion.mixes.get(torch.is_grad_enabled()) is False:
        return contextlib.nullcontext()
    return conversion.first_pass()


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
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook."""
    if not any(each.dtype in NARROWER for each in _tensors([args, kwargs])):
        return None
    _converted.add(module)
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

    mixed = False
    """Whether one has."""

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
        if _mixes(args, kwargs):
            self.mixed = True
        return func(*_narrow(args), **_narrow(kwargs))


def _mixes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether some tensors are wide, and others not but of real or complex numbers too."""
    found = {each.dtype for each in _tensors([args, kwargs])}
    inexact = {dtype for dtype in found if dtype.is_floating_point or dtype.is_complex}
    return bool(inexact & NARROWER.keys()) and bool(inexact - NARROWER.keys())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
