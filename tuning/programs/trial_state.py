"""The state of trials: one row per slot of every tensor that a step changes.

All trained weights of a trial are one row, and so is each moment of the optimizer: the update is a
handful of operations, however many tensors the network has.

Suffixes: K slots, P trained weights of a trial in one row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainers.checks.finite import are_finite, is_finite, is_spoilt
from trainers.modeling.optimizer import has_weight_decay
from tuning.programs.vmap_rewrites import NotFusibleError, ValuePath


@dataclass(frozen=True)
class TrialState:
    """The state of one trial after `steps_done` steps: views of a program's slot, or a copy."""

    steps_done: int
    weights_P: Tensor
    moments: tuple[Tensor, ...]
    """The optimizer's state, [P] each."""
    buffers: Mapping[str, Tensor]
    """Buffers of the network, and the parameters that the loss does not depend on."""
    module_floats: Mapping[ValuePath, float]
    """Batched values that are attributes of the trial's modules, such as a dropout rate."""

    def copy(self) -> "TrialState":
        moments = tuple(part.clone() for part in self.moments)
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        weights_P = self.weights_P.clone()
        return TrialState(self.steps_done, weights_P, moments, buffers, self.module_floats)


class SlotStates:
    """The tensors of K slots that a step changes, and their way to and from ordinary networks."""

    def __init__(
        self,
        network: nn.Module,
        trained: Mapping[str, nn.Parameter],
        moment_names: Sequence[str],
        slots: int,
    ) -> None:
        """All slots begin as `network`; `trained` are those of its parameters that a step changes.

        `moment_names` are the names under which torch's optimizer keeps its state.
        """
        self._trained, self._moment_names = dict(trained), moment_names
        self._sizes = [weight.numel() for weight in trained.values()]
        self.weights_KP = torch.stack([_flatten(trained)] * slots)
        self.moments = tuple(torch.zeros_like(self.weights_KP) for _ in moment_names)
        others = {n: tensor for n, tensor in named_tensors(network).items() if n not in trained}
        self.buffers = {
            name: torch.stack([value.detach()] * slots) for name, value in others.items()
        }
        self._spoilt_as_built = {name for name, value in others.items() if is_spoilt(value)}
        decayed = [torch.full((w.numel(),), float(has_weight_decay(w))) for w in trained.values()]
        self.decayed_P = torch.cat(decayed).to(self.weights_KP)
        """1 for weights that weight decay applies to, 0 for others."""
        self.active_K = torch.zeros(slots, dtype=torch.bool, device=self.weights_KP.device)
        """The slots that the next step advances; a loss that is not finite clears one."""

    def tensors(self) -> list[Tensor]:
        """The tensors that a step changes in place, in the order in which it takes them."""
        return [self.weights_KP, *self.moments, *self.buffers.values(), self.active_K]

    def weights_by_name(self, weights_P: Tensor) -> dict[str, Tensor]:
        """The trained weights of one row, as views in their shapes."""
        parts = torch.split(weights_P, self._sizes)
        return {
            name: part.view(weight.shape)
            for part, (name, weight) in zip(parts, self._trained.items(), strict=True)
        }

    def get(self, slot: int, steps_done: int, floats: Mapping[ValuePath, float]) -> TrialState:
        """The state in a slot, as views that the next step changes."""
        moments = tuple(part[slot] for part in self.moments)
        buffers = {name: value[slot] for name, value in self.buffers.items()}
        return TrialState(steps_done, self.weights_KP[slot], moments, buffers, floats)

    def set(self, slot: int, state: TrialState) -> None:
        """Copy a state into a slot, from any device."""
        device = self.weights_KP.device
        with torch.no_grad():
            self.weights_KP[slot] = state.weights_P.to(device)
            for all_slots, own in zip(self.moments, state.moments, strict=True):
                all_slots[slot] = own.to(device)
            for name, value in state.buffers.items():
                self.buffers[name][slot] = value.to(device)

    def initial(self, network: nn.Module) -> TrialState:
        """The state of a network as built, before its first step."""
        own = named_tensors(network)
        buffers = {name: own[name].detach() for name in self.buffers}
        nothing = torch.zeros_like(self.decayed_P)
        moments = tuple(nothing for _ in self.moments)
        return TrialState(0, self._row_of(own), moments, buffers, {})

    def copy_from(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_done: int,
        floats: Mapping[ValuePath, float],
    ) -> TrialState:
        """A copy of the state of an ordinary network and its optimizer after `steps_done` steps."""
        own = named_tensors(network)
        moments = []
        for part in self._moment_names:
            values = [
                optimizer.state[own[name]].get(part, torch.zeros_like(own[name]))
                for name in self._trained
            ]
            moments.append(torch.cat([value.detach().flatten() for value in values]))
        buffers = {name: own[name].detach().clone() for name in self.buffers}
        return TrialState(steps_done, self._row_of(own), tuple(moments), buffers, floats)

    def not_finite(self, state: TrialState) -> list[str]:
        """The weights and buffers of a state that training has made not finite, by name."""
        found = []
        for row in (state.weights_P, *state.moments):
            if not are_finite([row]):
                parts = self.weights_by_name(row).items()
                found += [name for name, part in parts if not is_finite(part)]
        buffers = state.buffers.items()
        found += [n for n, v in buffers if n not in self._spoilt_as_built and is_spoilt(v)]
        return list(dict.fromkeys(found))

    def point_at(
        self, state: TrialState, network: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Make the tensors of an ordinary network, and its optimizer, views of a state."""
        own = named_tensors(network)
        rows = [state.weights_P, *state.moments]
        pieces = zip(*(torch.split(row, self._sizes) for row in rows), strict=True)
        for (name, like), (weight, *moments) in zip(self._trained.items(), pieces, strict=True):
            own[name].data = weight.view(like.shape)
            if optimizer is not None:
                named = zip(self._moment_names, moments, strict=True)
                held = {part: value.view(like.shape) for part, value in named}
                if "exp_avg" in held:
                    held["step"] = torch.tensor(float(state.steps_done))
                optimizer.state[own[name]] = held if state.steps_done else {}
        for name, value in state.buffers.items():
            own[name].data = value

    def _row_of(self, own: Mapping[str, Tensor]) -> Tensor:
        return _flatten({name: own[name] for name in self._trained})


def named_tensors(network: nn.Module) -> dict[str, Any]:
    """Parameters and buffers by name."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def tensor_places(network: nn.Module) -> dict[str, str]:
    """Each attribute of a module that holds a parameter or buffer -> its name in `named_tensors`.

    A module under several names is there under the first one. Raises NotFusibleError if a tensor is
    both a parameter and a buffer.
    """
    tensors = named_tensors(network)
    names = {id(tensor): name for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if names[id(tensor)] != name:
            raise NotFusibleError(f"{name} is a parameter and the buffer {names[id(tensor)]}")
    return {
        place: names[id(tensor)]
        for path, module in network.named_modules()
        for held in (module.named_parameters, module.named_buffers)
        for place, tensor in held(path, recurse=False, remove_duplicate=False)
    }


def _flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors.values()])
