"""Activation checkpointing: a block keeps only its input, and is computed again in the backward
pass (Chen et al., 2016, arXiv:1604.06174).
"""

import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
    state stay. Blocks inside of blocks are left alone. `compiled` says that the network goes
    through `torch.compile`. Raises SpecError when there is no block.
    """
    blocks = [block for block in blocks if not isinstance(block, (nn.ModuleList, nn.ModuleDict))]
    if not blocks:
        raise SpecError(
            "train.activation_checkpointing: the model has no blocks to compute again; name them "
            "in the workload's method blocks"
        )
    inner = {part for block in blocks for part in block.modules() if part is not block}
    kinds = {kind: _checkpointed_class(kind) for kind in {type(block) for block in blocks}}
    for block in set(blocks) - inner:
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
        keys_B = self._dropout_rng.keys_B

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _ReplayDropout(self._dropout_rng, keys_B)

        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


def _checkpointed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputed{kind.__name__}", (_CheckpointedBlock, kind), {})


class _ReplayDropout(AbstractContextManager[None]):
    """In here dropout draws from `keys_B` on; afterwards it goes on as if nothing was drawn.

    A class, since a second backward pass through the same graph enters it once more.
    """

    def __init__(self, dropout_rng: DropoutRng, keys_B: Tensor | None) -> None:
        self._dropout_rng, self._keys_B = dropout_rng, keys_B

    def __enter__(self) -> None:
        self._before = self._dropout_rng.keys_B
        self._dropout_rng.keys_B = self._keys_B

    def __exit__(self, *_: object) -> None:
        self._dropout_rng.keys_B = self._before
