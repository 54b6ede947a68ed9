"""Normalization, and weights that are functions of other weights."""

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from wild_models.base import CLASSES, WIDTH, Tower, Wild, tanh_block


class BatchNorm(Wild):
    """BatchNorm"""

    def build(self):
        return nn.Sequential(
            nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)
        )


def normalized_block(norm):
    return nn.Sequential(nn.Linear(8, 8), norm, nn.Tanh(), nn.Linear(8, 8))


class BatchNormBlocks(Wild):
    """BatchNorm in blocks"""

    def build(self):
        return Tower(normalized_block(nn.BatchNorm1d(8)) for _ in range(2))


class AverageBatchNorm(Wild):
    """BatchNorm whose statistics are averages (momentum None)"""

    def build(self):
        return Tower(normalized_block(nn.BatchNorm1d(8, momentum=None)) for _ in range(2))


class FrozenBatchNorm(Wild):
    """frozen BatchNorm in eval mode"""

    def build(self):
        network = Tower(normalized_block(nn.BatchNorm1d(8)) for _ in range(2))
        network.blocks[0][1].running_mean.fill_(0.5)
        network.blocks[0][1].running_var.fill_(4.0)
        network.blocks[0].requires_grad_(False).eval()
        return network


class FrozenBlockOwnTrain(Wild):
    """a part that stays in eval mode by its own train()"""

    def build(self):
        network = Tower([StaysInEval(), tanh_block()])
        network.blocks[0].eval()
        return network


class StaysInEval(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self[1].running_mean.fill_(0.5)

    def train(self, mode=True):
        return super().train(False)


class GroupNorm(Wild):
    """GroupNorm in blocks"""

    def build(self):
        return Tower(normalized_block(nn.GroupNorm(2, 8)) for _ in range(2))


class LayerNorm(Wild):
    """LayerNorm and RMSNorm"""

    def build(self):
        return Tower([normalized_block(nn.LayerNorm(8)), normalized_block(nn.RMSNorm(8))])


class InstanceNorm(Wild):
    """InstanceNorm with running statistics"""

    def build(self):
        return InstanceNet()


class InstanceNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(2, 2, 3, padding=1),
                nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
            )
            for _ in range(2)
        )
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x):
        h = x.view(-1, 2, 8)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.last(h.flatten(1))


class WeightNorm(Wild):
    """weight norm (parametrization)"""

    def build(self):
        return Tower(
            nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh())
            for _ in range(2)
        )


class SpectralNorm(Wild):
    """spectral norm (parametrization)"""

    def build(self):
        return Tower(
            nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh())
            for _ in range(2)
        )


class Orthogonal(Wild):
    """orthogonal weights (parametrization)"""

    def build(self):
        return Tower(
            nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Tanh()) for _ in range(2)
        )


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).mT


class OwnParametrization(Wild):
    """a parametrization of one's own"""

    def build(self):
        network = Tower([nn.Linear(8, 8), nn.Linear(8, 8)])
        for block in network.blocks:
            parametrize.register_parametrization(block, "weight", Symmetric())
        return network


class OldWeightNorm(Wild):
    """weight norm by a hook (torch.nn.utils.weight_norm)"""

    def build(self):
        return Tower(
            nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Tanh()) for _ in range(2)
        )


class MovingNet(Tower):
    """Divides by a moving average of the activations' size, as vector quantizers do."""

    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.register_buffer("size", torch.ones(8))

    def forward(self, x):
        h = self.first(x)
        if self.training:
            self.size = 0.9 * self.size + 0.1 * h.detach().abs().mean(0)
        h = h / self.size
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


class MovingAverage(Wild):
    """a moving average that the model uses"""

    def build(self):
        return MovingNet()


class MovingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        h = self.linear(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(h.mean(0), 0.1)
        return torch.tanh(h - self.mean)


class MovingBlocks(Wild):
    """moving averages in blocks"""

    def build(self):
        return Tower([MovingBlock(), MovingBlock()])
