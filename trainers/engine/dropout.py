"""Dropout whose masks are a function of (seed, position of the sample in the run, draw).

The network's own dropout modules are taught to draw from the samples' keys, in place of the
device's generator, whose numbers go to whichever sample comes next. So one worker and many, and
micro-batches of any size, drop the same elements.

Covered: `nn.Dropout`, `nn.Dropout1d`, `nn.Dropout2d` and `nn.Dropout3d`, where the first dimension
of what they are given is the samples, or a multiple of them with each sample's rows together.
Not covered, and left to the device's generator: `F.dropout`, attention's own dropout,
`nn.LSTM(dropout=...)`, subclasses, and all else that draws.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from trainers.counter_rng import SampleRandom, advance_keys, drop_threshold, dropout_mask

NATIVE_RNG_NOTE = (
    "this model draws random numbers of its own: the run is exact after a restart with the same "
    "number of workers and the same train.micro_batch, but differs a little with others"
)
"""What the user is told when `Stepper.draws_natively`."""


class DropoutRate(NamedTuple):
    """A rate as it is used; with tensors without dimensions, that of one of many trials."""

    threshold: int | Tensor
    """See `trainers.counter_rng.drop_threshold`."""
    scale: float | Tensor
    """What keeps the mean as it was."""

    @classmethod
    def from_probability(cls, p: float) -> "DropoutRate":
        return cls(drop_threshold(p), 1 / (1 - p) if p < 1 else 0.0)


class DropoutRng:
    """What all dropout modules of one network draw from, in the order in which they are called.

    The state is one key per sample, which a draw replaces by the next. It is a tensor, not a
    number of draws, so that `torch.compile` sees the same program at every draw.
    """

    def __init__(self) -> None:
        self.modules: list[_SampleKeyedDropout] = []
        """All that draw from here."""
        self.keys_B: Tensor | None = None
        """Of the last draw; None where nothing is to be drawn."""

    @contextmanager
    def seeded_by(self, random: SampleRandom) -> Iterator[None]:
        """Forward and backward passes in here draw for these samples, from the first draw on."""
        self.keys_B = random.keys_B if any(module.is_active() for module in self.modules) else None
        try:
            yield
        finally:
            self.keys_B = None

    def mask(self, rate: DropoutRate, input: Tensor, dims: int) -> Tensor | None:
        """The next draw for the first `dims` dimensions of `input`, True for what stays.

        None when the first dimension is not made of samples.
        """
        keys_B, shape = self.keys_B, input.shape
        if keys_B is None or not dims or shape[0] % keys_B.shape[0]:
            return None
        drawn_B = advance_keys(keys_B)
        if isinstance(rate.threshold, Tensor):  # a rate of 0 draws nothing, as where it is a number
            drawn_B = torch.where(rate.threshold > drop_threshold(0.0), drawn_B, keys_B)
        self.keys_B = drawn_B
        count = math.prod(shape[:dims]) // len(drawn_B)
        mask = dropout_mask(drawn_B, rate.threshold, count)
        return mask.reshape(*shape[:dims], *[1] * (len(shape) - dims))


class _SampleKeyedDropout(_DropoutNd):
    """A dropout module that draws from `draws`; `inplace` is without effect."""

    rng: DropoutRng
    channel_ndim: int | None = None
    """Dimensions of an input whose whole channels are dropped; None for single elements."""

    def is_active(self) -> bool:
        """Whether a forward pass would draw: a rate of many trials may be anything."""
        return self.training and (isinstance(self.p, DropoutRate) or self.p > 0)

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_active():
            return input
        rate = self.p if isinstance(self.p, DropoutRate) else DropoutRate.from_probability(self.p)
        mask = None
        if self.channel_ndim in (None, input.ndim):
            mask = self.rng.mask(rate, input, input.ndim if self.channel_ndim is None else 2)
        if mask is None:
            native: Tensor = super().forward(input)
            return native
        mask = _distributed_like(mask, input)
        if input.device.type == "cpu":  # one product in the backward pass, as torch does it there
            return input * (mask.to(input.dtype) * rate.scale)
        return input * mask * rate.scale  # a byte per element is kept for the backward pass


class SampleDropout(_SampleKeyedDropout, nn.Dropout):
    pass


class SampleDropout1d(_SampleKeyedDropout, nn.Dropout1d):
    channels_of = 3


class SampleDropout2d(_SampleKeyedDropout, nn.Dropout2d):
    channels_of = 4


class SampleDropout3d(_SampleKeyedDropout, nn.Dropout3d):
    channels_of = 5


def key_dropout_by_sample(network: nn.Module) -> DropoutRng:
    """Make the dropout modules of `network` draw from the result, in place.

    Only their class changes: names, settings, hooks and references to them stay.
    """
    draws = DropoutRng()
    for module in network.modules():
        if type(module) in _REPLACEMENTS:
            module.__class__ = _REPLACEMENTS[type(module)]
        if isinstance(module, _SampleKeyedDropout):  # also one that was taught before
            module.rng = draws
            draws.modules.append(module)
    return draws


_REPLACEMENTS: dict[type[nn.Module], type[_SampleKeyedDropout]] = {
    nn.Dropout: SampleDropout,
    nn.Dropout1d: SampleDropout1d,
    nn.Dropout2d: SampleDropout2d,
    nn.Dropout3d: SampleDropout3d,
}


def _distributed_like(mask: Tensor, input: Tensor) -> Tensor:
    """The mask as `input` is spread over devices: a tensor-parallel DTensor has one of its own."""
    if type(input) is Tensor or not hasattr(input, "device_mesh"):
        return mask
    from torch.distributed.tensor import DTensor, Replicate

    mesh = input.device_mesh
    return DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim, run_check=False)
