"""Many trials as one program on one device.

A program has K slots. A slot is a trial: a row of every tensor that training changes, and a place
in every vector of numbers that the training rule takes. One step advances all slots: the network
goes through `torch.vmap` over the rows, the gradient of all of them is taken at once, and forward
pass, backward pass and update are one compiled graph. Shapes never change, so a trial that ends
makes room for another one without compiling again.

What a slot computes is what `trainers.step.Stepper` computes for the trial alone: the same order
of samples, augmentation, dropout masks, schedule and update, none of which depends on the slot or
its neighbours. A trial's first loss is checked against that of its own network.

Suffixes: K slots, P trained weights of a trial in one row, B samples of a batch, C coefficients of
the update, F lifted numbers.
"""

import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode, resolve_name

from cluster.files import cache_folder
from trainers.data import Batches, on_device
from trainers.devices import Device
from trainers.dropout import Draws, Rate, sample_dropout
from trainers.optimize import build_optimizer, decays, learning_rate
from trainers.parallel import compute_precision, weights_dtype
from trainers.random import SampleRandom, stream_of
from trainers.spec import OptimizerSpec, RunSpec
from trainers.step import build_network, check_per_sample
from trainers.workloads.base import Batch, Workload

Numbers = npt.NDArray[np.float64]
Place = tuple[str, str]
"""Where a number that differs between trials stands: a module's name and attribute, or MODEL."""
MODEL = "spec.model"
"""In place of a module's name: a field of the spec's section `model`."""


class NotFusibleError(Exception):
    """Why a trial cannot be a slot of a program, in a phrase."""


class StrangersError(NotFusibleError):
    """Some of the trials that were advanced do not belong into their program."""

    def __init__(self, strangers: Mapping[int, str], losses: list[list[float]]) -> None:
        super().__init__(next(iter(strangers.values())))
        self.strangers = strangers
        """Slot -> why its trial does not."""
        self.losses = losses
        """What `Program.run` would have returned; the other trials' are right."""


@dataclass(frozen=True)
class Variant:
    """A trial as it is to be trained."""

    spec: RunSpec
    workload: Workload
    total_steps: int


@dataclass(frozen=True)
class Row:
    """The state of one trial after `done` steps: views of a program's slot, or a copy."""

    done: int
    weights_P: Tensor
    moments: tuple[Tensor, ...]
    """What the optimizer keeps, [P] each."""
    buffers: Mapping[str, Tensor]
    numbers: Mapping[Place, float]
    """Those that stand in modules of the trial's network, and not in the program's."""

    def copy(self) -> "Row":
        moments = tuple(part.clone() for part in self.moments)
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        return Row(self.done, self.weights_P.clone(), moments, buffers, self.numbers)


def reason_against(spec: RunSpec) -> str | None:
    """What in a trial's spec keeps it from being fused; None when nothing does."""
    train, scale = spec.train, spec.scale
    if scale.max_workers > 1:
        return "scale.workers: a trial of several workers is spread over devices"
    if train.precision in ("fp16", "fp8"):
        return f"train.precision: {train.precision} scales by what it finds in the loss or weights"
    if train.micro_batch is not None:
        return "train.micro_batch: a slot takes the whole batch at once"
    if train.activation_checkpointing:
        return "train.activation_checkpointing: blocks are computed again by hooks"
    if train.on_nonfinite == "skip":
        return "train.on_nonfinite: skipped steps would set a slot's step apart from its age"
    return None


@dataclass(frozen=True)
class _Rule:
    """An optimizer's update: all that depends on the step is folded into a few coefficients.

    On the host in float64: one small copy per step, no powers in the kernel.
    """

    moments: tuple[str, ...]
    """The names under which torch's optimizer keeps them."""
    coefficients: Callable[[OptimizerSpec, Numbers, Numbers], list[Numbers]]
    """Of the learning rates and the numbers of steps (from 1), [n] each: C arrays of [n]."""
    update: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    """(weights, gradient [K, P]; moments; decayed columns [P]; C coefficients [K, 1])."""


def _adamw_coefficients(spec: OptimizerSpec, rate_n: Numbers, t_n: Numbers) -> list[Numbers]:
    first, second = spec.betas
    return [
        rate_n * spec.weight_decay,
        np.full_like(t_n, 1 - first),
        np.full_like(t_n, 1 - second),
        rate_n / (1 - first**t_n),
        1 / np.sqrt(1 - second**t_n),
    ]


def _adamw_update(
    weights_KP: Tensor, gradient_KP: Tensor, moments: Sequence[Tensor], decays_P: Tensor, c: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    decay_K1, first_K1, second_K1, rate_K1, scale_K1 = c
    mean_KP = moments[0] + first_K1 * (gradient_KP - moments[0])
    square_KP = moments[1] + second_K1 * (gradient_KP * gradient_KP - moments[1])
    step_KP = rate_K1 * mean_KP / (square_KP.sqrt() * scale_K1 + 1e-8)
    return weights_KP * (1 - decay_K1 * decays_P) - step_KP, (mean_KP, square_KP)


def _sgd_coefficients(spec: OptimizerSpec, rate_n: Numbers, t_n: Numbers) -> list[Numbers]:
    constants = (spec.weight_decay, spec.momentum)
    return [rate_n, *(np.full_like(t_n, value) for value in constants)]


def _sgd_update(
    weights_KP: Tensor, gradient_KP: Tensor, moments: Sequence[Tensor], decays_P: Tensor, c: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    rate_K1, decay_K1, momentum_K1 = c
    gradient_KP = gradient_KP + decay_K1 * decays_P * weights_KP
    buffer_KP = momentum_K1 * moments[0] + gradient_KP
    new_KP = weights_KP - rate_K1 * (gradient_KP + momentum_K1 * buffer_KP)
    # Without momentum torch keeps none, for one who goes on from here with some.
    return new_KP, (torch.where(momentum_K1 > 0, buffer_KP, 0),)


_RULES = {
    "adamw": _Rule(("exp_avg", "exp_avg_sq"), _adamw_coefficients, _adamw_update),
    "sgd": _Rule(("momentum_buffer",), _sgd_coefficients, _sgd_update),
}


@dataclass
class _Live:
    """A trial in a slot."""

    variant: Variant
    order: Batches
    numbers: Mapping[Place, float]
    done: int
    expected: float | None
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
        self._rule = _RULES[spec.optimizer.name]
        self._samples = Batches(_resident(samples, device), 0, self._batch)
        network = build_network(spec.train, workload)
        self._signature, self._floats = _signature(variant, network, self._varied), _floats(network)
        self._network, self._draws = network.to(self.device), sample_dropout(network)
        self._lifted = [*_lifted(variant, self._floats, self._varied)]
        self._guards: dict[tuple[Place, str, float], bool] = {}
        self._find_trained()
        self.optimizer = build_optimizer(spec.optimizer, self._network)
        self._live: dict[int, _Live] = {}
        self._allocate()
        self._trace()
        self._step: Callable[..., Any] = self.graph

    def _find_trained(self) -> None:
        """Which weights a step changes: those that the loss of a batch depends on."""
        loss = self._alone(self.variant, self._network, self._draws, 0, self._samples)
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

        self._weights_KP = torch.stack([_flat(self._trained)] * count)
        self._moments = tuple(zeros(width) for _ in self._rule.moments)
        kept = {**self._fixed, **dict(self._network.named_buffers())}
        self._buffers = {
            name: torch.stack([value.detach()] * count).to(self.device)
            for name, value in kept.items()
        }
        columns = [torch.full((w.numel(),), float(decays(w))) for w in self._trained.values()]
        self._decays_P = torch.cat(columns).to(self.device, self._dtype)
        self._alive_K = zeros(dtype=torch.bool)
        self._stream_K = zeros(dtype=torch.int64)
        self._lifted_KF = zeros(len(self._lifted))
        self._threshold_KF = zeros(len(self._lifted), dtype=torch.int64)
        self._lift(slice(None), self._values(self.variant, self._floats))

    # What the program is.

    def fits(self, variant: Variant, network: nn.Module) -> bool:
        """Whether a trial, with its network as built, is one for this program."""
        floats = _floats(network)
        if _signature(variant, network, self._varied) != self._signature:
            return False
        if floats.keys() != self._floats.keys():
            return False
        lifted = set(self._lifted)
        if any(
            floats[place] != value for place, value in self._floats.items() if place not in lifted
        ):
            return False
        values = dict(zip(self._lifted, self._values(variant, floats), strict=True))
        return all(
            getattr(operator, test)(values[place], other) == outcome
            for (place, test, other), outcome in self._guards.items()
        )

    def _values(self, variant: Variant, floats: Mapping[Place, float]) -> list[float]:
        """The lifted numbers of a trial, in the order of their columns."""
        model = variant.workload.model
        return [
            float(getattr(model, name)) if module == MODEL else floats[module, name]
            for module, name in self._lifted
        ]

    def _numbers(self, network: nn.Module) -> dict[Place, float]:
        """The lifted numbers that stand in modules of a trial's network."""
        floats = _floats(network)
        return {place: floats[place] for place in self._lifted if place[0] != MODEL}

    def _trace(self) -> None:
        """Take down the operations of a step as one graph of plain tensor operations.

        It sees what runs eagerly, so a user's code meets none of the limits of Dynamo.
        """
        inputs = [self._inputs_at_rest()]
        state = [tensor.clone() for tensor in self._state()]
        try:
            with torch.enable_grad():
                self.graph: GraphModule = make_fx(self._all_slots)(*state, *inputs[0])
        except NotFusibleError:
            raise
        except Exception as error:  # a user's model may do anything
            raise NotFusibleError(_phrase(error)) from error
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()

    def peak_bytes(self) -> int:
        """The most memory that a step's tensors take at once, its inputs among them."""
        last = {each: node for node in self.graph.graph.nodes for each in node.all_input_nodes}
        held, peak = 0, 0
        for node in self.graph.graph.nodes:
            held += _bytes(node)
            peak = max(peak, held)
            held -= sum(_bytes(each) for each in node.all_input_nodes if last[each] is node)
        return peak

    def compile(self) -> None:
        """Compile the step; takes from two seconds to a minute. On a GPU it is one CUDA graph.

        Raises NotFusibleError where PyTorch cannot compile it; it then goes on uncompiled.
        """
        state = self._state()
        inputs: list[Tensor] = [*state, *self._inputs_at_rest()]
        self._alive_K.zero_()  # so that the steps in here change nothing
        with torch.no_grad():
            try:
                compiled = _compiled(self.graph, inputs)
            except NotFusibleError:
                # PyTorch 2.13 on a CPU: a KeyError, where a loop overwrites what it has read
                # (github.com/pytorch/pytorch/issues/188228).
                compiled = _copied(_compiled(_out_of_place(self.graph), inputs), len(state))
            if self.device.type == "cuda":
                compiled = _Captured(compiled, inputs, len(state))
            compiled(*inputs)
        self._step = compiled

    # One step, as it is traced.

    def _state(self) -> list[Tensor]:
        """What a step changes, in the order in which the step takes it."""
        return [self._weights_KP, *self._moments, *self._buffers.values(), self._alive_K]

    def _inputs_at_rest(self) -> list[Tensor]:
        """What a step takes besides the state, for slots that are empty."""
        index = torch.zeros(self.slots, self._batch, dtype=torch.int64)
        coefficients_KC = torch.zeros(self.slots, self._coefficient_count(), dtype=self._dtype)
        first_K = torch.zeros(self.slots, dtype=torch.int64)
        return self._inputs(coefficients_KC.to(self.device), first_K.to(self.device), index)

    def _inputs(self, coefficients_KC: Tensor, first_K: Tensor, index_KB: Tensor) -> list[Tensor]:
        batch = self._samples.gather(index_KB.flatten().to(self._samples.device))
        shape = index_KB.shape
        columns = [
            values.view(*shape, *values.shape[1:])
            for values in on_device(batch, self.device, self._dtype).values()
        ]
        numbers = (self._stream_K, self._lifted_KF, self._threshold_KF)
        return [coefficients_KC, first_K, *numbers, *columns]

    def _coefficient_count(self) -> int:
        ones = np.ones(1)
        return len(self._rule.coefficients(self.variant.spec.optimizer, ones, ones)) + 1

    def _all_slots(self, *tensors: Tensor) -> Tensor:
        """One step of all slots, in place on the state; the loss of each [K]."""
        count = len(self._moments)
        weights_KP, moments, rest = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        buffers = dict(zip(self._buffers, rest, strict=False))
        alive_K, coefficients_KC, first_K, *others = rest[len(buffers) :]
        stream_K, lifted_KF, threshold_KF, *columns = others
        batch = dict(zip(self._samples.columns, columns, strict=True))
        leaf_KP = weights_KP.detach().requires_grad_()
        loss_K, changed = torch.vmap(self._one_slot)(
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

    def _one_slot(
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
        numbers = dict(zip(self._lifted, lifted_F.unbind(), strict=True))
        fields = {name: value for (module, name), value in numbers.items() if module == MODEL}
        workload = with_fields(self.variant.workload, fields)
        random = SampleRandom(stream, first + torch.arange(self._batch, device=self.device))
        thresholds = dict(zip(self._lifted, threshold_F.unbind(), strict=True))
        modules = {
            place: Rate(thresholds[place], value) if self._is_rate(place) else value
            for place, value in numbers.items()
            if place[0] != MODEL
        }
        known = dict(zip(self._lifted, self._values(self.variant, self._floats), strict=True))
        rewrites = _Rewrites([(numbers[p], (p, known[p])) for p in numbers], self._guards)
        with _set(self._network, modules), self._draws.of(random), rewrites:
            return functional_call(  # type: ignore[no-any-return]
                _Loss(self._network, buffers),
                {f"network.{name}": value for name, value in {**weights, **buffers}.items()},
                (workload, self.variant.spec, batch, random),
            )

    def _is_rate(self, place: Place) -> bool:
        """Whether a number is a rate of dropout."""
        module, _ = place
        return module != MODEL and self._network.get_submodule(module) in self._draws.modules

    def _lift(self, slots: int | slice, values: Sequence[float]) -> None:
        """Write a trial's numbers into its slot; rates as they are used, worked out exactly."""
        for column, (place, value) in enumerate(zip(self._lifted, values, strict=True)):
            if self._is_rate(place):
                rate = Rate.of(value)
                self._threshold_KF[slots, column] = rate.threshold
                value = float(rate.scale)
            self._lifted_KF[slots, column] = value

    # Trials in and out.

    def admit(
        self, slot: int, variant: Variant, network: nn.Module, row: Row | None = None
    ) -> None:
        """Put a trial into a slot, from its first step, or from `row`; overwrites what was there.

        `network` is the trial's own, as built, or holding the state that `row` is about to give.
        """
        if row is None:
            own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
            trained = {name: own[name] for name in self._trained}
            buffers = {name: own[name].detach() for name in self._buffers}
            nothing = torch.zeros_like(self._decays_P)
            row = Row(0, _flat(trained), tuple(nothing for _ in self._moments), buffers, {})
        with torch.no_grad():
            self._weights_KP[slot] = row.weights_P.to(self.device)
            for all_slots, own_part in zip(self._moments, row.moments, strict=True):
                all_slots[slot] = own_part.to(self.device)
            for name, value in row.buffers.items():
                self._buffers[name][slot] = value.to(self.device)
            self._lift(slot, self._values(variant, _floats(network)))
            self._stream_K[slot] = stream_of(variant.spec.train.seed)
        order = Batches(self._samples.split, variant.spec.train.seed, self._batch)
        expected = None
        if row.done < variant.total_steps:
            self._load(network, row.copy())  # a forward pass may change buffers
            draws = sample_dropout(network.to(self.device))
            with torch.random.fork_rng(devices=[]):
                expected = self._alone(variant, network, draws, row.done, order).item()
        self._live[slot] = _Live(variant, order, self._numbers(network), row.done, expected)

    def release(self, slot: int) -> None:
        """Empty a slot."""
        del self._live[slot]

    def row(self, slot: int) -> Row:
        """The state of the trial in a slot, as views that the next step changes."""
        moments = tuple(part[slot] for part in self._moments)
        buffers = {name: value[slot] for name, value in self._buffers.items()}
        live = self._live[slot]
        return Row(live.done, self._weights_KP[slot], moments, buffers, live.numbers)

    def network(self, row: Row) -> nn.Module:
        """The ordinary network with the state of `row`, without a copy, until the next call.

        `optimizer` is the one that goes with it.
        """
        self._load(self._network, row, self.optimizer)
        for (module, name), value in row.numbers.items():
            setattr(self._network.get_submodule(module), name, value)
        return self._network

    def row_of(self, network: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> Row:
        """The state of an ordinary network and its optimizer after `done` steps, as a copy."""
        own = dict(network.named_parameters())
        held = {**own, **dict(network.named_buffers())}
        moments = []
        for part in self._rule.moments:
            values = [
                optimizer.state[own[name]].get(part, torch.zeros_like(own[name]))
                for name in self._trained
            ]
            moments.append(torch.cat([value.detach().flatten() for value in values]))
        weights_P = _flat({name: own[name] for name in self._trained})
        buffers = {name: held[name].detach().clone() for name in self._buffers}
        return Row(done, weights_P, tuple(moments), buffers, self._numbers(network))

    def _load(
        self, network: nn.Module, row: Row, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Point the tensors of an ordinary network at those of a row."""
        own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        parts = [row.weights_P, *row.moments]
        pieces = zip(*(torch.split(part, self._sizes) for part in parts), strict=True)
        for (name, like), (weight, *moments) in zip(self._trained.items(), pieces, strict=True):
            own[name].data = weight.view(like.shape)
            if optimizer is not None:
                named = zip(self._rule.moments, moments, strict=True)
                state = {part: value.view(like.shape) for part, value in named}
                if "exp_avg" in state:
                    state["step"] = torch.tensor(float(row.done))
                optimizer.state[own[name]] = state if row.done else {}
        for name, value in row.buffers.items():
            own[name].data = value

    # Training.

    def run(self, slots: Sequence[int], steps: int) -> list[list[float]]:
        """Advance the trials in `slots` by `steps` steps; the loss of each after each: [n][slot].

        A loss that is not finite ends a trial's advance: its state stays as it was before that
        step, and the losses of later ones are NaN. Raises StrangersError, after the steps, where a
        trial's first loss is not what it is alone.
        """
        count = self._coefficient_count()
        coefficients_nKC = np.zeros((steps, self.slots, count))
        first_nK = np.zeros((steps, self.slots), np.int64)
        index_nKB = torch.zeros(steps, self.slots, self._batch, dtype=torch.int64)
        for slot in slots:
            live = self._live[slot]
            begin = live.done * self._batch
            coefficients_nKC[:, slot] = self._coefficients(live, steps)
            first_nK[:, slot] = begin + self._batch * np.arange(steps)
            index_nKB[:, slot] = live.order.index(begin, begin + steps * self._batch).view(
                steps, self._batch
            )
        self._alive_K[:] = torch.tensor([slot in slots for slot in range(self.slots)])
        coefficients = torch.from_numpy(coefficients_nKC).to(self.device, self._dtype)
        first = torch.from_numpy(first_nK).to(self.device)
        losses = []
        with torch.no_grad():
            for step in range(steps):
                inputs = self._inputs(coefficients[step], first[step], index_nKB[step])
                losses.append(self._step(*self._state(), *inputs))
        found: list[list[float]] = torch.stack(losses).double().cpu()[:, list(slots)].tolist()
        reasons = {
            slot: self._advanced(self._live[slot], [row[column] for row in found])
            for column, slot in enumerate(slots)
        }
        strangers = {slot: reason for slot, reason in reasons.items() if reason}
        if strangers:
            raise StrangersError(strangers, found)
        return found

    def _advanced(self, live: _Live, losses: list[float]) -> str | None:
        """Count a trial's steps; why it does not belong into the program, where that shows."""
        finite = [math.isfinite(loss) for loss in losses]
        live.done += finite.index(False) if False in finite else len(losses)
        expected, live.expected = live.expected, None
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

    def _coefficients(self, live: _Live, steps: int) -> Numbers:
        """Of the next steps: [n, C]."""
        spec = live.variant.spec
        t_n = live.done + 1 + np.arange(steps, dtype=np.float64)
        total = live.variant.total_steps
        rates = [learning_rate(spec.optimizer, live.done + i, total) for i in range(steps)]
        clip_n = np.full_like(t_n, spec.train.clip_norm or 0.0)
        columns = self._rule.coefficients(spec.optimizer, np.array(rates), t_n)
        return np.stack([*columns, clip_n], axis=1)

    def _alone(
        self, variant: Variant, network: nn.Module, draws: Draws, step: int, order: Batches
    ) -> Tensor:
        """The loss of a step as the trial's own network computes it."""
        positions, index = order.places(step)
        batch = order.gather(index.to(order.device))
        batch = on_device(batch, self.device, self._dtype)
        random = SampleRandom(variant.spec.train.seed, positions.to(self.device))
        with draws.of(random):
            loss, _ = _Loss(network, {})(variant.workload, variant.spec, batch, random)
        return loss  # type: ignore[no-any-return]


class _Loss(nn.Module):
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
        held = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        return loss_B.mean(), {name: held[name].detach() for name in self._names}


class _Rewrites(TorchFunctionMode):
    """The few calls whose numbers PyTorch cannot batch, in terms of ones where it can.

    Where a lifted number that is compared with a constant decides how the program goes on, the
    answer is that of the trial that the program is traced for. It is kept as a guard: trials with
    another answer get a program of their own.
    """

    def __init__(
        self,
        lifted: Sequence[tuple[Tensor, tuple[Place, float]]],
        guards: dict[tuple[Place, str, float], bool],
    ) -> None:
        super().__init__()
        self._lifted, self._guards = {id(number): known for number, known in lifted}, guards
        self._questions = {id(number): (number, "ne", 0.0) for number, _ in lifted}
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


def _compiled(graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from filelock import FileLock
    from torch._inductor import standalone_compile

    # Convolutions of one slot, in another layout, end the process (PyTorch 2.13 on a CPU);
    # those of several are grouped, and keep their layout anyway.
    # Trying whether the compiler knows the processor's instructions takes six seconds.
    options = {"config_patches": {"layout_optimization": False, "cpp.vec_isa_ok": True}}
    try:
        # Engines of one machine compile the same: all but the first then find it on the disk.
        with FileLock(cache_folder() / "compile.lock"):
            return standalone_compile(
                graph, inputs, dynamic_shapes="from_example_inputs", options=options
            )
    except Exception as error:
        raise NotFusibleError(f"torch.compile: {_phrase(error)}") from error


def _out_of_place(graph: GraphModule) -> GraphModule:
    """A step that gives the new state after the losses, and leaves the old one as it is."""
    changed = copy.deepcopy(graph)
    *nodes, output = changed.graph.nodes
    copies = [
        node
        for node in nodes
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder"
    ]
    output.args = ((*output.all_input_nodes, *(node.args[1] for node in copies)),)
    for node in copies:
        changed.graph.erase_node(node)
    changed.recompile()
    return changed


def _copied(step: Callable[..., Any], state: int) -> Callable[..., Any]:
    def stepped(*inputs: Tensor) -> Tensor:
        loss_K: Tensor
        loss_K, *new = step(*inputs)
        for old, value in zip(inputs[:state], new, strict=True):
            old.copy_(value)
        return loss_K

    return stepped


class _Captured:
    """A compiled step as one CUDA graph: the host gives one command per step. Not tried on one."""

    def __init__(self, step: Callable[..., Any], inputs: Sequence[Tensor], state: int) -> None:
        """The first `state` of the inputs stay where they are; the others are copied in."""
        self._inputs, self._state = [*inputs[:state], *(i.clone() for i in inputs[state:])], state
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # PyTorch's own advice: libraries set themselves up
                step(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss_K = step(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for held, new in zip(self._inputs[self._state :], inputs[self._state :], strict=True):
            held.copy_(new)
        self._graph.replay()
        loss_K: Tensor = self._loss_K.clone()
        return loss_K


def with_fields(workload: Workload, fields: Mapping[str, Any]) -> Workload:
    """The workload with other values in its section `model`, which are not checked."""
    changed = copy.copy(workload)
    changed.model = workload.model.model_copy(update=dict(fields))
    return changed


@contextmanager
def _set(network: nn.Module, values: Mapping[Place, Any]) -> Iterator[None]:
    """Attributes of modules in here are these."""
    before = {place: getattr(network.get_submodule(place[0]), place[1]) for place in values}
    for (module, name), value in values.items():
        object.__setattr__(network.get_submodule(module), name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            object.__setattr__(network.get_submodule(module), name, value)


def _floats(network: nn.Module) -> dict[Place, float]:
    """The numbers that stand in modules, such as a dropout's rate."""
    return {
        (module, name): value
        for module, part in network.named_modules()
        for name, value in vars(part).items()
        if type(value) is float
    }


def _lifted(
    variant: Variant, floats: Mapping[Place, float], varied: Mapping[str, Sequence[float]]
) -> Iterator[Place]:
    """The fields that vary, and the numbers in modules that vary with them."""
    yield from ((MODEL, name) for name in varied)
    found = set()
    with torch.random.fork_rng(devices=[]):
        for name, values in varied.items():
            for value in values:
                other = _floats(with_fields(variant.workload, {name: value}).build())
                found |= {p for p in floats if other.get(p, floats[p]) != floats[p]}
    yield from sorted(found)


def _signature(variant: Variant, network: nn.Module, varied: Mapping[str, Any]) -> str:
    """What two trials have in common that are the same program but for numbers."""
    spec = variant.spec
    workload = variant.workload
    sections = (workload.data.model_dump(), workload.model.model_dump(exclude=set(varied)))
    modules = [
        (name, type(part).__qualname__, part.training, _plain(vars(part)))
        for name, part in network.named_modules()
    ]
    held = [*network.named_parameters(), *network.named_buffers()]
    tensors = [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in held]
    clips = spec.train.clip_norm is not None
    rule = (spec.optimizer.name, spec.train.global_batch, spec.train.precision, clips)
    return repr((spec.workload, rule, sections, modules, tensors))


def program_key(variant: Variant, varied: Mapping[str, Any]) -> str:
    """The same for trials that are one program but for numbers, guards left aside."""
    return _signature(variant, build_network(variant.spec.train, variant.workload), varied)


def _plain(attributes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    kinds = (bool, int, str, tuple, type(None))
    public = {k: v for k, v in attributes.items() if not k.startswith("_")}
    return sorted((k, repr(v)) for k, v in public.items() if isinstance(v, kinds))


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])


def _phrase(error: Exception) -> str:
    """An error's first sentence, after the operation that `_Rewrites` has noted on it."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return "".join([*getattr(error, "__notes__", []), f"{type(error).__name__}: {sentence}"])


def _bytes(node: torch.fx.Node) -> int:
    found = node.meta.get("tensor_meta")
    found = found if isinstance(found, tuple) and not hasattr(found, "shape") else [found]
    return sum(
        math.prod(each.shape) * each.dtype.itemsize for each in found if hasattr(each, "shape")
    )


def _resident(samples: Batch, device: Device) -> Batch:
    """The split in the memory of the device, where it takes little of it."""
    size = sum(values.nbytes for values in samples.values())
    free = device.memory().free
    if device.type == "cpu" or free is None or size > free / 8:
        return samples
    return {name: values.to(device.device) for name, values in samples.items()}
