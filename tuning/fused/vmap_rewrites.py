"""Calls that PyTorch cannot batch over trials, in terms of ones that it can; while tracing."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

ValuePath = tuple[str, str]
"""Where a number that differs between trials stands: a module's name and attribute, or MODEL."""
MODEL_SECTION = "spec.model"
"""In place of a module's name: a field of the spec's section `model`."""
Guards = dict[tuple[ValuePath, str, float], bool]
"""A number, a comparison, a constant -> the answer that a program was traced with."""


class NotFusibleError(Exception):
    """Why a trial cannot be a slot of a program, in a phrase."""


def first_sentence(error: Exception) -> str:
    """An error's first sentence, after the operation that `Rewrites` has noted on it."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return "".join([*getattr(error, "__notes__", []), f"{type(error).__name__}: {sentence}"])


class VmapRewrites(TorchFunctionMode):
    """The few calls whose numbers PyTorch cannot batch, in terms of ones where it can.

    Where a lifted number that is compared with a constant decides how the program goes on, the
    answer is that of the trial that the program is traced for. It is kept as a guard: trials with
    another answer get a program of their own.
    """

    def __init__(
        self,
        batched: Sequence[tuple[Tensor, tuple[ValuePath, float]]],
        guards: Guards,
    ) -> None:
        super().__init__()
        self._lifted, self._guards = {id(number): known for number, known in batched}, guards
        self._questions = {id(number): (number, "ne", 0.0) for number, _ in batched}
        self._held: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        try:
            return self._rewritten(function, args, dict(kwargs or {}))
        except Exception as error:
            error.add_note(f"{resolve_name(function) or function}: ")
            raise

    def _rewritten(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if function is Tensor.__bool__ and id(args[0]) in self._questions:
            return self._answer(*self._questions[id(args[0])])
        if function in _TESTS and id(args[0]) in self._lifted and isinstance(args[1], (int, float)):
            answer = function(*args, **kwargs)
            self._questions[id(answer)] = (args[0], _TESTS[function], float(args[1]))
            self._held.append(answer)  # so that no other object gets its id
            return answer
        smoothing = kwargs.get("label_smoothing", 0.0)
        if function is F.cross_entropy and isinstance(smoothing, Tensor):
            sharp, flat = (
                function(*args, **{**kwargs, "label_smoothing": share}) for share in (0.0, 1.0)
            )
            return sharp + smoothing * (flat - sharp)  # it is linear in the share
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is F.embedding:
            return _embedding(*args, **kwargs)
        return function(*args, **kwargs)

    def _answer(self, number: Tensor, test: str, other: float) -> bool:
        place, value = self._lifted[id(number)]
        outcome = bool(getattr(operator, test)(value, other))
        self._guards[place, test, other] = outcome
        return outcome


_TESTS = {
    Tensor.__eq__: "eq",
    Tensor.__ne__: "ne",
    Tensor.__gt__: "gt",
    Tensor.__ge__: "ge",
    Tensor.__lt__: "lt",
    Tensor.__le__: "le",
    Tensor.eq: "eq",
    Tensor.ne: "ne",
    Tensor.gt: "gt",
    Tensor.ge: "ge",
    Tensor.lt: "lt",
    Tensor.le: "le",
}


class _Attention(torch.autograd.Function):
    """Attention with the slots folded into the batch: one kernel. PyTorch has no rule for it.

    Gradients are taken outside of vmap, through the attention that stands in `vmap`.
    """

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise AssertionError("gradients are taken outside of vmap")

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        *parts, options = inputs
        folded = [
            (part.movedim(dim, 0) if dim is not None else part.expand(info.batch_size, *part.shape))
            for part, dim in zip(parts, dims[:3], strict=True)
        ]
        output = F.scaled_dot_product_attention(*(part.flatten(0, 1) for part in folded), **options)
        return output.view(info.batch_size, -1, *output.shape[1:]), 0


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    if attn_mask is not None or query.ndim < 3:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, **options
        )
    if dropout_p:
        raise NotFusibleError("F.scaled_dot_product_attention(dropout_p): masks of no trial's own")
    options["is_causal"] = is_causal
    output: Tensor = _Attention.apply(query, key, value, options)  # type: ignore[no-untyped-call]
    return output


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *options: Any, **named: Any
) -> Tensor:
    """Batched, PyTorch leaves out the gradient of the padding in the first slot alone."""
    rows = F.embedding(input, weight, None, *options, **named)
    if padding_idx is None:
        return rows
    padding = input == padding_idx % weight.shape[0]
    return torch.where(padding[..., None], rows.detach(), rows)
