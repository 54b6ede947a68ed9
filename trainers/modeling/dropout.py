"""Dropout whose masks are a function of (seed, position of the sample in the run, draw).

The network's dropout modules are made to draw from one key per sample. The device's generator
would give its numbers to samples in the order in which they come. So one worker and many, and
micro-batches of any size, drop the same elements.

Covered: `nn.Dropout`, `nn.Dropout1d`, `nn.Dropout2d` and `nn.Dropout3d`, if the first dimension of
their input is the samples, or a multiple of them with each sample's rows together. Not covered,
and left to the device's generator: `F.dropout`, the dropout of attention, `nn.LSTM(dropout=...)`,
subclasses, and all other random numbers.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainers.counter_rng import SampleRandom, advance_keys, drop_threshold, dropout_mask
from trainers.worker import Worker

NATIVE_RNG_NOTE = (
    "this model draws random numbers of its own: the run is exact after a restart with the same "
    "number of workers and the same train.micro_batch, but differs a little with others"
)
"""What the user is told when `TrainStep.uses_native_rng`."""

Shape = tuple[int, ...]

logger = logging.getLogger(__name__)


class DropoutRate(NamedTuple):
    """A dropout rate as masks need it. With 0-dimensional tensors, that of one of many trials."""

    threshold: int | Tensor
    """See `trainers.counter_rng.drop_threshold`."""
    scale: float | Tensor
    """The factor of the elements that stay, which keeps the mean."""

    @classmethod
    def from_probability(cls, p: float) -> "DropoutRate":
        return cls(drop_threshold(p), 1 / (1 - p) if p < 1 else 0.0)


class DropoutRng:
    """Random masks for all dropout modules of one network, in the order of their calls.

    The state is one key per sample; each draw replaces the keys by the next ones. It is a tensor,
    not a number of draws, so that `torch.compile` sees the same program at every draw.
    """

    def __init__(self) -> None:
        self.modules: list[_SampleKeyedDropout] = []
        """The modules that draw from here."""
        self.keys_B: Tensor | None = None
        """The keys of the last draw; None while no module draws."""
        self.tensor_rank, self.tensor_size = 0, 1
        """This worker's place in its tensor-parallel group, whose members split activations."""

    @contextmanager
    def seeded_by(self, random: SampleRandom) -> Iterator[None]:
        """In here, forward and backward passes draw for these samples, from the first draw on."""
        self.keys_B = random.keys_B if any(module.is_active() for module in self.modules) else None
        try:
            yield
        finally:
            self.keys_B = None

    def mask(
        self,
        rate: DropoutRate,
        input: Tensor,
        dims: int,
        full_shapes: frozenset[Shape] = frozenset(),
    ) -> Tensor | None:
        """Draw a mask over the first `dims` dimensions of `input`, True for elements that stay.

        None when the first dimension is not made of samples. `full_shapes` are those that the
        input has where layers are not split, see `split_dropout`.
        """
        keys_B, shape = self.keys_B, input.shape
        if keys_B is None or not dims or shape[0] % keys_B.shape[0]:
            return None
        drawn_B = advance_keys(keys_B)
        if isinstance(rate.threshold, Tensor):  # a rate of 0 draws nothing, as with a float
            drawn_B = torch.where(rate.threshold > drop_threshold(0.0), drawn_B, keys_B)
        self.keys_B = drawn_B
        split = self._split_dim(shape, dims, full_shapes) if self.tensor_size > 1 else None
        full = list(shape[:dims])
        if split is not None:
            full[split] *= self.tensor_size
        count = math.prod(full) // len(drawn_B)
        mask = dropout_mask(drawn_B, rate.threshold, count)
        if split is not None:  # this worker's part of the mask
            start = self.tensor_rank * shape[split]
            mask = mask.reshape(full).narrow(split, start, shape[split])
        return mask.reshape(*shape[:dims], *[1] * (len(shape) - dims))

    def _split_dim(self, shape: Shape, dims: int, full_shapes: frozenset[Shape]) -> int | None:
        """The dimension, of the first `dims`, along which the group has split an input, if any."""
        assert self.keys_B is not None
        rows = shape[0] // len(self.keys_B)
        alike = [full for full in full_shapes if full[0] == rows and len(full) == len(shape)]
        if any(full[1:] == shape[1:] for full in alike):
            return None
        for full in alike:
            unlike = [dim for dim in range(1, len(shape)) if full[dim] != shape[dim]]
            if len(unlike) == 1 and full[unlike[0]] == shape[unlike[0]] * self.tensor_size:
                return unlike[0] if unlike[0] < dims else None
        return None


class _SampleKeyedDropout(nn.Module):
    """A dropout module that draws from `rng`; `inplace` has no effect."""

    p: float
    """Or a DropoutRate, in a program of many trials."""
    rng: DropoutRng
    channel_ndim: int | None = None
    """Dimensions of an input whose whole channels are dropped; None for single elements."""
    full_shapes: frozenset[Shape] = frozenset()
    """See `split_dropout`."""

    def is_active(self) -> bool:
        """Whether a forward pass would draw. A rate of many trials counts as one above zero."""
        return self.training and (isinstance(self.p, DropoutRate) or self.p > 0)

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_active():
            return input
        rate = self.p if isinstance(self.p, DropoutRate) else DropoutRate.from_probability(self.p)
        mask = None
        if self.channel_ndim in (None, input.ndim):
            mask = self.rng.mask(
                rate, input, input.ndim if self.channel_ndim is None else 2, self.full_shapes
            )
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
    channel_ndim = 3


class SampleDropout2d(_SampleKeyedDropout, nn.Dropout2d):
    channel_ndim = 4


class SampleDropout3d(_SampleKeyedDropout, nn.Dropout3d):
    channel_ndim = 5


def key_dropout_by_sample(network: nn.Module) -> DropoutRng:
    """Make the dropout modules of `network` draw from the result, in place.

    Only their class changes, so names, settings, hooks and references to them stay.
    """
    rng = DropoutRng()
    for module in network.modules():
        if type(module) in _REPLACEMENTS:
            module.__class__ = _REPLACEMENTS[type(module)]
        if isinstance(module, _SampleKeyedDropout):  # also one that was changed before
            module.rng = rng
            rng.modules.append(module)
    return rng


def dropout_modules(network: nn.Module) -> list[tuple[str, "_SampleKeyedDropout"]]:
    """The dropout modules of `network` that `key_dropout_by_sample` has changed, by name."""
    modules = network.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, _SampleKeyedDropout)]


def note_input_shapes(network: nn.Module, samples: int) -> dict[str, set[Shape]]:
    """By the name of each dropout module: the shapes of its inputs from now on.

    The first dimension is given as rows for each of the `samples` of a batch.
    """
    shapes: dict[str, set[Shape]] = {}
    for name, module in dropout_modules(network):
        shapes[name] = set()
        module.register_forward_pre_hook(partial(_note_shape, shapes[name], samples))
    return shapes


def _note_shape(shapes: set[Shape], samples: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    shape = inputs[0].shape if inputs else ()
    if shape and shape[0] % samples == 0:
        shapes.add((shape[0] // samples, *shape[1:]))


def split_dropout(
    network: nn.Module,
    rng: DropoutRng,
    full_shapes: Mapping[str, set[Shape]] | None,
    worker: Worker,
) -> None:
    """Have the members of a tensor-parallel group drop what one worker would, between split layers.

    There a dropout module gets this worker's part of an activation, as a plain tensor that does
    not say so; with the same keys all members would drop the same elements of their parts.
    `full_shapes` tells the parts: for each module, the shapes of its input where no layer is
    split (see `note_input_shapes`), or None where these are not known.
    """
    modules = dropout_modules(network)
    rng.tensor_size = worker.tensor_parallel_size
    rng.tensor_rank = worker.rank % worker.tensor_parallel_size
    for name, module in modules:
        module.full_shapes = frozenset((full_shapes or {}).get(name, ()))
    if full_shapes is None and worker.is_rank_zero and any(module.p for _, module in modules):
        logger.warning(
            "scale.parallel: the shapes of this model's activations cannot be found before it is "
            "split; dropout between split layers drops the same elements on each worker of a group"
        )


_REPLACEMENTS: dict[type[nn.Module], type[_SampleKeyedDropout]] = {
    nn.Dropout: SampleDropout,
    nn.Dropout1d: SampleDropout1d,
    nn.Dropout2d: SampleDropout2d,
    nn.Dropout3d: SampleDropout3d,
}


def _distributed_like(mask: Tensor, input: Tensor) -> Tensor:
    """The mask for `input`; as a DTensor for a tensor-parallel DTensor."""
    if type(input) is Tensor or not hasattr(input, "device_mesh"):
        return mask
    from torch.distributed.tensor import DTensor, Replicate

    mesh = input.device_mesh
    return DTensor.from_local(mask, mesh, [Replicate()] * mesh.ndim, run_check=False)
