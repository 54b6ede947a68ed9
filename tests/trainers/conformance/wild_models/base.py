"""What the small models have in common: a data set of points, words and classes."""

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trainers import Workload, table

WIDTH, WORDS, CLASSES, LENGTH = 16, 11, 3, 6


def rows(count: int, seed: int, length: int = LENGTH) -> Any:
    """A table of x [N, 16], words t [N, length] (0 after the end), length [N], class y [N]."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, WIDTH)).astype(np.float32)
    t = random.integers(1, WORDS, (count, length))
    ends = random.integers(1, length + 1, count)
    t[np.arange(length)[None] >= ends[:, None]] = 0
    weights = np.random.default_rng(99).normal(size=(WIDTH, CLASSES))
    y = (x @ weights + 0.3 * random.normal(size=(count, CLASSES))).argmax(1)
    return table(x=x, t=t, length=ends, y=(y + t[:, 0]) % CLASSES)


class Wild(Workload):
    precision: ClassVar[str] = "fp64"
    tolerance: ClassVar[float] = 1e-9
    """Relative and absolute, of losses, metrics and weights."""
    optimizer: ClassVar[dict[str, Any]] = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}
    told_after: ClassVar[int] = 0
    """A mistake that this model has is told after so many steps at the latest."""

    def dataset(self):
        return {"train": rows(40, seed=0), "val": rows(21, seed=1)}

    def build(self):
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, model, batch):
        return model(batch["x"])

    def loss(self, output, batch):
        return F.cross_entropy(output, batch["y"], reduction="none")

    def metrics(self, output, batch):
        return {"probability": output.softmax(1).gather(1, batch["y"][:, None])[:, 0]}


class Tower(nn.Module):
    """A first layer, residual blocks in a ModuleList, a last layer."""

    def __init__(self, blocks, width=8):
        super().__init__()
        self.first = nn.Linear(WIDTH, width)
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def tanh_block(width=8):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def constant(*shape, seed=5):
    """Fixed numbers that do not come from torch's global generator."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
