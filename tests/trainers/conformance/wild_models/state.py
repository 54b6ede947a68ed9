"""State besides weights: buffers, caches, counters."""

import functools

import torch
from torch import nn

from wild_models.base import CLASSES, WIDTH, WORDS, Tower, Wild, constant, rows, tanh_block


class MaskNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("mask", None)

    def forward(self, x):
        if self.mask is None:
            self.register_buffer("mask", torch.linspace(0.5, 1.5, x.shape[1], device=x.device))
        return self.linear(x * self.mask)


class LateBuffer(Wild):
    """a buffer that the first forward pass makes"""

    def build(self):
        return MaskNet()


class LateNonPersistent(Wild):
    """a non-persistent buffer that the first forward pass makes"""

    def build(self):
        return LateNet()


class LateNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        if not hasattr(self, "mask"):
            mask = torch.linspace(0.5, 1.5, x.shape[1], device=x.device)
            self.register_buffer("mask", mask, persistent=False)
        return self.linear(x * self.mask)


class Lazy(Wild):
    """lazy modules"""

    def build(self):
        return nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3))


class RotaryNet(nn.Module):
    """A table by length of the sequence, as rotary embeddings have."""

    def __init__(self, grows):
        super().__init__()
        self.embedding, self.last = nn.Embedding(WORDS, 8), nn.Linear(8, CLASSES)
        self.grows, self.cache, self.cached = grows, {}, None

    def table(self, length):
        if self.grows:
            if self.cached is None or len(self.cached) < length:
                self.cached = torch.linspace(0.5, 1.5, 20)[:length, None] * torch.ones(8)
            return self.cached[:length]
        if length not in self.cache:
            self.cache[length] = torch.linspace(0.5, 1.5, 20)[:length, None] * torch.ones(8)
        return self.cache[length]

    def forward(self, t):
        return self.last((self.embedding(t) * self.table(t.shape[1])).sum(1))


class CacheByLength(Wild):
    """a cache by length"""

    def dataset(self):
        return {"train": rows(40, seed=0), "val": rows(21, seed=1, length=9)}

    def build(self):
        return RotaryNet(grows=False)

    def forward(self, model, batch):
        return model(batch["t"])


class CacheGrows(CacheByLength):
    """a cache that grows in evaluation"""

    def build(self):
        return RotaryNet(grows=True)


@functools.cache
def ramp(count):
    return torch.linspace(0.5, 1.5, count)


class TableNet(Tower):
    def forward(self, x):
        return super().forward(x * ramp(x.shape[1]))


class TableOutside(Wild):
    """an lru_cache outside of the model"""

    def build(self):
        return TableNet([tanh_block(), tanh_block()])


class CachedPropertyNet(Tower):
    @functools.cached_property
    def ramp(self):
        return torch.linspace(0.5, 1.5, self.first.in_features)

    def forward(self, x):
        return super().forward(x * self.ramp)


class CachedProperty(Wild):
    """a cached_property that holds a tensor"""

    def build(self):
        return CachedPropertyNet([tanh_block(), tanh_block()])


class ExtraNet(Tower):
    """Counts its calls in training outside of any tensor, and uses the count."""

    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (1 + 0.1 / (1 + self.calls))

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


class ExtraState(Wild):
    """extra state that the model uses"""

    def build(self):
        return ExtraNet()


class TensorExtraNet(Tower):
    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.seen = torch.zeros(3)

    def forward(self, x):
        if self.training:
            self.seen = self.seen + 1
        return super().forward(x) * (1 + 0.1 / (1 + self.seen.sum()))

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


class TensorExtraState(Wild):
    """a tensor as extra state"""

    def build(self):
        return TensorExtraNet()


class CounterNet(Tower):
    """Anneals by a counter of its steps, an integer buffer."""

    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.steps += 1
        return super().forward(x) * (1 - 0.9 ** (1 + self.steps.to(x.dtype)))


class Counter(Wild):
    """a counter of steps that the model uses"""

    def build(self):
        return CounterNet()


class PlainCounterNet(Tower):
    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (1 + 0.1 / (1 + self.calls))


class PlainCounter(Wild):
    """a counter in a plain attribute that the model uses"""

    def build(self):
        return PlainCounterNet()


class AttributeNet(Tower):
    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.scale, self.table = 0.5, {"shift": constant(WIDTH)}

    def forward(self, x):
        return super().forward(x * self.scale + self.table["shift"].to(x.dtype))


class Attributes(Wild):
    """constants in a dict of the module"""

    def build(self):
        return AttributeNet()


class OverlappingNet(Tower):
    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        both = constant(2 * WIDTH)
        self.register_buffer("scale", both[:WIDTH])
        self.register_buffer("shift", both[8 : 8 + WIDTH])
        self.register_buffer("ones", torch.ones(1).expand(WIDTH))

    def forward(self, x):
        return super().forward(x * self.scale + self.shift * self.ones)


class Overlapping(Wild):
    """buffers that overlap in memory, and an expanded one"""

    def build(self):
        return OverlappingNet()


class SharedBufferNet(Tower):
    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        steps = torch.zeros(1, dtype=torch.int64)
        self.register_buffer("steps", steps)
        self.first.register_buffer("steps", steps)

    def forward(self, x):
        if self.training:
            self.steps += 1
        return super().forward(x) * (1 + 0.1 * torch.tanh(self.first.steps.to(x.dtype)))


class SharedBuffer(Wild):
    """one buffer under two names"""

    def build(self):
        return SharedBufferNet()


class KindsNet(Tower):
    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.register_buffer("chosen", torch.arange(WIDTH).flip(0))
        self.register_buffer("mask", torch.arange(WIDTH) % 2 == 0)
        self.register_buffer("octets", torch.arange(WIDTH, dtype=torch.uint8))
        self.register_buffer("short", torch.linspace(0, 1, WIDTH, dtype=torch.float16))
        self.register_buffer("empty", torch.zeros(0))

    def forward(self, x):
        x = x[:, self.chosen] * self.mask + self.octets / 16
        return super().forward(x + self.short.to(x.dtype))


class Kinds(Wild):
    """buffers of integers, booleans, bytes, half precision"""

    def build(self):
        return KindsNet()


class DoubleNet(Tower):
    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.register_buffer("origin", torch.tensor([1.7e9 + 0.125], dtype=torch.float64))

    def forward(self, x):
        since = (self.origin - 1.7e9).to(x.dtype)
        return super().forward(x * (1 + since))


class DoubleBuffer(Wild):
    """a float64 buffer in a float32 model"""

    precision, tolerance = "fp32", 2e-5

    def build(self):
        return DoubleNet()
