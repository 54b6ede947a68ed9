"""From a gradient to new weights: clipping, the scale of fp16, the optimizer's step."""

from collections.abc import Mapping

import torch
from torch import nn

from trainers.modeling.optimizer import build_optimizer, learning_rate, set_learning_rate
from trainers.modeling.strategy import clip_gradients, gradient_norm
from trainers.spec import RunSpec


class WeightUpdate:
    """The optimizer with its state, the loss scaler of fp16, and what happens before a step."""

    def __init__(
        self, spec: RunSpec, network: nn.Module, device: torch.device, total_steps: int
    ) -> None:
        self._spec, self._network, self._total_steps = spec, network, total_steps
        self.optimizer = build_optimizer(spec.optimizer, network)
        self.scaler = torch.amp.GradScaler(device.type, enabled=spec.train.precision == "fp16")
        self.skipped_steps = 0
        """Steps whose gradient was not finite, since this start; see `train.on_nonfinite`."""

    def prepare(self, step: int) -> bool:
        """Clip the gradient; False if `train.on_nonfinite` says to skip the step.

        Collective if the model is sharded.
        """
        train = self._spec.train
        set_learning_rate(self.optimizer, self.learning_rate(step))
        if train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self._network, train.clip_norm)
        if train.on_nonfinite == "skip" and not self._gradients_finite():
            self.skipped_steps += 1
            self.optimizer.zero_grad(set_to_none=True)
            return False
        return True

    def apply(self) -> None:
        """Change the weights, and forget the gradient."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

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

    def _gradients_finite(self) -> bool:
        """Whether all gradients are finite; they are the same on every worker, so is the answer."""
        return bool(torch.isfinite(gradient_norm(self._network)).item())
