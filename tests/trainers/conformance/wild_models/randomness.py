"""Random numbers: in building, in augmentation, in forward."""

import random as python_random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from wild_models.base import CLASSES, WIDTH, Tower, Wild, tanh_block


class Dropout(Wild):
    """dropout"""

    def build(self):
        return nn.Sequential(
            nn.Linear(WIDTH, 8), nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES)
        )


class DropoutBlocks(Wild):
    """dropout in blocks"""

    def build(self):
        return Tower(nn.Sequential(tanh_block(), nn.Dropout(0.3)) for _ in range(2))


class FrozenDropout(Wild):
    """dropout that is off, in eval mode"""

    def build(self):
        network = Tower(nn.Sequential(tanh_block(), nn.Dropout(0.3)) for _ in range(2))
        network.blocks[0].eval()
        return network


class FunctionalNet(Tower):
    def forward(self, x):
        h = F.dropout(self.first(x), 0.3, self.training)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


class FunctionalDropout(Wild):
    """F.dropout"""

    def build(self):
        return FunctionalNet([tanh_block(), tanh_block()])


class NoisyBlock(nn.Sequential):
    def forward(self, x):
        noise = 0.1 * torch.randn_like(x) if self.training else 0.0
        return super().forward(x + noise)


class Noise(Wild):
    """noise in blocks"""

    def build(self):
        return Tower([NoisyBlock(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])


class VariationalNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, 8), nn.Linear(4, WIDTH)

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return self.decoder(z), mean, log_variance


class Variational(Wild):
    """a variational autoencoder"""

    def build(self):
        return VariationalNet()

    def loss(self, output, batch):
        found, mean, log_variance = output
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
        return (found - batch["x"]).square().sum(1) + divergence

    def metrics(self, output, batch):
        return {"error": (output[0] - batch["x"]).square().sum(1)}


class NumpyInit(Wild):
    """weights from numpy's global generator"""

    def build(self):
        network = super().build()
        with torch.no_grad():
            values = 0.3 * np.random.normal(size=(8, WIDTH))
            network[0].weight.copy_(torch.from_numpy(values))
        return network


class PythonInit(Wild):
    """weights from Python's global generator"""

    def build(self):
        network = super().build()
        with torch.no_grad():
            values = [[python_random.gauss(0, 0.3) for _ in range(WIDTH)] for _ in range(8)]
            network[0].weight.copy_(torch.tensor(values))
        return network


class FeaturesNet(nn.Module):
    def __init__(self, as_buffer, generator=None):
        super().__init__()
        values = torch.randn(WIDTH, 12, generator=generator)
        if as_buffer:
            self.register_buffer("b", values, persistent=False)
        else:
            self.b = values
        self.last = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.last(torch.cos(x @ self.b.to(x.dtype)))


class FeaturesInBuffer(Wild):
    """random features in a non-persistent buffer"""

    def build(self):
        return FeaturesNet(as_buffer=True)


class FeaturesInAttribute(Wild):
    """random features in a plain attribute"""

    def build(self):
        return FeaturesNet(as_buffer=False)


class RandomWiring(Wild):
    """a random choice of inputs, a list of indices"""

    def build(self):
        network = super().build()
        network.chosen = torch.randperm(WIDTH).tolist()
        return network

    def forward(self, model, batch):
        return model(batch["x"][:, model.chosen])


class Augmented(Wild):
    """augmentation with the sample's own numbers"""

    def augment(self, batch, random):
        scale = 1 + 0.1 * random.uniform(1).to(batch["x"].dtype)
        return {**batch, "x": batch["x"] * scale + 0.1 * random.uniform(WIDTH).to(scale.dtype)}
