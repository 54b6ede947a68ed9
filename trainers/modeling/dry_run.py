"""One training step over fake tensors: what can be known of a model before it trains."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainers.modeling.dropout import Shape, dropout_modules
from trainers.modeling.model_inputs import MixedDtypes
from trainers.precision import column_dtype
from trainers.torch_internals import fake_tensor_mode
from trainers.workload import Batch, Workload, model_dtype


@dataclass(frozen=True)
class DryRun:
    """A model's forward and backward pass, run with shapes alone."""

    flops_per_sample: float
    unused_parameters: frozenset[str]
    """Parameters that are trained, but that the loss does not depend on."""
    dropout_shapes: Mapping[str, frozenset[Shape]]
    """By the name of each dropout module: the shapes of its inputs, the first dimension as rows
    per sample."""


def dry_run(workload: Workload, network: nn.Module, batch: Batch) -> DryRun | None:
    """Run forward and backward over `batch` [B, ...] without computing anything.

    The batch is best small, and of 2 or more where samples are normalised together. Shapes are
    passed through a copy of the network that takes no memory, so network, batch and random state
    stay as they are. None when the model cannot be run so, as when it asks for a tensor's value.

    FLOPs are those of products and convolutions, at two for a multiplication with its addition.
    Recomputation does not count, so give the network before it is wrapped in anything.
    """
    counter = FlopCounterMode(display=False)
    samples = len(next(iter(batch.values())))
    shapes: dict[str, set[Shape]] = {}
    try:
        # Fused attention has no formula on a CPU; its plain form has the same products.
        with (
            torch.random.fork_rng(devices=[]),
            sdpa_kernel(SDPBackend.MATH),
            fake_tensor_mode(),
        ):
            model = _copy(network, "cpu").train()
            for name, module in dropout_modules(model):
                shapes[name] = set()
                module.register_forward_pre_hook(partial(_record, shapes[name], samples))
            dtype = model_dtype(model)
            columns = {
                name: torch.empty(values.shape, dtype=column_dtype(values.dtype, dtype))
                for name, values in batch.items()
            }
            with counter, MixedDtypes():
                loss_B = workload.loss(workload.forward(model, columns), columns)
                torch.autograd.backward(loss_B.sum())
    except Exception:  # a user's model may do anything
        return None
    unused = {
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.grad is None
    }
    return DryRun(
        counter.get_total_flops() / samples,
        frozenset(unused),
        {name: frozenset(seen) for name, seen in shapes.items()},
    )


def dry_run_once(workload: Workload, network: nn.Module, batch: Batch) -> DryRun | None:
    """`dry_run`, but once for all trials of this process that differ in floats of the model only.

    It takes as long as some twenty steps of a small CNN. Of a float counts only whether it is 0,
    which may switch a part of the model off. For one worker: several would wait for each other if
    a parameter were unused after all.
    """
    model = workload.model.model_dump() if workload.model is not None else {}
    held = [*network.named_parameters(), *network.named_buffers()]
    key = (
        type(workload),
        repr(workload.data),
        repr([(k, v != 0 if isinstance(v, float) else v) for k, v in model.items()]),
        repr(network),
        repr([(name, t.shape, t.dtype, t.requires_grad) for name, t in held]),
        repr([(name, values.shape, values.dtype) for name, values in batch.items()]),
    )
    if key not in _dry_runs:
        _dry_runs[key] = dry_run(workload, network, batch)
    return _dry_runs[key]


_dry_runs: dict[tuple[Any, ...], DryRun | None] = {}


def _record(shapes: set[Shape], samples: int, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook that notes the shape of a dropout module's input."""
    shape = inputs[0].shape if inputs else ()
    if shape and shape[0] % samples == 0:
        shapes.add((shape[0] // samples, *shape[1:]))


def skeleton(network: nn.Module) -> nn.Module | None:
    """A copy of the network whose tensors have shapes and dtypes but no memory, for a dry run.

    None if a network cannot be copied so.
    """
    try:
        return _copy(network, "meta")
    except Exception:  # a user's model may hold anything
        return None


def _copy(network: nn.Module, device: str) -> nn.Module:
    """A copy of the network with other values in its tensors."""
    copies: dict[int, Any] = {}
    for module in network.modules():
        for tensor in (
            *module.parameters(recurse=False),
            *module.buffers(recurse=False),
            *vars(module).values(),
        ):
            if isinstance(tensor, nn.Parameter):
                values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                copies[id(tensor)] = nn.Parameter(values, tensor.requires_grad)
            elif isinstance(tensor, Tensor):
                copies[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return copy.deepcopy(network, copies)
