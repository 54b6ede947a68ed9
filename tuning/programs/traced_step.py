"""One training step of all slots, as one graph of plain tensor operations.

The network goes through `torch.vmap` over the slots, outside of which one call takes the gradient
of all losses: so only forward batching rules are needed. Tracing sees what runs eagerly, so that
the user's code meets none of the limits of Dynamo.

Suffixes: K slots, P trained weights of a trial in one row, B samples of a batch, C coefficients of
the update, F batched values.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule

from trainers.checks.returned_values import check_augmented, check_loss
from trainers.counter_rng import SampleRandom, host_rng_state
from trainers.data.sampling import SampleStream, to_device
from trainers.modeling.dropout import DropoutRng
from trainers.modeling.model_inputs import convert_inputs, mixed_dtypes
from trainers.precision import compute_precision, weights_dtype
from trainers.spec import RunSpec
from trainers.workload import Batch, Workload
from tuning.programs.batched_optimizers import BatchedOptimizer
from tuning.programs.batched_values import BatchedValues
from tuning.programs.program_signature import Variant
from tuning.programs.torch_internals import node_bytes, trace_operations
from tuning.programs.trial_state import SlotStates, named_tensors, tensor_places
from tuning.programs.vmap_rewrites import NotFusibleError, first_sentence

GRADIENT_TOLERANCE = 1e-3
GRADIENT_TOLERANCE_BF16 = 0.1
"""Relative difference between a weight's gradient in a program and alone that is still rounding; a
tenth of the whole gradient's norm counts with it, for weights whose gradient is nearly zero."""


class SlotStep:
    """A training step of all slots, as a function of tensors that can be traced."""

    def __init__(
        self,
        variant: Variant,
        network: nn.Module,
        dropout_rng: DropoutRng,
        optimizer: BatchedOptimizer,
        values: BatchedValues,
        states: SlotStates,
        columns: Sequence[str],
    ) -> None:
        """`columns` are the names of a batch's tensors, which the step takes last."""
        self._variant, self._network, self._dropout_rng = variant, network, dropout_rng
        self._optimizer, self._values, self._states = optimizer, values, states
        self._columns = columns
        self._places = {f"network.{place}": name for place, name in tensor_places(network).items()}

    def trace(self, inputs: Sequence[Tensor]) -> GraphModule:
        """The operations of a step; raises NotFusibleError that names the one in the way."""
        before = host_rng_state()
        with _not_fusible(), torch.enable_grad():
            graph = trace_operations(self, inputs)
        if host_rng_state() != before:
            raise NotFusibleError(
                "the model draws from Python's or numpy's generator: each step would draw the same"
            )
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return graph

    def __call__(self, *tensors: Tensor) -> Tensor:
        """One step, in place on the state; returns losses and gradient norms of the slots [2, K].

        Takes the tensors of `SlotStates`, the update's coefficients, the position of the first
        sample, the seed's key, the batched values with their thresholds, and the batch's columns.
        """
        count = len(self._states.moments)
        weights_KP, moments, rest = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        buffers = dict(zip(self._states.buffers, rest, strict=False))
        active_K, coefficients_KC, *others = rest[len(buffers) :]
        loss_K, changed, gradient_KP = self._gradient(weights_KP, buffers, others)
        with torch.no_grad():
            *c, clip_K1 = (column[:, None] for column in coefficients_KC.unbind(1))
            norm_K1 = gradient_KP.square().sum(1, keepdim=True).sqrt()
            if self._variant.spec.train.clip_norm is not None:
                gradient_KP = gradient_KP * (clip_K1 / (norm_K1 + 1e-6)).clamp(max=1.0)
            new_KP, new_moments = self._optimizer.update(
                weights_KP, gradient_KP, moments, self._states.decayed_P, c
            )
            # A trial whose loss or gradient is not finite keeps its last good state, and stands
            # still.
            loss_K, norm_K = torch.where(active_K, loss_K.detach(), math.nan), norm_K1.squeeze(1)
            good_K = torch.isfinite(loss_K) & torch.isfinite(norm_K)
            updated = (new_KP, *new_moments, *(changed[name] for name in buffers))
            for old, new in zip((weights_KP, *moments, *buffers.values()), updated, strict=True):
                good = good_K.view(-1, *[1] * (old.ndim - 1))
                old.copy_(torch.where(good, new, old))
            active_K.copy_(good_K)
        return torch.stack((loss_K, norm_K.to(loss_K.dtype)))

    def check_gradient(
        self, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], inputs: Sequence[Tensor]
    ) -> None:
        """Raise NotFusibleError unless a step takes the gradient that the network takes itself.

        A network's own backward pass may call hooks, which are none of its operations. `tensors`
        are its parameters and buffers before the pass, `wanted` the gradients of its trained
        weights, and `inputs` those of the same step, for one slot, after the state.
        """
        _, *others = inputs
        weights_1P = torch.cat([tensors[name].flatten() for name in wanted])[None]
        buffers = {name: tensors[name][None] for name in self._states.buffers}
        with _not_fusible(), torch.enable_grad():
            _, _, gradient_1P = self._gradient(weights_1P, buffers, others)
        bf16 = self._variant.spec.train.precision == "bf16"
        tolerance = GRADIENT_TOLERANCE_BF16 if bf16 else GRADIENT_TOLERANCE
        size = torch.stack([each.norm() for each in wanted.values()]).norm()
        if not torch.isfinite(size):
            return
        for name, found in self._states.weights_by_name(gradient_1P[0]).items():
            alone = wanted[name]
            if (found - alone).norm() > tolerance * (alone.norm() + 0.1 * size):
                raise NotFusibleError(
                    f"the gradient of {name} is another one than alone: something in the backward "
                    "pass, such as a hook, is no operation on tensors"
                )

    def _gradient(
        self, weights_KP: Tensor, buffers: Mapping[str, Tensor], others: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The losses of the slots, their buffers afterwards, and their gradients [K, P]."""
        first_K, seed_key_K, values_KF, thresholds_KF, *columns = others
        batch = dict(zip(self._columns, columns, strict=True))
        leaf_KP = weights_KP.detach().requires_grad_()
        loss_K, changed = torch.vmap(self._slot_loss)(
            leaf_KP,
            {name: value.clone() for name, value in buffers.items()},
            values_KF,
            thresholds_KF,
            seed_key_K,
            first_K,
            batch,
        )
        (gradient_KP,) = torch.autograd.grad(loss_K.sum(), leaf_KP)
        return loss_K, changed, gradient_KP

    def _slot_loss(
        self,
        weights_P: Tensor,
        buffers: dict[str, Tensor],
        values_F: Tensor,
        thresholds_F: Tensor,
        seed_key: Tensor,
        first: Tensor,
        batch: Batch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of one slot's batch, and its buffers afterwards; runs under vmap."""
        tensors = {**self._states.weights_by_name(weights_P), **buffers}
        spec = self._variant.spec
        positions_B = torch.arange(spec.train.global_batch, device=first.device)
        random = SampleRandom(seed_key, first + positions_B)
        with (
            self._values.substituted(values_F, thresholds_F) as workload,
            self._dropout_rng.seeded_by(random),
        ):
            return functional_call(  # type: ignore[no-any-return]
                _LossModule(self._network, buffers),
                {place: tensors[name] for place, name in self._places.items()},
                (workload, spec, batch, random),
                tie_weights=False,  # it would replace twice what a module under two names holds
            )


@contextmanager
def _not_fusible() -> Iterator[None]:
    """Turns what a user's model may raise under vmap into NotFusibleError."""
    try:
        yield
    except NotFusibleError:
        raise
    except Exception as error:
        raise NotFusibleError(first_sentence(error)) from error


def reference_loss(
    variant: Variant,
    network: nn.Module,
    dropout_rng: DropoutRng,
    step: int,
    samples: SampleStream,
    device: torch.device,
) -> Tensor:
    """The loss of a step as the trial's own network computes it, outside of any program."""
    positions, index = samples.positions_and_indices(step)
    batch = samples.gather(index.to(samples.device))
    batch = to_device(batch, device, weights_dtype(variant.spec.train))
    random = SampleRandom(variant.spec.train.seed, positions.to(device))
    convert_inputs(network, batch, weights_dtype(variant.spec.train))
    with dropout_rng.seeded_by(random):
        loss, _ = _LossModule(network, {})(variant.workload, variant.spec, batch, random)
    return loss  # type: ignore[no-any-return]


def peak_bytes(graph: GraphModule) -> int:
    """The most memory that the tensors of a step take at once, its inputs included."""
    last_use = {each: node for node in graph.graph.nodes for each in node.all_input_nodes}
    held, peak = 0, 0
    for node in graph.graph.nodes:
        held += node_bytes(node)
        peak = max(peak, held)
        held -= sum(node_bytes(each) for each in node.all_input_nodes if last_use[each] is node)
    return peak


class _LossModule(nn.Module):
    """A network with its loss, for `functional_call`: workloads are given whole modules."""

    def __init__(self, network: nn.Module, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self._names = list(buffers)

    def forward(
        self, workload: Workload, spec: RunSpec, batch: Batch, random: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = workload.augment(batch, random)
        check_augmented(workload, batch, spec.train.global_batch)
        with compute_precision(spec.train, random.positions.device), mixed_dtypes(self.network):
            loss_B = workload.loss(workload.forward(self.network, batch), batch)
        check_loss(workload, loss_B, spec.train.global_batch)
        held = named_tensors(self.network)
        return loss_B.mean(), {name: held[name].detach() for name in self._names}
