"""A model whose parts a property test draws."""

import torch
import torch.nn.functional as F
from torch import nn

from trainers import Spec
from wild_models.base import CLASSES, WIDTH, Wild, rows, tanh_block
from wild_models.normalized import MovingBlock
from wild_models.randomness import NoisyBlock


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, 8, batch_first=True)

    def forward(self, x):
        return self.gru(x.view(-1, 4, 2))[0][:, -1]


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return torch.tanh(self.linear(x)) / (1 + self.calls)


class DroppingFunction(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.2, self.training)


def frozen():
    block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    block[1].running_mean.fill_(0.3)
    return block.requires_grad_(False).eval()


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 2, 3, padding=1, groups=2), nn.Flatten()
    )


PARTS = {
    "linear": lambda: nn.Linear(8, 8),
    "block": tanh_block,
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(8), tanh_block()),
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)),
    "F.dropout": lambda: DroppingFunction(8, 8),
    "noise": lambda: NoisyBlock(nn.Linear(8, 8)),
    "frozen": frozen,
    "recurrent": Recurrent,
    "counting": Counting,
    "moving average": MovingBlock,
    "convolution": convolution,
    "again": None,  # the part before it once more
    "tied": None,  # a linear layer with the weight of the last one
}


class Drawn(Wild):
    class Data(Spec):
        train: int = 40
        val: int = 21

    class Model(Spec):
        parts: list[str] = ["linear"]

    def dataset(self):
        return {"train": rows(self.data.train, seed=0), "val": rows(self.data.val, seed=1)}

    def build(self):
        parts, linear = [], None
        for name in self.model.parts:
            again = name == "again" and parts
            part = parts[-1] if again else (PARTS[name] or PARTS["linear"])()
            if name == "tied" and linear is not None:
                part.weight = linear.weight
            linear = part if isinstance(part, nn.Linear) else linear
            parts.append(part)
        return DrawnNet(parts)


class DrawnNet(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        h = self.first(x)
        for part in self.parts:
            h = h + part(h)
        return self.last(h)
