"""From a gradient to new weights: clipping, the scale of fp16, the optimizer's step.

A gradient that is not finite changes nothing. On a CPU that is known before the update; on other
devices the kernels of the update find it in the device's memory, and no step waits for it.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from trainers.checks.finite import are_finite, is_finite, is_spoilt
from trainers.modeling.optimizer import (
    build_optimizer,
    learning_rate,
    real_views,
    set_learning_rate,
    trained_weights,
)
from trainers.modeling.strategy import mesh_of
from trainers.precision import as_real
from trainers.spec import RunSpec
from trainers.torch_internals import mark_not_finite
from trainers.worker import is_distributed, local_tensor

LEAST_SCALE = 2.0**-16
"""The smallest loss scale of fp16. The search for a scale begins at 2**16 and halves it in each
step whose gradient is not finite; one that is not finite at the smallest scale is no overflow."""


class WeightUpdate:
    """The optimizer with its state, the loss scaler of fp16, and what happens before a step."""

    def __init__(
        self, spec: RunSpec, network: nn.Module, device: torch.device, total_steps: int
    ) -> None:
        self._spec, self._network, self._total_steps = spec, network, total_steps
        self.optimizer = build_optimizer(spec.optimizer, network)
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.train.precision == "fp16")
        weights = trained_weights(self.optimizer)
        self._gradient = _Gradient(weights, device)
        self._complex = any(weight.is_complex() for weight in weights)
        self.on_host = device.type == "cpu"
        """Whether a step may look at its numbers, since none has to wait for a device."""
        self._skips = spec.train.on_nonfinite == "skip"
        acts = self._skips or self.scaler.is_enabled() or spec.train.clip_norm is not None
        self.alike = acts or not self._gradient.is_sharded
        """Whether all workers find the same faults. For a sharded gradient that takes a collective:
        where a fault has no consequence but the end of the run, each looks at its own shards."""
        self._kept_buffers: dict[str, Tensor] = {}
        buffers = network.named_buffers()
        self._spoilt_as_built = {name for name, buffer in buffers if is_spoilt(buffer)}

    def begin(self) -> None:
        """Before the forward pass: keep what it changes, for a step that will be skipped."""
        if self._skips:
            self._kept_buffers = {n: b.clone() for n, b in self._network.named_buffers()}

    def prepare(self, step: int, loss: Tensor | None) -> Tensor:
        """Unscale and clip the gradient; 1 if it, or a `loss` given, is not finite, otherwise 0.

        The answer is a scalar on the device. Collective if it is `alike` and the model is sharded.
        """
        set_learning_rate(self.optimizer, self.learning_rate(step))
        if self.scaler.is_enabled():
            with self._as_real():
                self.scaler.unscale_(self.optimizer)
        clip_norm = self._spec.train.clip_norm
        if clip_norm is None and (not self._gradient.is_sharded or not self.alike):
            return self._gradient.is_not_finite(loss)
        norm = self._gradient.norm()
        if clip_norm is not None:
            self._gradient.clip(clip_norm, norm)
        numbers = norm if loss is None else norm + loss
        return torch.nan_to_num(numbers * 0, nan=1.0).float()  # 0 * infinity is NaN too

    def searches_scale(self, loss: Tensor) -> bool:
        """Whether a gradient that is not finite is one of too large a scale of fp16; on a CPU."""
        if not self.scaler.is_enabled() or not math.isfinite(loss.item()):
            return False
        return self.scaler.get_scale() > LEAST_SCALE

    def apply(self, loss: Tensor, fault: Tensor) -> Tensor:
        """Change the weights, unless there is a `fault` of `prepare`, and forget the gradient.

        Returns the fault; 0 for a step that did nothing but lower the scale of fp16.
        """
        if self.on_host:
            fault = self._apply_on_host(loss, fault)
        else:
            fault = self._apply_on_device(loss, fault)
        self.optimizer.zero_grad(set_to_none=True)
        return fault

    def _apply_on_host(self, loss: Tensor, fault: Tensor) -> Tensor:
        if not fault.item():
            self.optimizer.step()
        elif self.searches_scale(loss):
            fault = torch.zeros_like(fault)
        else:
            self._restore_buffers(None)
        if self.scaler.is_enabled():
            self.scaler.update()
            if self.scaler.get_scale() < LEAST_SCALE:
                self.scaler.update(LEAST_SCALE)
        return fault

    def _apply_on_device(self, loss: Tensor, fault: Tensor) -> Tensor:
        self.optimizer.found_inf = fault  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.ones_like(fault))
            searches = torch.isfinite(loss) & (scale > LEAST_SCALE)
            fault = fault.masked_fill(searches, 0.0)
            self.scaler.update()
            scale = self.scaler.scale(torch.ones_like(fault))
            self.scaler.update(scale.clamp(min=LEAST_SCALE))
        self._restore_buffers(fault > 0)
        return fault

    def _restore_buffers(self, where: Tensor | None) -> None:
        """Undo what the forward passes of this step did to the buffers, everywhere or `where`."""
        if not self._kept_buffers:
            return
        with torch.no_grad():
            for name, buffer in self._network.named_buffers():
                kept = self._kept_buffers.get(name)
                if kept is not None and kept.shape == buffer.shape:
                    buffer.copy_(kept if where is None else torch.where(where, kept, buffer))

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return learning_rate(self._spec.optimizer, step, self._total_steps)

    def scalars(self) -> dict[str, float]:
        """The state of the loss scaler, for a checkpoint."""
        return self.scaler.state_dict()

    def load_scalars(self, scalars: Mapping[str, float]) -> None:
        """Go on with the loss scaler of a checkpoint."""
        if self.scaler.is_enabled() and scalars:
            self.scaler.load_state_dict({k: scalars[k] for k in self.scaler.state_dict()})

    def gradients_not_finite(self) -> list[str]:
        """The weights whose gradient, or this worker's shard of it, is not finite."""
        return [
            name
            for name, weight in self._network.named_parameters()
            if weight.grad is not None and not is_finite(weight.grad)
        ]

    def state_not_finite(self) -> list[str]:
        """The weights and buffers that training has made not finite, on this worker; waits.

        A weight counts with its moments. Of buffers, minus infinity does not count, since masks
        are made of it, nor what was not finite from the beginning.
        """
        state = self.optimizer.state
        parts = {
            name: [weight, *state.get(weight, {}).values()]
            for name, weight in self._network.named_parameters()
            if weight.requires_grad
        }
        found = []
        if not are_finite(tensor for held in parts.values() for tensor in held):
            found = [name for name, held in parts.items() if not all(map(is_finite, held))]
        buffers = self._network.named_buffers()
        spoilt = [name for name, buffer in buffers if is_spoilt(buffer)]
        return found + [name for name in spoilt if name not in self._spoilt_as_built]

    def _as_real(self) -> AbstractContextManager[None]:
        return real_views(self.optimizer) if self._complex else nullcontext()


class _Gradient:
    """The gradient of some weights, whatever it is at the moment."""

    def __init__(self, weights: Sequence[nn.Parameter], device: torch.device) -> None:
        self._one = torch.ones((), device=device)
        # A kernel takes a list of weights on one device mesh, or of one dtype.
        self._meshes: dict[DeviceMesh | None, list[nn.Parameter]] = {}
        self._kinds: dict[torch.dtype, list[nn.Parameter]] = {}
        for weight in weights:
            self._meshes.setdefault(mesh_of(weight), []).append(weight)
            self._kinds.setdefault(weight.dtype, []).append(weight)
        self.is_sharded = any(mesh is not None for mesh in self._meshes)

    def is_not_finite(self, loss: Tensor | None) -> Tensor:
        """1 if it, or a `loss` given, has a number that is not finite, otherwise 0.

        Of sharded weights, this worker's shards. Does not wait for the device.
        """
        found, also = torch.zeros_like(self._one), [] if loss is None else [loss]
        for kind, weights in self._kinds.items():
            held = [weight.grad for weight in weights if weight.grad is not None]
            if self.is_sharded or kind.is_complex:
                held = [as_real(local_tensor(each)) for each in held]
            mark_not_finite([*held, *(each.to(kind.to_real()) for each in also)], found, self._one)
            also = []
        return found

    def norm(self) -> Tensor:
        """Its 2-norm, a scalar on its device; collective if the weights are sharded."""
        norms = [
            nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
            for weights in self._meshes.values()
        ]
        full = [norm.full_tensor() if is_distributed(norm) else norm for norm in norms]
        return full[0] if len(full) == 1 else torch.linalg.vector_norm(torch.stack(full))

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale it down from its `norm` to one of at most `max_norm`."""
        for mesh, weights in self._meshes.items():
            # PyTorch's default scales DTensors one by one.
            foreach = True if mesh and mesh.device_type in ("cpu", "cuda", "xpu") else None
            nn.utils.clip_grads_with_norm_(weights, max_norm, norm, foreach)
