"""The floating-point operations (FLOPs) of a model, counted while a training step computes.

Counted are products and convolutions, at two for a multiplication with its addition and at eight
for one of complex numbers, in the forward and the backward pass. Elementwise operations and Fourier
transforms are not. What is computed again in a backward pass counts once. Attention counts as its
products without a mask, as is usual (Chowdhery et al., PaLM, 2022, appendix B).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainers.torch_internals import (
    FlopFormula,
    flop_formulas,
    noting_operations,
    takes_functions,
)


class OperationCounter:
    """Counts the operations of one micro-batch as it is trained on; nothing is run for it."""

    def __init__(self) -> None:
        self.per_sample: float | None = None
        """FLOPs of one sample; None before they are counted, or if they cannot be."""
        self.in_backward = False
        """Whether the backward pass has begun: forward operations are then computed again."""
        self._failed = False

    @contextmanager
    def counting(self, samples: int) -> Iterator[None]:
        """In here the forward and backward pass of `samples` samples is counted."""
        self._formulas = _formulas()
        self.in_backward = self._failed = False
        self._total = 0
        with noting_operations(self._note):
            yield
        self.per_sample = None if self._failed else self._total / samples

    def _note(self, operation: Any, inputs: Sequence[Any], result: Any) -> None:
        """Count an operation; where that cannot be done, the operations of all are unknown."""
        formula = self._formulas.get(operation)
        if self._failed or (self.in_backward and torch.is_grad_enabled()):
            return
        if formula is None:
            # The operations of those functions are not seen.
            self._failed = takes_functions(operation)
            return
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        try:
            if all(tensor.layout is torch.strided for tensor in tensors):
                count = formula(*inputs, out_val=result)
                self._total += count * 4 if any(t.is_complex() for t in tensors) else count
                return
        except Exception:  # it must not end the step that it counts
            pass
        self._failed = True


def _formulas() -> dict[Any, FlopFormula]:
    """Formulas by operation: those of PyTorch's counter, and those that it lacks or has otherwise.

    Its convolutions backward take each group for the whole input. Its fused attention backward has
    five products for the forward pass's two, of which one is computed again.
    """
    aten = torch.ops.aten
    formulas = flop_formulas()
    for operation, formula in formulas.items():
        if "attention_backward" in str(operation):
            formulas[operation] = partial(_four_of_five, formula)
    for name, formula in _CORRECTED.items():
        if hasattr(aten, name):  # builds for other devices have other operations
            formulas[getattr(aten, name)] = formula
    return formulas


def _four_of_five(formula: FlopFormula, *inputs: Any, **options: Any) -> int:
    return formula(*inputs, **options) * 4 // 5


_ATTENTION = tuple(
    f"_scaled_dot_product_{kind}"
    for kind in (
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
)


def _rows(tensor: Tensor) -> int:
    """The number of vectors along the last dimension."""
    return math.prod(tensor.shape[:-1])


def _convolution(x: Tensor, weight: Tensor, *options: Any, out_val: Tensor, **_: Any) -> int:
    """Each element of a kernel is used once per sample and place, also if there are groups."""
    transposed = options[4]
    places = (x if transposed else out_val).shape[2:]
    return 2 * x.shape[0] * math.prod(places) * weight.numel()


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *options: Any, **_: Any) -> int:
    transposed, output_mask = options[4], options[-1]
    places = (x if transposed else grad).shape[2:]
    passes = sum(output_mask[:2])  # of the input and of the weight
    count: int = 2 * passes * x.shape[0] * math.prod(places) * weight.numel()
    return count


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products over all pairs of places; keys and values may have fewer heads (GQA)."""
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _attention_backward(_: Tensor, *inputs: Any, **__: Any) -> int:
    return 2 * _attention(*inputs)


def _mkldnn_rnn(x: Tensor, input_weight: Tensor, state_weight: Tensor, *_: Any, **__: Any) -> int:
    """One layer in one direction, on a CPU."""
    return 2 * _rows(x) * (input_weight.numel() + state_weight.numel())


def _mkldnn_rnn_backward(
    x: Tensor, input_weight: Tensor, state_weight: Tensor, *_: Any, **__: Any
) -> int:
    inputs = (2 if x.requires_grad else 1) * input_weight.numel()
    return 2 * _rows(x) * (inputs + 2 * state_weight.numel())


def _cudnn_rnn(x: Tensor, weights: list[Tensor], *_: Any, **__: Any) -> int:
    """All layers and directions at once."""
    return 2 * _rows(x) * sum(weight.numel() for weight in weights if weight.ndim == 2)


def _cudnn_rnn_backward(
    x: Tensor, weights: list[Tensor], stride: int, *options: Any, **__: Any
) -> int:
    """As for `_cudnn_rnn` and the gradients that `output_mask` asks for, its last argument."""
    whole = _cudnn_rnn(x, weights)
    of_input, *_, of_weights = options[-1]
    count: int = whole * (1 + of_weights)
    if not of_input:  # the first layer's input, in each direction
        directions = 2 if options[_BIDIRECTIONAL] else 1
        first = weights[: directions * stride : stride]
        count -= 2 * _rows(x) * sum(weight.numel() for weight in first)
    return count


_BIDIRECTIONAL = -5
"""Its place in the arguments: before batch_sizes, dropout_state, reserve and output_mask."""


def _trilinear(i1: Tensor, i2: Tensor, i3: Tensor, *expands: Any, **_: Any) -> int:
    """A product of three tensors, each expanded, summed over some dimensions (`nn.Bilinear`)."""
    shapes = []
    for tensor, new_dims in zip((i1, i2, i3), expands[:3], strict=True):
        for dim in sorted(new_dims):
            tensor = tensor.unsqueeze(dim)
        shapes.append(tensor.shape)
    full: Sequence[int] = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return 2 * math.prod(full)


_CORRECTED: dict[str, FlopFormula] = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "conv_tbc": lambda x, weight, *_, out_val, **__: 2 * _rows(out_val) * weight.numel(),
    **dict.fromkeys(_ATTENTION, _attention),
    **{f"{name}_backward": _attention_backward for name in _ATTENTION},
    "mkldnn_rnn_layer": _mkldnn_rnn,
    "mkldnn_rnn_layer_backward": _mkldnn_rnn_backward,
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _cudnn_rnn),
    **dict.fromkeys(("_cudnn_rnn_backward", "miopen_rnn_backward"), _cudnn_rnn_backward),
    "_trilinear": _trilinear,
    "dot": lambda x, *_, **__: 2 * x.numel(),
    "vdot": lambda x, *_, **__: 2 * x.numel(),
    "mv": lambda matrix, *_, **__: 2 * matrix.numel(),
    "addmv": lambda _, matrix, *__, **___: 2 * matrix.numel(),
    "addbmm": lambda _, a, b, *__, **___: 2 * a.numel() * b.shape[-1],
    "_grouped_mm": lambda a, b, *_, **__: 2 * a.numel() * b.shape[-1],
}
