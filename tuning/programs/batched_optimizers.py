"""Optimizers that update the weights of many trials at once, one row per trial.

Everything that depends on the step (schedule, bias correction) is folded into a few coefficients on
the host, in float64: one small copy per step, no powers in the kernel.

To add an optimizer, give it an entry in `BATCHED_OPTIMIZERS` under its name in the spec.

Suffixes: K slots, P weights of a trial, n steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainers.spec import OptimizerSpec

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BatchedOptimizer:
    """An optimizer as a function of its coefficients."""

    moments: tuple[str, ...]
    """The names of its state in `torch.optim.Optimizer.state`."""
    coefficients: Callable[[OptimizerSpec, FloatArray, FloatArray], list[FloatArray]]
    """(spec, learning rates [n], numbers of the steps from 1 [n]) -> C arrays of [n]."""
    update: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    """(weights [K, P], gradient [K, P], moments, 1 where weights decay [P], coefficients [K, 1])
    -> new weights and moments."""


def _adamw_coefficients(
    spec: OptimizerSpec, rate_n: FloatArray, t_n: FloatArray
) -> list[FloatArray]:
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


def _sgd_coefficients(spec: OptimizerSpec, rate_n: FloatArray, t_n: FloatArray) -> list[FloatArray]:
    constants = (spec.weight_decay, spec.momentum)
    return [rate_n, *(np.full_like(t_n, value) for value in constants)]


def _sgd_update(
    weights_KP: Tensor, gradient_KP: Tensor, moments: Sequence[Tensor], decays_P: Tensor, c: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    rate_K1, decay_K1, momentum_K1 = c
    gradient_KP = gradient_KP + decay_K1 * decays_P * weights_KP
    buffer_KP = momentum_K1 * moments[0] + gradient_KP
    new_KP = weights_KP - rate_K1 * (gradient_KP + momentum_K1 * buffer_KP)
    # Without momentum torch keeps no buffer. Nor is there one here, for a trial with momentum that
    # continues from this state.
    return new_KP, (torch.where(momentum_K1 > 0, buffer_KP, 0),)


BATCHED_OPTIMIZERS = {
    "adamw": BatchedOptimizer(("exp_avg", "exp_avg_sq"), _adamw_coefficients, _adamw_update),
    "sgd": BatchedOptimizer(("momentum_buffer",), _sgd_coefficients, _sgd_update),
}
