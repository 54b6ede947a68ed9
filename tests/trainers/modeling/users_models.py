"""Small models as users write them; in float64 each learns the same on any number of workers."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import Spec, Workload, table

SAMPLES, INPUTS, WIDTH = 48, 8, 6


class Base(Workload):
    """A regression; `build` is all that most models change."""

    class Model(Spec):
        """No fields."""

    def columns(self) -> dict[str, dict[str, Any]]:
        """The data set as numpy arrays, by split."""
        random = np.random.default_rng(0)
        x = random.normal(size=(SAMPLES + 20, INPUTS)).astype(np.float32)
        y = np.sin(x[:, :3] * 2).astype(np.float32)
        token = random.integers(0, 11, SAMPLES + 20)
        split = {"train": slice(SAMPLES), "val": slice(SAMPLES, None)}
        return {name: {"x": x[of], "y": y[of], "token": token[of]} for name, of in split.items()}

    def dataset(self) -> dict[str, Any]:
        return {split: table(**columns) for split, columns in self.columns().items()}

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(batch["x"])

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        return (output - batch["y"]).square().mean(1)


class Parts(nn.Module):
    """An encoder, blocks, and a head; subclasses say how they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 3)
        self.extra = nn.Linear(INPUTS, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(x)))


class Idle(Base):
    """Parameters that nothing uses."""

    def build(self) -> nn.Module:
        return Parts()


class RoutedParts(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y, chosen = super().forward(x), x[:, 0] > 0.9
        if chosen.any():
            y = y.masked_scatter(chosen[:, None], y[chosen] + self.extra(x[chosen]))
        return y


class Routed(Base):
    """Parameters that some samples use, and in some steps none."""

    def build(self) -> nn.Module:
        return RoutedParts()


class AlternatingParts(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        y = super().forward(x)
        return y + self.extra(x) if self.training and self.calls % 3 == 0 else y


class Alternating(Base):
    """Parameters that every third step uses, by a counter in Python."""

    def build(self) -> nn.Module:
        return AlternatingParts()


class EncoderDecoder(Parts):
    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.head(z)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Methods(Base):
    """Methods of the model other than `forward`, and a weight of it."""

    def build(self) -> nn.Module:
        network = EncoderDecoder()
        network.extra = nn.Identity()
        return network

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        decay = model.head.weight.square().sum()
        return model.decode(model.encode(batch["x"])) + 0.1 * decay


@dataclass
class Answer:
    mean: Tensor
    name: str


class StructuredParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([StructuredBlock() for _ in range(2)])
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, x: Tensor) -> Answer:
        for block in self.blocks:
            x = block(x).mean
        return Answer(self.head(x), "mean")


class StructuredBlock(nn.Linear):
    def __init__(self) -> None:
        super().__init__(INPUTS, INPUTS)

    def forward(self, x: Tensor) -> Answer:
        return Answer(x + torch.tanh(super().forward(x)), "block")


class Dataclasses(Base):
    """A model and blocks that return dataclasses."""

    def build(self) -> nn.Module:
        return StructuredParts()

    def loss(self, output: Answer, batch: dict[str, Tensor]) -> Tensor:
        return super().loss(output.mean, batch)


class DictParts(Parts):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"mean": super().forward(x), "aside": self.extra(x)}


class Dicts(Base):
    """A model that returns a dict, of which the loss uses one entry."""

    def build(self) -> nn.Module:
        return DictParts()

    def loss(self, output: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return super().loss(output["mean"], batch)


class Twice(Base):
    """Two calls of the model in one step."""

    def build(self) -> nn.Module:
        return Nested()

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]) - 0.5 * model(batch["x"].flip(1))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(INPUTS, WIDTH)
        self.downs = nn.ModuleList(
            nn.ModuleList([nn.Linear(WIDTH, WIDTH), Inner()]) for _ in range(2)
        )
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        for first, second in self.downs:  # type: ignore[misc]
            h = h + second(F.relu(first(h)))
        return self.out(h)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class NestedLists(Base):
    """Lists in lists, and blocks inside of blocks."""

    def build(self) -> nn.Module:
        return Nested()


class RepeatedParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(INPUTS, INPUTS)
        self.blocks = nn.ModuleList([block, nn.Linear(INPUTS, INPUTS), block, block])
        self.aside = nn.ModuleDict({"unused": nn.Linear(2, 2)})
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


class Repeated(Base):
    """One block that is called several times; another part that is never called."""

    def build(self) -> nn.Module:
        return RepeatedParts()


class Apart(nn.Module):
    """Of one block the layers are called, of the other one a method."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, INPUTS))
        self.blocks = nn.ModuleList([block, MethodBlock(), nn.Linear(INPUTS, INPUTS)])
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, x: Tensor) -> Tensor:
        layers, methods, last = self.blocks
        for layer in layers:  # type: ignore[attr-defined]
            x = layer(x)
        return self.head(last(x + methods.mixed(x)))  # type: ignore[operator]


class SkippingParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(INPUTS, INPUTS) for _ in range(4)])
        self.head = nn.Linear(INPUTS, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        for number, block in enumerate(self.blocks[:3]):
            if not self.training or number != self.calls % 3:
                x = x + torch.tanh(block(x))
        return self.head(x)


class Skipping(Base):
    """Blocks that some steps leave out, and one that is never called."""

    def build(self) -> nn.Module:
        return SkippingParts()


class MethodBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(INPUTS, INPUTS)

    def mixed(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class PartsOfBlocks(Base):
    """Blocks that are not called themselves."""

    def build(self) -> nn.Module:
        return Apart()


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(INPUTS // 2 + 1, dtype=torch.cfloat))
        self.head = nn.Linear(INPUTS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=INPUTS))


class ScaledParts(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.rare = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("size", torch.tensor(1.0))
        self.head.weight.register_hook(lambda gradient: 0.1 * gradient)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        y = super().forward(x) * self.scale
        return y * self.rare if self.training and self.calls % 2 else y


class Scalars(Base):
    """Weights without dimensions, one of them used in every other step; a hook on a gradient."""

    def build(self) -> nn.Module:
        return ScaledParts()


class ClampedParts(Parts):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.head.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Clamped(Base):
    """Writes into a weight."""

    def build(self) -> nn.Module:
        return ClampedParts()


class Penalty(Base):
    """A weight of a block, used by itself."""

    def build(self) -> nn.Module:
        return Nested()

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]) + (model.downs[0][0].weight.abs() * torch.ones(())).sum()


class Complex(Base):
    """Complex weights, as in a Fourier neural operator."""

    def build(self) -> nn.Module:
        return Spectral()


class TiedParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.blocks[2].weight = self.blocks[0].weight  # type: ignore[assignment]
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, token: Tensor) -> Tensor:
        x = self.embedding(token)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


class Tied(Base):
    """Weights that two layers share, also in different blocks."""

    def build(self) -> nn.Module:
        return TiedParts()

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["token"])

    def loss(self, output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(output, (batch["token"] * 3 + 1) % 11, reduction="none")


@functools.cache
def _ramp(width: int) -> Tensor:
    return torch.linspace(0.5, 1.5, width, dtype=torch.float64)


TABLES: dict[int, Tensor] = {}


class CachedParts(Parts):
    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in TABLES:
            TABLES[len(x)] = torch.ones(len(x), 1, dtype=x.dtype)
        if self.table is None or len(self.table) < len(x):
            self.table = torch.ones(len(x), 1, dtype=x.dtype)
        x = x * _ramp(INPUTS) * TABLES[len(x)] * self.table[: len(x)]
        return super().forward(x)


class Caches(Base):
    """Tables that a function, a module of Python and the model keep."""

    def build(self) -> nn.Module:
        network = CachedParts()
        network.extra = nn.Identity()
        return network


class LateParts(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or len(self.mask) < len(x):
            self.register_buffer("mask", torch.ones(len(x), dtype=x.dtype))
        return super().forward(x) * self.mask[: len(x), None]


class LateBuffer(Base):
    """A buffer that the first forward pass makes."""

    def build(self) -> nn.Module:
        return LateParts()


REFUSED_BY_SHARDS: dict[str, str] = {
    "Clamped": "scale.parallel: the forward pass writes into head.weight",
    "Penalty": "scale.parallel: the workload's forward uses a weight of a block without calling",
}
MODELS: list[type[Base]] = [
    *(Base, Idle, Routed, Alternating, Methods, Dataclasses, Dicts, Twice, NestedLists),
    *(Repeated, Skipping, PartsOfBlocks, Scalars, Tied, Caches, LateBuffer),
    *(Clamped, Penalty),
]
