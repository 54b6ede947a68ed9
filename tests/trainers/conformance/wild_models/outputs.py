"""Outputs and losses of all forms."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wild_models.base import CLASSES, WIDTH, Tower, Wild, tanh_block


class HeadsNet(Tower):
    def __init__(self, form):
        super().__init__([tanh_block(), tanh_block()])
        self.form, self.length = form, nn.Linear(8, 1)

    def forward(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.form(self.last(h), self.length(h)[:, 0])


def as_dict(logits, length):
    return {"logits": logits, "length": length, "name": "two heads"}


@dataclass
class Output:
    logits: Tensor
    length: Tensor
    note: str = "two heads"


class Pair(NamedTuple):
    logits: Tensor
    length: Tensor


class DictOutput(Wild):
    """a dict as output, losses of two heads"""

    form = staticmethod(as_dict)

    def build(self):
        return HeadsNet(self.form)

    def heads(self, output):
        return output["logits"], output["length"]

    def loss(self, output, batch):
        logits, length = self.heads(output)
        classes = F.cross_entropy(logits, batch["y"], reduction="none")
        return classes + 0.1 * (length - batch["length"]).square()

    def metrics(self, output, batch):
        logits, length = self.heads(output)
        return {"length": length, "classes": super().metrics(logits, batch)["probability"]}


class DataclassOutput(DictOutput):
    """a dataclass as output"""

    form = Output

    def heads(self, output):
        return output.logits, output.length


class NamedTupleOutput(DictOutput):
    """a named tuple as output"""

    form = Pair

    def heads(self, output):
        return output


class ListOutput(DictOutput):
    """a list of pairs as output"""

    form = staticmethod(lambda logits, length: [(logits, length)])

    def heads(self, output):
        return output[0]


class WeighedNet(Tower):
    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.log_variance = nn.Parameter(torch.zeros(2))


class LearntLossWeights(Wild):
    """weights of the losses are learnt"""

    def build(self):
        return WeighedNet()

    def forward(self, model, batch):
        return model(batch["x"]), model.log_variance

    def loss(self, output, batch):
        logits, log_variance = output
        classes = F.cross_entropy(logits, batch["y"], reduction="none")
        others = logits.square().mean(1)
        return (
            classes * (-log_variance[0]).exp()
            + others * (-log_variance[1]).exp()
            + (log_variance.sum())
        )

    def metrics(self, output, batch):
        return super().metrics(output[0], batch)


class PartOfOutput(Wild):
    """an auxiliary head that the loss leaves out"""

    def build(self):
        return HeadsNet(as_dict)

    def loss(self, output, batch):
        return F.cross_entropy(output["logits"], batch["y"], reduction="none")

    def metrics(self, output, batch):
        return {"length": output["length"]}


class WeightPenalty(Wild):
    """a penalty on the weights in the loss"""

    def build(self):
        return Tower([tanh_block(), tanh_block()])

    def forward(self, model, batch):
        return model(batch["x"]), model.first.weight.square().sum() + model.blocks[0][
            0
        ].weight.abs().sum()

    def loss(self, output, batch):
        return F.cross_entropy(output[0], batch["y"], reduction="none") + 1e-2 * output[1]

    def metrics(self, output, batch):
        return super().metrics(output[0], batch)


class Ratio(Wild):
    """metrics that are ratios of means"""

    def metrics(self, output, batch):
        guessed = output.argmax(1)
        return {
            "found": ((guessed == 0) & (batch["y"] == 0)).double(),
            "guessed": (guessed == 0).double(),
            "there": (batch["y"] == 0).double(),
        }

    def summary(self, means):
        return {
            "loss": means["loss"],
            "perplexity": float(torch.tensor(means["loss"], dtype=torch.float64).exp()),
            "f1": 2 * means["found"] / (means["guessed"] + means["there"]),
        }


class Jacobian(Wild):
    """a function of the model under torch.func"""

    def build(self):
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, model, batch):
        weights = dict(model.named_parameters())

        def alone(x):
            return torch.func.functional_call(model, weights, (x[None],))[0]

        return torch.vmap(alone)(batch["x"])


class DictLoss(Wild):
    """a dict as loss"""

    def loss(self, output, batch):
        return {"loss": super().loss(output, batch)}


class MeanLoss(Wild):
    """a mean as loss"""

    def loss(self, output, batch):
        return super().loss(output, batch).mean()


class NoLoss(Wild):
    """a loss that returns nothing"""

    def loss(self, output, batch):
        super().loss(output, batch)


class FloatMetric(Wild):
    """a metric that is a float"""

    told_after = 5  # the first evaluation

    def metrics(self, output, batch):
        return {"accuracy": (output.argmax(1) == batch["y"]).double().mean().item()}


class BooleanMetric(Wild):
    """metrics of booleans and integers"""

    def metrics(self, output, batch):
        return {"right": output.argmax(1) == batch["y"], "guess": output.argmax(1)}


class MetricsInOrderOfBatch(Wild):
    """metrics in an order that depends on the batch"""

    def metrics(self, output, batch):
        names = [*dict.fromkeys([*batch["y"].tolist(), *range(CLASSES)])]
        return {f"share {name}": (batch["y"] == name).double() for name in names}


class DetachedLoss(Wild):
    """a loss that does not depend on the weights"""

    def loss(self, output, batch):
        return super().loss(output.detach(), batch)


class AllFrozen(Wild):
    """all weights frozen"""

    def build(self):
        return super().build().requires_grad_(False)


class NoWeights(Wild):
    """no weights at all"""

    def build(self):
        return nn.Softmax(1)

    def forward(self, model, batch):
        return model(batch["x"])[:, :CLASSES]
