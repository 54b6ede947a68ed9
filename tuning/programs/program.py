"""Many trials as one program on one device.

A program has K slots. A slot holds a trial: one row of every tensor that training changes, and one
entry in every vector of numbers that the training rule takes. One step advances all slots; forward
pass, backward pass and update are one compiled graph. Shapes never change, so a trial that ends
makes room for another one without recompiling.

A slot computes what `trainers.engine.step.TrainStep` computes for the trial alone: the same order
of samples, augmentation, dropout masks, schedule and update, none of which depends on the slot or
on its neighbours. A trial's first loss is compared with that of its own network.

Suffixes: K slots, P trained weights of a trial in one row, B samples of a batch, C coefficients of
the update, n steps.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trainers.checks.returned_values import check_dense_gradients, check_differentiable
from trainers.counter_rng import seed_key
from trainers.data.sampling import SampleStream, to_device
from trainers.devices import Device
from trainers.modeling.build import build_network
from trainers.modeling.dropout import DropoutRng, key_dropout_by_sample
from trainers.modeling.optimizer import build_optimizer, learning_rate
from trainers.precision import weights_dtype
from trainers.workload import Batch
from tuning.programs.batched_optimizers import BATCHED_OPTIMIZERS, FloatArray
from tuning.programs.batched_values import BatchedValues
from tuning.programs.compile_step import CompiledStep, compile_step
from tuning.programs.program_signature import Variant, check_buffers, signature
from tuning.programs.traced_step import SlotStep, peak_bytes, reference_loss
from tuning.programs.trial_state import SlotStates, TrialState, named_tensors
from tuning.programs.vmap_rewrites import NotFusibleError

LOSS_TOLERANCE = 1e-4
LOSS_TOLERANCE_BF16 = 0.02
"""Relative difference between a trial's first loss in its slot and alone that is still rounding."""


class TrialMismatchError(NotFusibleError):
    """Some trials of a program do not compute in their slots what they compute alone."""

    def __init__(self, reasons: Mapping[int, str], losses: list[list[float]]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons
        """Slot -> reason, for these trials."""
        self.losses = losses
        """What `Program.run` would have returned; the losses of the other trials are right."""


@dataclass
class _SlotOccupant:
    """The trial in a slot."""

    variant: Variant
    samples: SampleStream
    module_floats: Mapping[tuple[str, str], float]
    steps_done: int
    reference_loss: float | None
    """The loss of its next step, computed by its own network; None after the comparison."""
    failed_loss: float = math.nan
    """The loss of the step that was not finite."""


class Program:
    """K slots, and the step that advances them."""

    def __init__(
        self,
        variant: Variant,
        slots: int,
        samples: Batch,
        device: Device,
        varied: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """A traced, not yet compiled program with empty slots, for trials like `variant`.

        `samples` is the training split. `varied` maps each field of the section `model` that
        differs between trials as a float to some of its values. Raises NotFusibleError, which
        names the operation that prevents fusing.
        """
        self.slots, self.device, self.variant = slots, device.device, variant
        self._varied = dict(varied or {})
        spec = variant.spec
        self._dtype, self._batch = weights_dtype(spec.train), spec.train.global_batch
        self._samples = SampleStream(_on_device_if_small(samples, device), 0, self._batch)
        self._rule, one = BATCHED_OPTIMIZERS[spec.optimizer.name], np.ones(1)
        self._coefficient_count = len(self._rule.coefficients(spec.optimizer, one, one)) + 1
        network = build_network(spec.train, variant.workload)
        self._signature = signature(variant, network, self._varied)
        self._network = network.to(self.device)
        dropout_rng = key_dropout_by_sample(network)
        zeros_K = torch.zeros(slots, dtype=self._dtype, device=self.device)
        self._values = BatchedValues(variant, network, dropout_rng, self._varied, zeros_K)
        built = {name: tensor.detach().clone() for name, tensor in named_tensors(network).items()}
        gradients = self._gradients_alone(dropout_rng)
        trained = {name: network.get_parameter(name) for name in gradients}
        check_buffers(built, network)
        self._states = SlotStates(network, trained, self._rule.moments, slots)
        self._seed_key_K = torch.full_like(zeros_K, seed_key(spec.train.seed), dtype=torch.int64)
        self.optimizer = build_optimizer(spec.optimizer, network)
        """The optimizer of the network that `network_with` returns."""
        self._occupants: dict[int, _SlotOccupant] = {}
        step = SlotStep(
            variant,
            network,
            dropout_rng,
            self._rule,
            self._values,
            self._states,
            self._samples.columns,
        )
        inputs = [*(tensor.clone() for tensor in self._states.tensors()), *self._idle_inputs()]
        began_s = time.thread_time()
        self.graph = step.trace(inputs)
        self.trace_s = time.thread_time() - began_s
        """Seconds of a CPU that tracing took."""
        first_KB = self._samples.indices(0, self._batch).repeat(slots, 1)
        step.check_gradient(built, gradients, [each[:1] for each in self._idle_inputs(first_KB)])
        self._step: CompiledStep = self.graph

    def _gradients_alone(self, dropout_rng: DropoutRng) -> dict[str, Tensor]:
        """The first gradient of each parameter that a step changes, by the network itself.

        Those are the parameters on which the loss of a batch depends. Raises NotFusibleError if
        they are not all of the trial's precision.
        """
        loss = reference_loss(
            self.variant, self._network, dropout_rng, 0, self._samples, self.device
        )
        check_differentiable(self.variant.workload, loss)
        torch.autograd.backward(loss)
        check_dense_gradients(self.variant.workload, self._network)
        parameters = dict(self._network.named_parameters())
        gradients = {name: w.grad for name, w in parameters.items() if w.grad is not None}
        for name, weight in parameters.items():
            weight.grad = None
            if name in gradients and weight.dtype != self._dtype:
                kind = str(weight.dtype).removeprefix("torch.")
                raise NotFusibleError(
                    f"{name} is {kind}: a slot's weights are one row of numbers of one precision"
                )
        return gradients

    def fits(self, variant: Variant, network: nn.Module) -> bool:
        """Whether a trial can be in a slot of this program; `network` is its own, as built."""
        same = signature(variant, network, self._varied) == self._signature
        return same and self._values.accept(variant, network)

    def peak_bytes(self) -> int:
        """The most memory that the tensors of a step take at once, its inputs included."""
        return peak_bytes(self.graph)

    def compile(self) -> None:
        """Compile the step, which takes from two seconds to a minute; see `compile_step`."""
        state = self._states.tensors()
        inputs = [*state, *self._idle_inputs()]
        self._states.active_K.zero_()  # so that the steps done here change nothing
        step = compile_step(self.graph, inputs, len(state))
        with torch.no_grad():
            step(*inputs)
        self._step = step

    # Trials in and out.

    def load_trial(
        self, slot: int, variant: Variant, network: nn.Module, state: TrialState | None = None
    ) -> None:
        """Put a trial into a slot, from its first step or from `state`; replaces what was there.

        `network` is the trial's own: as built, or with the weights of `state`.
        """
        state = state or self._states.initial(network)
        self._states.set(slot, state)
        self._values.set_slot(slot, variant, network)
        self._seed_key_K[slot] = seed_key(variant.spec.train.seed)
        samples = SampleStream(self._samples.split, variant.spec.train.seed, self._batch)
        module_floats = self._values.in_modules(network)
        expected = None
        if state.steps_done < variant.total_steps:
            self._states.point_at(state.copy(), network)  # a forward pass may change buffers
            rng = key_dropout_by_sample(network.to(self.device))
            with torch.random.fork_rng(devices=[]):
                loss = reference_loss(variant, network, rng, state.steps_done, samples, self.device)
            expected = loss.item()
        self._occupants[slot] = _SlotOccupant(
            variant, samples, module_floats, state.steps_done, expected
        )

    def free(self, slot: int) -> None:
        """Empty a slot."""
        del self._occupants[slot]

    def state_of(self, slot: int) -> TrialState:
        """The state of the trial in a slot, as views that the next step changes."""
        occupant = self._occupants[slot]
        return self._states.get(slot, occupant.steps_done, occupant.module_floats)

    def state_from(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, steps_done: int
    ) -> TrialState:
        """A copy of the state of an ordinary network and its optimizer after `steps_done` steps."""
        floats = self._values.in_modules(network)
        return self._states.copy_from(network, optimizer, steps_done, floats)

    def not_finite(self, state: TrialState) -> list[str]:
        """The weights and buffers of a state that training has made not finite; waits."""
        return self._states.not_finite(state)

    def network_with(self, state: TrialState) -> nn.Module:
        """An ordinary network with a state, which is not copied; valid until the next call.

        `optimizer` is its optimizer, with the same state.
        """
        self._states.point_at(state, self._network, self.optimizer)
        for (module, name), value in state.module_floats.items():
            setattr(self._network.get_submodule(module), name, value)
        return self._network

    # Training.

    def run(self, slots: Sequence[int], steps: int) -> list[list[float]]:
        """Advance the trials in `slots` by `steps` steps; returns the losses, [step][slot].

        A loss or gradient that is not finite ends a trial's advance: its state stays as it was
        before that step, whose loss is NaN, as are the later ones; see `failed_loss`. Raises
        TrialMismatchError, after the steps, if the first loss of a trial differs from the one that
        its own network computes.
        """
        coefficients_nKC = np.zeros((steps, self.slots, self._coefficient_count))
        first_nK = np.zeros((steps, self.slots), np.int64)
        index_nKB = torch.zeros(steps, self.slots, self._batch, dtype=torch.int64)
        for slot in slots:
            occupant = self._occupants[slot]
            begin = occupant.steps_done * self._batch
            coefficients_nKC[:, slot] = self._coefficients(occupant, steps)
            first_nK[:, slot] = begin + self._batch * np.arange(steps)
            index_nKB[:, slot] = occupant.samples.indices(begin, begin + steps * self._batch).view(
                steps, self._batch
            )
        self._states.active_K[:] = torch.tensor([slot in slots for slot in range(self.slots)])
        coefficients = torch.from_numpy(coefficients_nKC).to(self.device, self._dtype)
        first = torch.from_numpy(first_nK).to(self.device)
        state, losses = self._states.tensors(), []
        with torch.no_grad():
            for step in range(steps):
                inputs = self._inputs(coefficients[step], first[step], index_nKB[step])
                losses.append(self._step(*state, *inputs))
        measured_n2S = torch.stack(losses).double().cpu()[:, :, list(slots)]
        losses_nS, norms_nS = measured_n2S.unbind(1)
        found: list[list[float]] = losses_nS.masked_fill(~norms_nS.isfinite(), math.nan).tolist()
        mismatches = {}
        for column, slot in enumerate(slots):
            measured = measured_n2S[:, :, column].tolist()
            mismatches[slot] = self._record_losses(self._occupants[slot], measured)
        reasons = {slot: reason for slot, reason in mismatches.items() if reason}
        if reasons:
            raise TrialMismatchError(reasons, found)
        return found

    def failed_loss(self, slot: int) -> float:
        """The loss of the step at which the trial in a slot stands still."""
        return self._occupants[slot].failed_loss

    def _inputs(self, coefficients_KC: Tensor, first_K: Tensor, index_KB: Tensor) -> list[Tensor]:
        """What the step takes besides the state; see `SlotStep`."""
        batch = self._samples.gather(index_KB.flatten().to(self._samples.device))
        shape = index_KB.shape
        columns = [
            values.view(*shape, *values.shape[1:])
            for values in to_device(batch, self.device, self._dtype).values()
        ]
        values = (self._seed_key_K, self._values.values_KF, self._values.thresholds_KF)
        return [coefficients_KC, first_K, *values, *columns]

    def _idle_inputs(self, index_KB: Tensor | None = None) -> list[Tensor]:
        """Inputs of the right shapes, for empty slots; with the samples of `index_KB`."""
        if index_KB is None:
            index_KB = torch.zeros(self.slots, self._batch, dtype=torch.int64)
        coefficients_KC = torch.zeros(self.slots, self._coefficient_count, dtype=self._dtype)
        first_K = torch.zeros(self.slots, dtype=torch.int64)
        return self._inputs(coefficients_KC.to(self.device), first_K.to(self.device), index_KB)

    def _record_losses(
        self, occupant: _SlotOccupant, measured: list[tuple[float, float]]
    ) -> str | None:
        """Count a trial's steps; returns the reason why it does not fit, if its first loss shows.

        `measured` are their losses and gradient norms. The first loss is compared once, with the
        loss of the trial's own network.
        """
        finite = [math.isfinite(loss) and math.isfinite(norm) for loss, norm in measured]
        good = finite.index(False) if False in finite else len(measured)
        occupant.steps_done += good
        if good < len(measured):
            occupant.failed_loss = measured[good][0]
        first = measured[0][0]
        expected, occupant.reference_loss = occupant.reference_loss, None
        if expected is None or not (math.isfinite(expected) and math.isfinite(first)):
            return None
        bf16 = occupant.variant.spec.train.precision == "bf16"
        tolerance = LOSS_TOLERANCE_BF16 if bf16 else LOSS_TOLERANCE
        if abs(first - expected) <= tolerance * max(1.0, abs(expected)):
            return None
        return (
            f"a fused trial's first loss is {first:.9g}, alone it is {expected:.9g}: "
            "something that differs between trials is neither a float attribute of a module "
            "nor read from the spec in the loss"
        )

    def _coefficients(self, occupant: _SlotOccupant, steps: int) -> FloatArray:
        """The coefficients of a trial's next updates, [n, C]; the last one is the clipping norm."""
        spec, done = occupant.variant.spec, occupant.steps_done
        t_n = done + 1 + np.arange(steps, dtype=np.float64)
        total = occupant.variant.total_steps
        rates = [learning_rate(spec.optimizer, done + i, total) for i in range(steps)]
        clip_n = np.full_like(t_n, spec.train.clip_norm or 0.0)
        columns = self._rule.coefficients(spec.optimizer, np.array(rates), t_n)
        return np.stack([*columns, clip_n], axis=1)


def _on_device_if_small(samples: Batch, device: Device) -> Batch:
    """The split, moved to the device's memory if it takes at most an eighth of what is free."""
    size = sum(values.nbytes for values in samples.values())
    free = device.memory().free
    if device.type == "cpu" or free is None or size > free / 8:
        return samples
    return {name: values.to(device.device) for name, values in samples.items()}
