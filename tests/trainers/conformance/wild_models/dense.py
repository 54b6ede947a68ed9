"""Layers, and how models put them together."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from wild_models.base import CLASSES, WIDTH, WORDS, Tower, Wild, tanh_block


class Linear(Wild):
    """linear"""

    optimizer = {"name": "sgd", "lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}

    def build(self):
        return nn.Linear(WIDTH, CLASSES)


class Perceptron(Wild):
    """MLP"""

    def example(self):
        return torch.zeros(1, WIDTH)


class PlainMomentum(Wild):
    """MLP, SGD without momentum"""

    optimizer = {"name": "sgd", "lr": 0.1, "weight_decay": 0.1, "momentum": 0.0}


class Blocks(Wild):
    """residual blocks in a ModuleList"""

    def build(self):
        return Tower([tanh_block(), tanh_block()])


class FrozenPart(Wild):
    """a frozen part, in blocks"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        network.first.requires_grad_(False)
        network.blocks[0].requires_grad_(False)
        return network


class HalfFrozenBlock(Wild):
    """a block of which one layer is frozen"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        network.blocks[1][0].requires_grad_(False)
        return network


class TiedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.blocks = nn.ModuleList([tanh_block(), tanh_block()])
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, t):
        h = self.embedding(t).mean(1)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class Tied(Wild):
    """tied weights: embedding and head"""

    def build(self):
        return TiedNet()

    def forward(self, model, batch):
        return model(batch["t"])


class TiedBlocks(Wild):
    """one weight in two blocks"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        network.blocks[1][0].weight = network.blocks[0][0].weight
        return network


class TiedToRoot(Wild):
    """a weight of a block that the head uses too"""

    def build(self):
        network = Tower([nn.Linear(8, 8), nn.Linear(8, 8)])
        network.last = nn.Linear(8, 8)
        network.last.weight = network.blocks[0].weight
        return network


class RepeatedBlock(Wild):
    """a block that is applied three times"""

    def build(self):
        return Tower([tanh_block()] * 3)


class RepeatedAlternately(Wild):
    """two blocks that take turns"""

    def build(self):
        a, b = tanh_block(), tanh_block()
        return Tower([a, b, a, b])


class NestedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        self.stages = nn.ModuleList(
            nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(2)
        )
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x):
        h = self.first(x)
        for one, two in self.stages:
            h = h + two(torch.tanh(one(h)))
        return self.last(h)


class NestedLists(Wild):
    """ModuleLists in a ModuleList"""

    def build(self):
        return NestedNet()


class BlocksInBlocks(Wild):
    """blocks that have blocks themselves"""

    def build(self):
        return Tower([Inner(), Inner()])


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([tanh_block(), nn.Linear(8, 8)])

    def forward(self, x):
        for part in self.parts:
            x = x + part(x)
        return x


class NamedParts(Wild):
    """blocks in a ModuleDict and a named Sequential"""

    def build(self):
        return nn.ModuleDict(
            {
                "first": nn.Sequential(OrderedDict(linear=nn.Linear(WIDTH, 8), act=nn.Tanh())),
                "last": nn.Linear(8, CLASSES),
            }
        )

    def forward(self, model, batch):
        return model["last"](model["first"](batch["x"]))


class PartsInLists(Wild):
    """layers in a list of lists of which some are used"""

    def build(self):
        return Tower([tanh_block(), tanh_block(), tanh_block()])

    def forward(self, model, batch):
        h = model.first(batch["x"])
        for block in model.blocks[:2]:
            h = block(h)
        return model.last(h)


class UnusedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.extra = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.used(x)


class Unused(Wild):
    """unused parameters"""

    def build(self):
        return UnusedNet()


class Routed(Wild):
    """a part that only some samples go through"""

    def build(self):
        return RoutedNet()


class RoutedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.expert = nn.Linear(WIDTH, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x):
        h, chosen = self.first(x), x[:, 0] > 0.9
        if chosen.any():
            h = h.masked_scatter(chosen[:, None], h[chosen] + self.expert(h[chosen]))
        return self.last(h)


class AutoencoderNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)

    def encode(self, x):
        return F.relu(self.encoder(x))

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x):
        return self.decode(self.encode(x))


class Methods(Wild):
    """methods of the model besides forward"""

    def build(self):
        return AutoencoderNet()

    def forward(self, model, batch):
        return model.decode(model.encode(batch["x"]))


class MethodsAlone(Wild):
    """a model without forward"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        network.forward = None
        return network

    def forward(self, model, batch):
        h = model.first(batch["x"])
        for block in model.blocks:
            h = h + block(h)
        return model.last(h)


class TwoCalls(Wild):
    """two calls of the model in a step"""

    def build(self):
        return Tower([tanh_block(), tanh_block()])

    def forward(self, model, batch):
        one, two = model(batch["x"]), model(0.5 * batch["x"].flip(1))
        return one + 0.3 * two


class OneCallWithoutGradient(Wild):
    """a call under no_grad as the target of another"""

    def build(self):
        return Tower([tanh_block(), tanh_block()])

    def forward(self, model, batch):
        with torch.no_grad():
            target = model(batch["x"].flip(1))
        return model(batch["x"]) + 0.1 * target


class BranchesNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.points = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8))
        self.words = nn.EmbeddingBag(WORDS, 8, mode="mean")
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x, t):
        one, two = F.normalize(self.points(x), dim=1), F.normalize(self.words(t), dim=1)
        alike = self.logit_scale.exp() * (one * two).sum(1, keepdim=True)
        return self.head(torch.cat([one, two], 1)) + alike * self.head.bias


class TwoBranches(Wild):
    """two branches over two columns"""

    def build(self):
        return BranchesNet()

    def forward(self, model, batch):
        return model(batch["x"], batch["t"])


class ScalarNet(Tower):
    def __init__(self):
        super().__init__([tanh_block(), tanh_block()])
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.scale * super().forward(x)


class ScalarWeight(Wild):
    """a weight without dimensions"""

    def build(self):
        return ScalarNet()


class Containers(Wild):
    """a ParameterList and a ParameterDict"""

    def build(self):
        return ContainersNet()


class ContainersNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(0.2 * torch.randn(8, 8)) for _ in range(2))
        self.ends = nn.ParameterDict(
            {"first": 0.2 * torch.randn(WIDTH, 8), "last": 0.2 * torch.randn(8, CLASSES)}
        )

    def forward(self, x):
        h = x @ self.ends["first"]
        for weight in self.weights:
            h = h + torch.tanh(h @ weight)
        return h @ self.ends["last"]


class InPlaceActivation(Wild):
    """activations in place"""

    def build(self):
        return Tower(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)) for _ in range(2)
        )


class UserCheckpoint(Wild):
    """a model that recomputes activations itself"""

    def build(self):
        return UserCheckpointNet([tanh_block(), tanh_block()])


class UserCheckpointNet(Tower):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.last(x)


class Hooked(Wild):
    """features that forward hooks keep"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        network.features = []
        for block in network.blocks:
            block.register_forward_hook(
                lambda _, __, output, kept=network.features: kept.append(output)
            )
        return network

    def forward(self, model, batch):
        model.features.clear()
        output = model(batch["x"])
        return output + 0.1 * sum(f.mean(1, keepdim=True) for f in model.features)


class KeywordBlocks(Wild):
    """blocks with keyword arguments and several outputs"""

    def build(self):
        return KeywordNet()


class KeywordBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, *, skip, scale=None):
        h = torch.tanh(self.linear(x))
        return {"x": x + h, "skip": skip + (h if scale is None else h * scale)}


class KeywordNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList([KeywordBlock(), KeywordBlock()])

    def forward(self, x):
        h = self.first(x)
        skip = torch.zeros_like(h)
        for number, block in enumerate(self.blocks):
            found = block(h, skip=skip, scale=h if number else None)
            h, skip = found["x"], found["skip"]
        return self.last(h + skip)


class SkipConnections(Wild):
    """a U-net: activations of one block go to a later one"""

    def build(self):
        return SkipNet()


class SkipNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(16, 8), nn.Linear(8, 4)])
        self.up = nn.ModuleList([nn.Linear(4, 8), nn.Linear(16, 16)])
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x):
        kept = []
        for part in self.down:
            x = torch.tanh(part(x))
            kept.append(x)
        x = torch.tanh(self.up[0](x))
        return self.last(torch.tanh(self.up[1](torch.cat([x, kept[0]], 1))))


class Forces(Wild):
    """the derivative of the output is learnt: double backward"""

    def build(self):
        return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, model, batch):
        with torch.enable_grad():
            x = batch["x"].detach().clone().requires_grad_()
            energy = model(x)[:, 0]
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, force

    def loss(self, output, batch):
        energy, force = output
        return (energy - batch["y"]).square() + 0.1 * (force - torch.sin(batch["x"])).square().mean(
            1
        )

    def metrics(self, output, batch):
        return {"force": output[1].square().sum(1)}


class TwoNames(Wild):
    """one module under two names"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        network.again = network.blocks[0]
        return network

    def forward(self, model, batch):
        h = model.first(batch["x"])
        for block in model.blocks:
            h = h + block(h)
        return model.last(h + model.again(h))


class TransposedWeights(Wild):
    """weights that are not contiguous"""

    def build(self):
        network = Tower([nn.Linear(8, 8), nn.Linear(8, 8)])
        network.first.weight = nn.Parameter(0.2 * torch.randn(WIDTH, 8).t())
        network.blocks[0].weight = nn.Parameter(0.2 * torch.randn(8, 8).t())
        return network


class EmptyWeight(Wild):
    """a weight without elements"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        network.prompt = nn.Parameter(torch.zeros(0, WIDTH))
        return network

    def forward(self, model, batch):
        return model(batch["x"] + model.prompt.sum(0))


class GradientHook(Wild):
    """hooks on gradients"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        for weight in network.blocks.parameters():
            weight.register_hook(lambda gradient: 0.1 * gradient)
        return network


class BackwardHook(Wild):
    """hooks on the backward passes of modules"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        for block in network.blocks:
            block.register_full_backward_hook(lambda *args: (0.5 * args[1][0],))
        return network


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -0.5 * gradient


class ReversedGradient(Wild):
    """an autograd function of one's own"""

    def build(self):
        return ReversedNet([tanh_block(), tanh_block()])


class ReversedNet(Tower):
    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(Reverse.apply(x))
        return self.last(x)


class ClampedNet(Tower):
    def forward(self, x):
        with torch.no_grad():
            self.last.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


class Clamped(Wild):
    """weights that forward clamps"""

    def build(self):
        return ClampedNet([tanh_block(), tanh_block()])


class TeacherNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = Tower([tanh_block(), tanh_block()])
        self.teacher = Tower([tanh_block(), tanh_block()])
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
                for mean, weight in pairs:
                    mean.lerp_(weight, 0.1)
        return self.student(x) + 0.1 * self.teacher(x)


class Teacher(Wild):
    """a teacher, a moving average of the weights, that forward updates"""

    def build(self):
        return TeacherNet()


class Pruned(Wild):
    """pruned weights (torch.nn.utils.prune)"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        for block in network.blocks:
            prune.l1_unstructured(block[0], "weight", 0.5)
        return network


class Scripted(Wild):
    """a part that is scripted"""

    def build(self):
        network = Tower([tanh_block(), tanh_block()])
        network.first = torch.jit.trace(network.first, torch.zeros(2, WIDTH))
        return network
