"""Random numbers as a pure function of (seed, position in the run, draw, element).

A sample's numbers are the same on every worker, at every world size, and after any number of
restarts. They come from splitmix64 (Steele, Lea and Flood, OOPSLA 2014), used as a hash of a
counter. Its int64 arithmetic wraps, so the numbers are the same on every device.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.devices import Device

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _as_int64(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_MULTIPLIER_1, _MULTIPLIER_2 = _as_int64(0xBF58476D1CE4E5B9), _as_int64(0x94D049BB133111EB)
_GOLDEN_INT64, _ADVANCE = _as_int64(_GOLDEN), _as_int64(0xD1342543DE82EF95)


def _splitmix_rounds(x: Tensor) -> Tensor:
    """The two rounds of splitmix64's finaliser, element by element, in place on int64."""
    shifted = x >> 30
    shifted &= (1 << 34) - 1
    x ^= shifted
    x *= _MULTIPLIER_1
    shifted.copy_(x)
    shifted >>= 27
    shifted &= (1 << 37) - 1
    x ^= shifted
    x *= _MULTIPLIER_2
    return x


def _splitmix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser; `x` is overwritten."""
    x = _splitmix_rounds(x)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def combine_seeds(*parts: int) -> int:
    """One seed in [0, 2**63) from several numbers, such as (seed, epoch)."""
    state = 0
    for part in parts:
        x = (state + (part + 1) * _GOLDEN) & _MASK
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
        state = x ^ x >> 31
    return state >> 1


def seed_key(seed: int) -> int:
    """A signed 64-bit key by which the numbers of different seeds differ."""
    return _as_int64(combine_seeds(seed))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """What is drawn in here from torch's, numpy's and Python's generators changes no later draw."""
    of_torch, of_numpy, of_python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def seed_device(device: Device, seed: int) -> None:
    """Seed torch's own generators, of a device and of the CPU.

    `torch.manual_seed` does this for every kind of device. It takes 100 times as long, and on a
    machine without a GPU it keeps a record of each call for as long as the process lives.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        device.seed(seed)


def device_rng_state(device: Device) -> Tensor:
    """The state of the generators that `seed_device` seeds, as bytes: any draw changes it."""
    state = torch.default_generator.get_state()
    if device.type != "cpu":
        state = torch.cat([state, device.rng_state().flatten().cpu().view(torch.uint8)])
    return state


def seed_host(seed: int) -> None:
    """Seed the generators that Python and numpy share with all code: `random` and `np.random`.

    Takes as long as a small kernel, some 10 microseconds.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_process(seed: int) -> None:
    """Seed all generators that the code of this process shares, on the CPU."""
    torch.default_generator.manual_seed(seed)
    seed_host(seed)


def host_rng_state() -> tuple[Any, ...]:
    """The state of the generators that `seed_host` seeds; any draw changes it."""
    numpys = np.random.get_state(legacy=False)
    assert isinstance(numpys, dict)
    words = numpys["state"]
    held = (words["key"].tobytes(), words["pos"], numpys["has_gauss"], numpys["gauss"])
    return (random.getstate(), *held)


def advance_keys(keys_B: Tensor) -> Tensor:
    """The samples' keys for their next `dropout_mask`.

    The constant is a multiplier from Steele and Vigna (2022, arXiv:2001.05304). Lattice reduction
    shows that no two of a sample's first 9e8 masks share any of their first 3e9 elements.
    """
    return keys_B + _ADVANCE


def drop_threshold(p: float) -> int:
    """The int64 threshold with which `dropout_mask` drops elements with probability `p`."""
    return min(int((p - 0.5) * 2.0**64), (1 << 63) - 1)


def dropout_mask(keys_B: Tensor, threshold: int | Tensor, count: int) -> Tensor:
    """A boolean mask [B, count], True for elements that are kept; see `drop_threshold`.

    A sample's key is the state of its own splitmix64, whose outputs are the elements. The last
    mixing of their low bits is left out, since the high bits decide. In place throughout, it is as
    fast as `bernoulli_`. `threshold` may be an int64 tensor without dimensions.
    """
    counters = _element_counters(count, keys_B.device)
    return _splitmix_rounds(keys_B[:, None] + counters) >= threshold


def _element_counters(count: int, device: torch.device) -> Tensor:
    """i * _GOLDEN_INT64 for each of `count` elements, wrapping.

    The bitwise operation changes nothing. It hides the range from Inductor, which otherwise folds
    the product into `Vectorized<int64_t>::arange(base, step)`. That C++ relies on signed overflow,
    which is undefined: with AVX2, one element of eight was wrong (PyTorch 2.13.0, GCC 12).
    """
    elements = torch.arange(count, device=device).bitwise_and_(_MASK >> 1)
    elements *= _GOLDEN_INT64
    return elements


class SampleRandom:
    """Random numbers for the samples at `positions` [B] of the run's stream of samples.

    Each call draws new numbers; the n-th call in a step draws the same ones whenever the step is
    run.
    """

    def __init__(self, seed: int | Tensor, positions: Tensor) -> None:
        """`seed` may also be a tensor without dimensions that holds a `seed_key`."""
        self.positions = positions
        self._seed_key = seed if isinstance(seed, Tensor) else seed_key(seed)
        self._draws = 0

    @cached_property
    def keys_B(self) -> Tensor:
        """One int64 key per sample; computed only if numbers are drawn."""
        return _splitmix64(self.positions * _GOLDEN_INT64 + self._seed_key)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), float32 with 24 random bits, of shape [B, *shape]."""
        self._draws += 1
        count = math.prod(shape)
        elements = _element_counters(count, self.keys_B.device)
        # The constant is wrapped here: compilers that fold it refuse one of more than 64 bits.
        elements += _as_int64((self._draws << 40) * _GOLDEN)
        bits = _splitmix64(self.keys_B[:, None] ^ _splitmix64(elements))
        unit = _logical_shift(bits, 40).to(torch.float32) * 2.0**-24
        return unit.reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float32, of shape [B, *shape] (Box and Muller, 1958)."""
        radius = torch.sqrt(-2.0 * torch.log1p(-self.uniform(*shape)))
        return radius * torch.cos(2.0 * math.pi * self.uniform(*shape))
