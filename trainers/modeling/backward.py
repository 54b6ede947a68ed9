"""Backward passes on several workers, and the exchange of gradients at the end of a step."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.base.errors import TrainingError
from trainers.modeling.forward import Forward
from trainers.modeling.sharding import average_gradients
from trainers.torch_internals import noting_used_shards
from trainers.worker import is_distributed

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def sharded_module(model: nn.Module) -> "FSDPModule | None":
    """The model if FSDP shards it. Where FSDP was not imported, it does not."""
    module = sys.modules.get("torch.distributed.fsdp")
    sharded = isinstance(model, getattr(module, "FSDPModule", ()))
    return cast("FSDPModule", model) if sharded else None


@contextmanager
def sync_gradients_if(model: nn.Module, last: bool) -> Iterator[None]:
    """In here, backward passes exchange gradients between the workers only if `last`.

    `last` is whether this is the last micro-batch of a step.
    """
    if (sharded := sharded_module(model)) is not None:
        sharded.set_requires_gradient_sync(last)
        yield
        cast(Forward, model).begins_step = last
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def release_gathered(model: nn.Module) -> None:
    """Keep this worker's part of the weights only, after forward passes without backward ones."""
    for module in model.modules():
        if (sharded := sharded_module(module)) is not None:
            sharded.reshard()


class BackwardPass:
    """Backward passes of a parallel model; the last one of a step exchanges the gradients.

    A parameter that no worker has used in a step has no gradient, as on one worker: the optimizer
    leaves it alone. One that some workers have used has their mean, where the others count as zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        self._names = {name for name, _ in model.named_parameters()}
        self._replicated = isinstance(model, DistributedDataParallel)
        self._sharded = sharded_module(model) is not None
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._whole = [weight for weight in self._weights if not is_distributed(weight)]
        self._before: list[Tensor | None] | None = None
        """The gradients before the last backward pass of a step, if there were others."""

    def run(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; collective if this is the `last` backward pass of a step.

        The first call raises a TrainingError if the forward pass has made parameters.
        """
        if self._model is not None:
            self._check_late_parameters(self._model)
            self._model = None
        if last and self._replicated:
            self._run_replicated(loss)
        elif last and self._sharded:
            self._run_sharded(loss)
        else:
            torch.autograd.backward(loss)
            if self._replicated:
                self._before = [weight.grad for weight in self._weights]

    def _check_late_parameters(self, model: nn.Module) -> None:
        """What the optimizer does not know is not trained, and differs between the workers."""
        late = [name for name, _ in model.named_parameters() if name not in self._names]
        if late:
            name = late[0].partition("network.")[2]
            raise TrainingError(
                f"the workload's build must make all parameters (the forward pass has made {name})"
            )

    def _run_replicated(self, loss: Tensor) -> None:
        """DDP waits for a gradient of every parameter; one that is missing here is -0.0.

        DDP could look for them itself in each forward pass, for an exchange more in each step.
        """
        before, self._before = self._before, None
        torch.autograd.backward(loss)
        if before is None:  # for most steps this is all
            same = [weight for weight in self._weights if weight.grad is None]
        else:  # DDP gives a weight another tensor for its gradient, a part of a bucket
            both = zip(self._weights, before, strict=True)
            same = [weight for weight, grad in both if weight.grad is grad]
        if not same:
            return
        reached = _reached(loss)
        missing = [weight for weight in same if weight not in reached]
        if not missing:
            return
        unused = [weight for weight in missing if weight.grad is None]
        torch.autograd.backward(missing, [-torch.zeros_like(weight) for weight in missing])
        for weight, idle in zip(unused, _negative_zeros(unused), strict=True):
            if idle:
                weight.grad = None

    def _run_sharded(self, loss: Tensor) -> None:
        """FSDP takes zeros for missing gradients. An exchange tells whether all workers did.

        Zeros do not: of a few rows, some workers have no part.
        """
        with noting_used_shards() as (used, unused):
            torch.autograd.backward(loss)
        unused -= used
        unused |= {weight for weight in self._whole if weight.grad is None}
        here = torch.tensor([int(weight not in unused) for weight in self._weights])
        counts = here.to(loss.device, non_blocking=True)
        dist.all_reduce(counts)
        average_gradients(self._whole)
        if unused:  # else there is nothing to wait for
            for weight, count in zip(self._weights, counts.tolist(), strict=True):
                if not count:
                    weight.grad = None


def _reached(loss: Tensor) -> set[Tensor]:
    """The parameters on which the loss depends."""
    found: set[Tensor] = set()
    seen: set[Any] = set()
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # where the gradient of a leaf is accumulated
            found.add(node.variable)
        pending.extend(function for function, _ in node.next_functions)
    return found


def _negative_zeros(weights: list[nn.Parameter]) -> list[bool]:
    """Whether each gradient is -0.0 throughout: a sum to which all workers have added that."""
    grads = [cast(Tensor, weight.grad) for weight in weights]
    parts = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
    found = [(part.signbit() & (part == 0)).all() for part in parts]
    return torch.stack(found).tolist() if found else []
