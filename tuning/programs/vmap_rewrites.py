"""Rewrites calls that `torch.vmap` cannot batch over trials, while a step is traced."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

ValuePath = tuple[str, str]
"""Where a float of a trial is: a module's name and an attribute, or MODEL_SECTION and a field."""
MODEL_SECTION = "spec.model"
"""Stands in place of a module's name for a field of the spec's section `model`."""
Guards = dict[tuple[ValuePath, str, float], bool]
"""(Path of a float, comparison, constant) -> the outcome with which the program was traced."""


class NotFusibleError(Exception):
    """A trial cannot be a slot of a program; the message is the reason, in a phrase."""


def first_sentence(error: Exception) -> str:
    """The first sentence of an error, after the operation that `VmapRewrites` has noted on it."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return "".join([*getattr(error, "__notes__", []), f"{type(error).__name__}: {sentence}"])


class VmapRewrites(TorchFunctionMode):
    """Replaces the few calls that PyTorch cannot batch by equivalent ones, and records guards.

    If the code branches on a comparison of a batched float with a constant, it takes the branch of
    the trial that the program is traced for. The outcome is recorded as a guard: a trial with
    another outcome gets another program.
    """

    def __init__(
        self,
        batched: Sequence[tuple[Tensor, tuple[ValuePath, float]]],
        guards: Guards,
    ) -> None:
        """`batched` has each float as it is while tracing, its path, and its value in the trial."""
        super().__init__()
        self._batched, self._guards = {id(number): known for number, known in batched}, guards
        self._comparisons = {id(number): (number, "ne", 0.0) for number, _ in batched}
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
        if function is Tensor.__bool__ and id(args[0]) in self._comparisons:
            return self._outcome(*self._comparisons[id(args[0])])
        if (
            function in _TESTS
            and id(args[0]) in self._batched
            and isinstance(args[1], (int, float))
        ):
            compared = function(*args, **kwargs)
            self._comparisons[id(compared)] = (args[0], _TESTS[function], float(args[1]))
            self._held.append(compared)  # so that no other object gets its id
            return compared
        smoothing = kwargs.get("label_smoothing", 0.0)
        if function is F.cross_entropy and isinstance(smoothing, Tensor):
            sharp, flat = (
                function(*args, **{**kwargs, "label_smoothing": share}) for share in (0.0, 1.0)
            )
            return sharp + smoothing * (flat - sharp)  # the loss is linear in the smoothing
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is F.embedding:
            return _embedding(*args, **kwargs)
        return function(*args, **kwargs)

    def _outcome(self, number: Tensor, test: str, other: float) -> bool:
        """The outcome of a comparison for the trial that is traced; recorded as a guard."""
        path, value = self._batched[id(number)]
        outcome = bool(getattr(operator, test)(value, other))
        self._guards[path, test, other] = outcome
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
    """Attention with the slots folded into the batch, as one kernel: PyTorch has no vmap rule.

    Gradients are taken outside of vmap, through the attention that the rule below calls.
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
        raise NotFusibleError(
            "F.scaled_dot_product_attention(dropout_p): its masks cannot depend on the trial"
        )
    options["is_causal"] = is_causal
    output: Tensor = _Attention.apply(query, key, value, options)  # type: ignore[no-untyped-call]
    return output


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *options: Any, **named: Any
) -> Tensor:
    """An embedding whose padding has no gradient in any slot.

    PyTorch's own batching rule leaves the padding's gradient out in the first slot only.
    """
    rows = F.embedding(input, weight, None, *options, **named)
    if padding_idx is None:
        return rows
    padding = input == padding_idx % weight.shape[0]
    return torch.where(padding[..., None], rows.detach(), rows)
