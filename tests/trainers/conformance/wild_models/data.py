"""Data sets and batches."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from trainers import table
from wild_models.base import CLASSES, WIDTH, WORDS, Tower, Wild, rows, tanh_block


class ChangedBatch(Wild):
    """a batch that forward changes in place"""

    def build(self):
        return Tower([tanh_block(), tanh_block()])

    def forward(self, model, batch):
        batch["x"] *= 0.5
        batch["x"][:, 0] = 1.0
        return model(batch["x"])


class ChangedColumns(Wild):
    """a batch to which forward adds a column for the loss"""

    def forward(self, model, batch):
        batch["target"] = (batch["y"] + 1) % CLASSES
        return model(batch.pop("x"))

    def loss(self, output, batch):
        return F.cross_entropy(output, batch["target"], reduction="none")


class FewSamples(Wild):
    """fewer samples than a batch"""

    def dataset(self):
        return {"train": rows(5, seed=0), "val": rows(1, seed=1)}


class IntegersAlone(Wild):
    """integers alone, of several widths, and booleans"""

    def dataset(self):
        def made(count, seed):
            random = np.random.default_rng(seed)
            small = random.integers(0, WORDS, count).astype(np.uint16)
            return table(
                small=small,
                byte=random.integers(0, 250, count).astype(np.uint8),
                flag=random.integers(0, 2, (count, 2)).astype(bool),
                y=(small % CLASSES).astype(np.int32),
            )

        return {"train": made(40, 0), "val": made(21, 1)}

    def build(self):
        return nn.Embedding(WORDS, CLASSES)

    def forward(self, model, batch):
        shift = batch["byte"].to(model.weight.dtype) / 250 + batch["flag"].sum(1)
        return model(batch["small"].long()) * (1 + shift[:, None])

    def loss(self, output, batch):
        return F.cross_entropy(output, batch["y"].long(), reduction="none")

    def metrics(self, output, batch):
        return {"flags": batch["flag"].double().mean(1)}


class Times(Wild):
    """times in float64 columns of a float32 model"""

    precision, tolerance = "fp32", 2e-5

    def dataset(self):
        def made(count, seed):
            random = np.random.default_rng(seed)
            begin = 1.7e9 + random.integers(0, 10**6, count) / 8
            return table(
                begin=begin, end=begin + random.integers(1, 80, count) / 8, y=np.arange(count) % 3
            )

        return {"train": made(40, 0), "val": made(21, 1)}

    def build(self):
        return nn.Linear(1, CLASSES)

    def forward(self, model, batch):
        passed = (batch["end"] - batch["begin"]) / 10
        return model(passed[:, None].to(model.weight.dtype))

    def metrics(self, output, batch):
        return {"passed": (batch["end"] - batch["begin"]).double()}


class DoubleInputs(Wild):
    """float64 columns that go into a float32 model as they are"""

    precision, tolerance = "fp32", 2e-5

    def dataset(self):
        def made(count, seed):
            x = np.random.default_rng(seed).normal(size=(count, WIDTH))
            return table(x=x, y=np.arange(count) % 3)

        return {"train": made(40, 0), "val": made(21, 1)}


class Regression(Wild):
    """a target that is a column of floats, a loss of several dimensions"""

    def build(self):
        return nn.Linear(WIDTH, WIDTH)

    def loss(self, output, batch):
        return F.huber_loss(output, batch["x"].roll(1, 1), reduction="none").mean(1)

    def metrics(self, output, batch):
        return {"error": (output - batch["x"]).abs().amax(1)}


class WholeBatchLoss(Wild):
    """a loss of each sample that depends on the batch's others"""

    def build(self):
        return nn.Linear(WIDTH, 8)

    def loss(self, output, batch):
        z = F.normalize(output, dim=1)
        return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)), reduction="none")

    def metrics(self, output, batch):
        return {}
