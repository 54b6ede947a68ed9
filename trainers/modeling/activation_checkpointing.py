"""Activation checkpointing: a block keeps only its input, and is computed again in the backward
pass (Chen et al., 2016, arXiv:1604.06174).

Computing again changes nothing: what a block's modules hold besides their parameters, such as
running statistics, counters and tables, is for that time what it was before the forward pass.
"""

import copy
import functools
import random
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cluster.base.errors import SpecError
from trainers.modeling.dropout import DropoutRng
from trainers.torch_internals import allow_dropout_in_compiled_checkpoints


def checkpoint_activations(
    blocks: Iterable[nn.Module], dropout_rng: DropoutRng, compiled: bool = False
) -> None:
    """Compute each block again in the backward pass, with the same dropout masks; in place.

    Only the class of a block changes, to a subclass of its own, so names, hooks and keys of the
    state stay. No block may be a part of another one. `compiled` says that the network goes
    through `torch.compile`. Raises SpecError when there is no block.
    """
    blocks = list(blocks)
    if not blocks:
        raise SpecError(
            "train.activation_checkpointing: the model has no blocks to compute again; name them "
            "in the workload's method blocks"
        )
    kinds = {kind: _checkpointed_class(kind) for kind in {type(block) for block in blocks}}
    for block in blocks:
        block.__class__ = kinds[type(block)]
        block._dropout_rng = dropout_rng  # type: ignore[assignment]
    if compiled:
        allow_dropout_in_compiled_checkpoints()


class _CheckpointedBlock(nn.Module):
    _dropout_rng: DropoutRng

    def forward(self, *inputs: Any, **options: Any) -> Any:
        forward = functools.partial(super().forward, **options)
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if torch.compiler.is_compiling():
            return checkpoint(forward, *inputs, use_reentrant=False)
        before = _State(self, self._dropout_rng)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return _Noted(before), _Recomputed(before)

        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


def _checkpointed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputed{kind.__name__}", (_CheckpointedBlock, kind), {})


class _State:
    """What the forward pass of a block may change besides its output."""

    def __init__(self, block: nn.Module, dropout_rng: DropoutRng) -> None:
        self.dropout_rng, self.keys_B = dropout_rng, dropout_rng.keys_B
        self.host_random: _HostRandom | None = _HostRandom()
        self.entries = [(holder, _entries(holder)) for holder in _holders(block)]
        """Attributes and buffers by name, with the dictionaries that the modules have them in."""
        tensors = [t for _, held in self.entries for t in held.values() if _may_change(t)]
        self._versions = {id(tensor): (tensor, tensor._version) for tensor in tensors}
        self.values = {key: tensor.clone() for key, (tensor, _) in self._versions.items()}
        """Values by the tensor's id, of those that the forward pass changes in place."""

    def forget_unchanged(self) -> None:
        """Keep only what the forward pass has changed; to be called after it."""
        for key, (tensor, version) in self._versions.items():
            if tensor._version == version and tensor.numel() > _SMALL:
                del self.values[key]
        if self.host_random is not None and self.host_random.is_current():
            self.host_random = None

    def restore(self) -> None:
        """Give the modules what they held; they may change it, and this may be called again."""
        for holder, held in self.entries:
            for name, value in held.items():
                if id(value) in self.values:
                    holder[name] = self.values[id(value)].clone()
                elif type(value) in _CONTAINERS:
                    holder[name] = copy.copy(value)
                else:
                    holder[name] = value
        if self.host_random is not None:
            self.host_random.restore()


class _Noted(AbstractContextManager[None]):
    """In here the forward pass runs."""

    def __init__(self, before: _State) -> None:
        self._before = before

    def __exit__(self, *_: object) -> None:
        self._before.forget_unchanged()


class _Recomputed(AbstractContextManager[None]):
    """In here a block is computed again, from its state of before; its state of now comes back.

    A class, since a second backward pass through the same graph enters it once more.
    """

    def __init__(self, before: _State) -> None:
        self._before = before

    def __enter__(self) -> None:
        before, rng = self._before, self._before.dropout_rng
        self._keys_B, rng.keys_B = rng.keys_B, before.keys_B
        self._now = [(holder, dict(holder)) for holder, _ in before.entries]
        self._host_random = _HostRandom() if before.host_random is not None else None
        before.restore()

    def __exit__(self, *_: object) -> None:
        self._before.dropout_rng.keys_B = self._keys_B
        for holder, held in self._now:
            for name in holder.keys() - held.keys():
                del holder[name]
            holder.update(held)
        if self._host_random is not None:
            self._host_random.restore()


class _HostRandom:
    """The state of the generators that Python and numpy share with all code."""

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def is_current(self) -> bool:
        """Whether nothing has been drawn since."""
        now = _HostRandom()
        same = [np.array_equal(a, b) for a, b in zip(self._numpy, now._numpy, strict=True)]
        return self._python == now._python and all(same)

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)


_CONTAINERS = (list, dict, set)
_SMALL = 1 << 16
"""Elements of a tensor that is taken to have changed anyway: batch normalisation does not raise
the version of its running statistics."""
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_BUFFERS = "_buffers"


def _holders(block: nn.Module) -> Iterator[dict[str, Any]]:
    """The dictionaries of a block's modules that have attributes or buffers.

    PyTorch's own layers have state in buffers alone.
    """
    for part in block.modules():
        attributes = vars(part)
        if attributes[_BUFFERS]:
            yield attributes[_BUFFERS]
        if not type(part).__module__.startswith("torch.nn."):
            yield attributes


def _entries(holder: dict[str, Any]) -> dict[str, Any]:
    return {
        name: copy.copy(value) if type(value) in _CONTAINERS else value
        for name, value in holder.items()
        if name not in _OF_EVERY_MODULE
    }


def _may_change(value: Any) -> bool:
    """Whether a value is a tensor that may be changed in place; a result of weights is not."""
    return isinstance(value, Tensor) and not value.requires_grad and not value.is_inference()
