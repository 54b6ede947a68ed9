"""Many trials as one program on one device.

A program has K slots. A slot is a trial: a row of every tensor that training changes, and a place
in every vector of numbers that the training rule takes. One step advances all slots: the network
goes through `torch.vmap` over the rows, the gradient of all of them is taken at once, and forward
pass, backward pass and update are one compiled graph. Shapes never change, so a trial that ends
makes room for another one without compiling again.

What a slot computes is what `trainers.engine.step.TrainStep` computes for the trial alone: the same order
of samples, augmentation, dropout masks, schedule and update, none of which depends on the slot or
its neighbours. A trial's first loss is checked against that of its own network.

Suffixes: K slots, P trained weights of a trial in one row, B samples of a batch, C coefficients of
the update, F lifted numbers.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from trainers.counter_rng import SampleRandom, seed_key
from trainers.data.sampling import SampleStream, to_device
from trainers.devices import Device
from trainers.engine.step import check_per_sample
from trainers.modeling.build import build_network
from trainers.modeling.dropout import DropoutRate, DropoutRng, key_dropout_by_sample
from trainers.modeling.optimizer import build_optimizer, has_weight_decay, learning_rate
from trainers.precision import compute_precision, weights_dtype
from trainers.spec import RunSpec
from trainers.workload import Batch, Workload
from tuning.fused.batched_optimizers import BATCHED_OPTIMIZERS, FloatArray
from tuning.fused.compile_step import CompiledStep, compile_step
from tuning.fused.program_signature import (
    Variant,
    batched_values,
    module_floats,
    patched_attributes,
    signature,
    with_model_values,
)
from tuning.fused.vmap_rewrites import (
    MODEL_SECTION,
    Guards,
    NotFusibleError,
    ValuePath,
    VmapRewrites,
    first_sentence,
)


class TrialMismatchError(NotFusibleError):
    """Some of the trials that were advanced do not belong into their program."""

    def __init__(self, reasons: Mapping[int, str], losses: list[list[float]]) -> None:
        super().__init__(next(iter(reasons.values())))
        self.reasons = reasons
        """Slot -> why its trial does not."""
        self.losses = losses
        """What `Program.run` would have returned; the other trials' are right."""


@dataclass(frozen=True)
class TrialState:
    """The state of one trial after `done` steps: views of a program's slot, or a copy."""

    steps_done: int
    weights_P: Tensor
    moments: tuple[Tensor, ...]
    """What the optimizer keeps, [P] each."""
    buffers: Mapping[str, Tensor]
    module_floats: Mapping[ValuePath, float]
    """Those that stand in modules of the trial's network, and not in the program's."""

    def copy(self) -> "TrialState":
        moments = tuple(part.clone() for part in self.moments)
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        return TrialState(
            self.steps_done, self.weights_P.clone(), moments, buffers, self.module_floats
        )


@dataclass
class _SlotOccupant:
    """A trial in a slot."""

    variant: Variant
    samples: SampleStream
    module_floats: Mapping[ValuePath, float]
    steps_done: int
    reference_loss: float | None
    """The loss of its next step, computed by its own network; None once it has been compared."""


class Program:
    """K slots and the step that advances them."""

    def __init__(
        self,
        variant: Variant,
        slots: int,
        samples: Batch,
        device: Device,
        varied: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """A program for trials like `variant`, with empty slots; not yet compiled.

        `samples` is the training split, `varied` the fields of the section `model` that differ
        between trials as numbers, each with some of its values. Raises NotFusibleError with the
        operation that stands in the way.
        """
        self.slots, self.device = slots, device.device
        self.variant, self._varied = variant, dict(varied or {})
        spec, workload = variant.spec, variant.workload
        self._dtype, self._batch = weights_dtype(spec.train), spec.train.global_batch
        self._rule, one = BATCHED_OPTIMIZERS[spec.optimizer.name], np.ones(1)
        self._coefficient_count = len(self._rule.coefficients(spec.optimizer, one, one)) + 1
        self._samples = SampleStream(_on_device_if_small(samples, device), 0, self._batch)
        network = build_network(spec.train, workload)
        self._signature = signature(variant, network, self._varied)
        self._floats = module_floats(network)
        self._network, self._draws = network.to(self.device), key_dropout_by_sample(network)
        self._batched = [*batched_values(variant, self._floats, self._varied)]
        self._guards: Guards = {}
        self._split_trained()
        self.optimizer = build_optimizer(spec.optimizer, self._network)
        self._occupants: dict[int, _SlotOccupant] = {}
        self._allocate()
        self._trace()
        self._step: CompiledStep = self.graph

    def _split_trained(self) -> None:
        """Which weights a step changes: those that the loss of a batch depends on."""
        loss = self._reference_loss(self.variant, self._network, self._draws, 0, self._samples)
        torch.autograd.backward(loss)
        self._trained: dict[str, nn.Parameter] = {}
        self._fixed: dict[str, Tensor] = {}
        for name, weight in self._network.named_parameters():
            if weight.grad is None:
                self._fixed[name] = weight
            else:
                self._trained[name] = weight
            weight.grad = None
        self._sizes = [weight.numel() for weight in self._trained.values()]

    def _allocate(self) -> None:
        count, width = self.slots, sum(self._sizes)

        def zeros(*shape: int, dtype: torch.dtype = self._dtype) -> Tensor:
            return torch.zeros(count, *shape, dtype=dtype, device=self.device)

        self._weights_KP = torch.stack([_flatten(self._trained)] * count)
        self._moments = tuple(zeros(width) for _ in self._rule.moments)
        kept = {**self._fixed, **dict(self._network.named_buffers())}
        self._buffers = {
            name: torch.stack([value.detach()] * count).to(self.device)
            for name, value in kept.items()
        }
        columns = [
            torch.full((w.numel(),), float(has_weight_decay(w))) for w in self._trained.values()
        ]
        self._decays_P = torch.cat(columns).to(self.device, self._dtype)
        self._active_K = zeros(dtype=torch.bool)
        self._stream_K = zeros(dtype=torch.int64)
        self._batched_KF = zeros(len(self._batched))
        self._threshold_KF = zeros(len(self._batched), dtype=torch.int64)
        self._write_batched_values(slice(None), self._batched_values(self.variant, self._floats))

    # What the program is.

    def fits(self, variant: Variant, network: nn.Module) -> bool:
        """Whether a trial, with its network as built, is one for this program."""
        floats = module_floats(network)
        if signature(variant, network, self._varied) != self._signature:
            return False
        if floats.keys() != self._floats.keys():
            return False
        if any(floats[p] != self._floats[p] for p in self._floats.keys() - set(self._batched)):
            return False
        values = self._batched_values(variant, floats)
        return all(
            getattr(operator, test)(values[place], other) == outcome
            for (place, test, other), outcome in self._guards.items()
        )

    def _batched_values(
        self, variant: Variant, floats: Mapping[ValuePath, float]
    ) -> dict[ValuePath, float]:
        """The lifted numbers of a trial, in the order of their columns."""
        model = variant.workload.model
        return {
            (module, name): float(getattr(model, name))
            if module == MODEL_SECTION
            else floats[module, name]
            for module, name in self._batched
        }

    def _module_floats(self, network: nn.Module) -> dict[ValuePath, float]:
        """The lifted numbers that stand in modules of a trial's network."""
        floats = module_floats(network)
        return {place: floats[place] for place in self._batched if place[0] != MODEL_SECTION}

    def _trace(self) -> None:
        """Take down the operations of a step as one graph of plain tensor operations.

        It sees what runs eagerly, so a user's code meets none of the limits of Dynamo.
        """
        inputs = [*(tensor.clone() for tensor in self._state_tensors()), *self._idle_inputs()]
        try:
            with torch.enable_grad():
                self.graph: GraphModule = make_fx(self._step_all_slots)(*inputs)
        except NotFusibleError:
            raise
        except Exception as error:  # a user's model may do anything
            raise NotFusibleError(first_sentence(error)) from error
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()

    def peak_bytes(self) -> int:
        """The most memory that a step's tensors take at once, its inputs among them."""
        last = {each: node for node in self.graph.graph.nodes for each in node.all_input_nodes}
        held, peak = 0, 0
        for node in self.graph.graph.nodes:
            held += _node_bytes(node)
            peak = max(peak, held)
            held -= sum(_node_bytes(each) for each in node.all_input_nodes if last[each] is node)
        return peak

    def compile(self) -> None:
        """Compile the step; see `compile_step`. Where that fails, it goes on uncompiled."""
        state = self._state_tensors()
        inputs = [*state, *self._idle_inputs()]
        self._active_K.zero_()  # so that steps in here change nothing
        step = compile_step(self.graph, inputs, len(state))
        with torch.no_grad():
            step(*inputs)
        self._step = step

    # One step, as it is traced.

    def _state_tensors(self) -> list[Tensor]:
        """What a step changes, in the order in which the step takes it."""
        return [self._weights_KP, *self._moments, *self._buffers.values(), self._active_K]

    def _idle_inputs(self) -> list[Tensor]:
        """What a step takes besides the state, for slots that are empty."""
        index = torch.zeros(self.slots, self._batch, dtype=torch.int64)
        coefficients_KC = torch.zeros(self.slots, self._coefficient_count, dtype=self._dtype)
        first_K = torch.zeros(self.slots, dtype=torch.int64)
        return self._inputs(coefficients_KC.to(self.device), first_K.to(self.device), index)

    def _inputs(self, coefficients_KC: Tensor, first_K: Tensor, index_KB: Tensor) -> list[Tensor]:
        batch = self._samples.gather(index_KB.flatten().to(self._samples.device))
        shape = index_KB.shape
        columns = [
            values.view(*shape, *values.shape[1:])
            for values in to_device(batch, self.device, self._dtype).values()
        ]
        numbers = (self._stream_K, self._batched_KF, self._threshold_KF)
        return [coefficients_KC, first_K, *numbers, *columns]

    def _step_all_slots(self, *tensors: Tensor) -> Tensor:
        """One step of all slots, in place on the state; the loss of each [K]."""
        count = len(self._moments)
        weights_KP, moments, rest = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        buffers = dict(zip(self._buffers, rest, strict=False))
        alive_K, coefficients_KC, first_K, *others = rest[len(buffers) :]
        stream_K, lifted_KF, threshold_KF, *columns = others
        batch = dict(zip(self._samples.columns, columns, strict=True))
        leaf_KP = weights_KP.detach().requires_grad_()
        loss_K, changed = torch.vmap(self._slot_loss)(
            leaf_KP,
            {name: value.clone() for name, value in buffers.items()},
            lifted_KF,
            threshold_KF,
            stream_K,
            first_K,
            batch,
        )
        (gradient_KP,) = torch.autograd.grad(loss_K.sum(), leaf_KP)
        with torch.no_grad():
            *c, clip_K1 = (column[:, None] for column in coefficients_KC.unbind(1))
            if self.variant.spec.train.clip_norm is not None:
                norm_K1 = gradient_KP.square().sum(1, keepdim=True).sqrt()
                gradient_KP = gradient_KP * (clip_K1 / (norm_K1 + 1e-6)).clamp(max=1.0)
            new_KP, new_moments = self._rule.update(
                weights_KP, gradient_KP, moments, self._decays_P, c
            )
            # A trial whose loss is no number keeps its last good state, and stands still.
            loss_K = torch.where(alive_K, loss_K.detach(), math.nan)
            good_K = torch.isfinite(loss_K)
            news = (new_KP, *new_moments, *(changed[name] for name in buffers))
            for old, new in zip((weights_KP, *moments, *buffers.values()), news, strict=True):
                good = good_K.view(-1, *[1] * (old.ndim - 1))
                old.copy_(torch.where(good, new, old))
            alive_K.copy_(good_K)
        return loss_K

    def _slot_loss(
        self,
        weights_P: Tensor,
        buffers: dict[str, Tensor],
        lifted_F: Tensor,
        threshold_F: Tensor,
        stream: Tensor,
        first: Tensor,
        batch: Batch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of one slot's batch, and its buffers afterwards; runs under vmap."""
        parts = torch.split(weights_P, self._sizes)
        weights = {
            name: part.view(weight.shape)
            for part, (name, weight) in zip(parts, self._trained.items(), strict=True)
        }
        numbers = dict(zip(self._batched, lifted_F.unbind(), strict=True))
        fields = {
            name: value for (module, name), value in numbers.items() if module == MODEL_SECTION
        }
        workload = with_model_values(self.variant.workload, fields)
        random = SampleRandom(stream, first + torch.arange(self._batch, device=self.device))
        thresholds = dict(zip(self._batched, threshold_F.unbind(), strict=True))
        modules = {
            place: DropoutRate(thresholds[place], value) if self._is_dropout_rate(place) else value
            for place, value in numbers.items()
            if place[0] != MODEL_SECTION
        }
        known = self._batched_values(self.variant, self._floats)
        rewrites = VmapRewrites([(numbers[p], (p, known[p])) for p in numbers], self._guards)
        with patched_attributes(self._network, modules), self._draws.seeded_by(random), rewrites:
            return functional_call(  # type: ignore[no-any-return]
                _LossModule(self._network, buffers),
                {f"network.{name}": value for name, value in {**weights, **buffers}.items()},
                (workload, self.variant.spec, batch, random),
            )

    def _is_dropout_rate(self, place: ValuePath) -> bool:
        """Whether a number is a rate of dropout."""
        module, _ = place
        return (
            module != MODEL_SECTION and self._network.get_submodule(module) in self._draws.modules
        )

    def _write_batched_values(self, slots: int | slice, values: Mapping[ValuePath, float]) -> None:
        """Write a trial's numbers into its slot; rates as they are used, worked out exactly."""
        for column, (place, value) in enumerate(values.items()):
            if self._is_dropout_rate(place):
                rate = DropoutRate.from_probability(value)
                self._threshold_KF[slots, column] = rate.threshold
                value = float(rate.scale)
            self._batched_KF[slots, column] = value

    # Trials in and out.

    def load_trial(
        self, slot: int, variant: Variant, network: nn.Module, state: TrialState | None = None
    ) -> None:
        """Put a trial into a slot, from its first step, or from `row`; overwrites what was there.

        `network` is the trial's own, as built, or holding the state that `row` is about to give.
        """
        if state is None:
            own = _named_tensors(network)
            trained = {name: own[name] for name in self._trained}
            buffers = {name: own[name].detach() for name in self._buffers}
            nothing = torch.zeros_like(self._decays_P)
            state = TrialState(
                0, _flatten(trained), tuple(nothing for _ in self._moments), buffers, {}
            )
        with torch.no_grad():
            self._weights_KP[slot] = state.weights_P.to(self.device)
            for all_slots, own_part in zip(self._moments, state.moments, strict=True):
                all_slots[slot] = own_part.to(self.device)
            for name, value in state.buffers.items():
                self._buffers[name][slot] = value.to(self.device)
            self._write_batched_values(slot, self._batched_values(variant, module_floats(network)))
            self._stream_K[slot] = seed_key(variant.spec.train.seed)
        order = SampleStream(self._samples.split, variant.spec.train.seed, self._batch)
        expected = None
        if state.steps_done < variant.total_steps:
            self._load(network, state.copy())  # a forward pass may change buffers
            draws = key_dropout_by_sample(network.to(self.device))
            with torch.random.fork_rng(devices=[]):
                expected = self._reference_loss(
                    variant, network, draws, state.steps_done, order
                ).item()
        self._occupants[slot] = _SlotOccupant(
            variant, order, self._module_floats(network), state.steps_done, expected
        )

    def free(self, slot: int) -> None:
        """Empty a slot."""
        del self._occupants[slot]

    def state_of(self, slot: int) -> TrialState:
        """The state of the trial in a slot, as views that the next step changes."""
        moments = tuple(part[slot] for part in self._moments)
        buffers = {name: value[slot] for name, value in self._buffers.items()}
        live = self._occupants[slot]
        return TrialState(
            live.steps_done, self._weights_KP[slot], moments, buffers, live.module_floats
        )

    def network_with(self, state: TrialState) -> nn.Module:
        """The ordinary network with the state of `row`, without a copy, until the next call.

        `optimizer` is the one that goes with it.
        """
        self._load(self._network, state, self.optimizer)
        for (module, name), value in state.module_floats.items():
            setattr(self._network.get_submodule(module), name, value)
        return self._network

    def state_from(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, steps_done: int
    ) -> TrialState:
        """The state of an ordinary network and its optimizer after `done` steps, as a copy."""
        own = _named_tensors(network)
        moments = []
        for part in self._rule.moments:
            values = [
                optimizer.state[own[name]].get(part, torch.zeros_like(own[name]))
                for name in self._trained
            ]
            moments.append(torch.cat([value.detach().flatten() for value in values]))
        weights_P = _flatten({name: own[name] for name in self._trained})
        buffers = {name: own[name].detach().clone() for name in self._buffers}
        return TrialState(
            steps_done, weights_P, tuple(moments), buffers, self._module_floats(network)
        )

    def _load(
        self, network: nn.Module, row: TrialState, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Point the tensors of an ordinary network at those of a row."""
        own = _named_tensors(network)
        parts = [row.weights_P, *row.moments]
        pieces = zip(*(torch.split(part, self._sizes) for part in parts), strict=True)
        for (name, like), (weight, *moments) in zip(self._trained.items(), pieces, strict=True):
            own[name].data = weight.view(like.shape)
            if optimizer is not None:
                named = zip(self._rule.moments, moments, strict=True)
                state = {part: value.view(like.shape) for part, value in named}
                if "exp_avg" in state:
                    state["step"] = torch.tensor(float(row.steps_done))
                optimizer.state[own[name]] = state if row.steps_done else {}
        for name, value in row.buffers.items():
            own[name].data = value

    # Training.

    def run(self, slots: Sequence[int], steps: int) -> list[list[float]]:
        """Advance the trials in `slots` by `steps` steps; the loss of each after each: [n][slot].

        A loss that is not finite ends a trial's advance: its state stays as it was before that
        step, and the losses of later ones are NaN. Raises StrangersError, after the steps, where a
        trial's first loss is not what it is alone.
        """
        coefficients_nKC = np.zeros((steps, self.slots, self._coefficient_count))
        first_nK = np.zeros((steps, self.slots), np.int64)
        index_nKB = torch.zeros(steps, self.slots, self._batch, dtype=torch.int64)
        for slot in slots:
            live = self._occupants[slot]
            begin = live.steps_done * self._batch
            coefficients_nKC[:, slot] = self._coefficients(live, steps)
            first_nK[:, slot] = begin + self._batch * np.arange(steps)
            index_nKB[:, slot] = live.samples.indices(begin, begin + steps * self._batch).view(
                steps, self._batch
            )
        self._active_K[:] = torch.tensor([slot in slots for slot in range(self.slots)])
        coefficients = torch.from_numpy(coefficients_nKC).to(self.device, self._dtype)
        first = torch.from_numpy(first_nK).to(self.device)
        losses = []
        with torch.no_grad():
            for step in range(steps):
                inputs = self._inputs(coefficients[step], first[step], index_nKB[step])
                losses.append(self._step(*self._state_tensors(), *inputs))
        found: list[list[float]] = torch.stack(losses).double().cpu()[:, list(slots)].tolist()
        reasons = {
            slot: self._record_losses(self._occupants[slot], [row[column] for row in found])
            for column, slot in enumerate(slots)
        }
        strangers = {slot: reason for slot, reason in reasons.items() if reason}
        if strangers:
            raise TrialMismatchError(strangers, found)
        return found

    def _record_losses(self, live: _SlotOccupant, losses: list[float]) -> str | None:
        """Count a trial's steps; why it does not belong into the program, where that shows."""
        finite = [math.isfinite(loss) for loss in losses]
        live.steps_done += finite.index(False) if False in finite else len(losses)
        expected, live.reference_loss = live.reference_loss, None
        if expected is None or not (math.isfinite(expected) and finite[0]):
            return None
        close = 0.02 if live.variant.spec.train.precision == "bf16" else 1e-4
        if abs(losses[0] - expected) <= close * max(1.0, abs(expected)):
            return None
        return (
            f"a fused trial's first loss is {losses[0]:.9g}, alone it is {expected:.9g}: "
            "something that differs between trials is neither a float attribute of a module "
            "nor read from the spec in the loss"
        )

    def _coefficients(self, live: _SlotOccupant, steps: int) -> FloatArray:
        """Of the next steps: [n, C]."""
        spec = live.variant.spec
        t_n = live.steps_done + 1 + np.arange(steps, dtype=np.float64)
        total = live.variant.total_steps
        rates = [learning_rate(spec.optimizer, live.steps_done + i, total) for i in range(steps)]
        clip_n = np.full_like(t_n, spec.train.clip_norm or 0.0)
        columns = self._rule.coefficients(spec.optimizer, np.array(rates), t_n)
        return np.stack([*columns, clip_n], axis=1)

    def _reference_loss(
        self,
        variant: Variant,
        network: nn.Module,
        draws: DropoutRng,
        step: int,
        order: SampleStream,
    ) -> Tensor:
        """The loss of a step as the trial's own network computes it."""
        positions, index = order.positions_and_indices(step)
        batch = order.gather(index.to(order.device))
        batch = to_device(batch, self.device, self._dtype)
        random = SampleRandom(variant.spec.train.seed, positions.to(self.device))
        with draws.seeded_by(random):
            loss, _ = _LossModule(network, {})(variant.workload, variant.spec, batch, random)
        return loss  # type: ignore[no-any-return]


class _LossModule(nn.Module):
    """A network together with its loss, for `functional_call`: workloads use whole modules."""

    def __init__(self, network: nn.Module, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self._names = list(buffers)

    def forward(
        self, workload: Workload, spec: RunSpec, batch: Batch, random: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = workload.augment(batch, random)
        with compute_precision(spec.train, random.positions.device):
            loss_B = workload.loss(workload.forward(self.network, batch), batch)
        check_per_sample("loss", loss_B, spec.train.global_batch)
        held = _named_tensors(self.network)
        return loss_B.mean(), {name: held[name].detach() for name in self._names}


def _named_tensors(network: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def _flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])


def _node_bytes(node: torch.fx.Node) -> int:
    found = node.meta.get("tensor_meta")
    found = found if isinstance(found, tuple) and not hasattr(found, "shape") else [found]
    return sum(
        math.prod(each.shape) * each.dtype.itemsize for each in found if hasattr(each, "shape")
    )


def _on_device_if_small(samples: Batch, device: Device) -> Batch:
    """The split in the memory of the device, where it takes little of it."""
    size = sum(values.nbytes for values in samples.values())
    free = device.memory().free
    if device.type == "cpu" or free is None or size > free / 8:
        return samples
    return {name: values.to(device.device) for name, values in samples.items()}
