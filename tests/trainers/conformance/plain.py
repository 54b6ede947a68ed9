"""Training in bare PyTorch, float64, one process; knows nothing of Heliostat.

Of a workload it takes the methods that its author wrote. What the documentation promises is
written down here once more: the seeds, the order of samples, the masks of dropout, the schedule.
`shares` is the number of workers. Each of them normalizes over its own samples, all begin a step
and an evaluation with the buffers of the first one, and the model is that of the first one.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15
Rows = dict[str, Tensor]


def mix(x: Any) -> Any:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_of(*parts: int) -> int:
    """One seed from several numbers."""
    state = 0
    with np.errstate(over="ignore"):
        for part in parts:
            state = int(mix(np.uint64((state + (part + 1) * GOLDEN) & MASK)))
    return state >> 1


def order(seed: int, samples: int, count: int) -> Tensor:
    """The first `count` samples of a run: a permutation for each epoch."""
    epochs = [
        torch.randperm(samples, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        for epoch in range(math.ceil(count / samples))
    ]
    return torch.cat(epochs)[:count]


class SampleNumbers:
    """Uniform numbers of the samples at `positions`; dropout has a stream of its own."""

    def __init__(self, seed: int, positions: range) -> None:
        key = np.uint64(seed_of(seed) & MASK)
        self.keys = mix(np.array(positions, np.uint64) * np.uint64(GOLDEN) + key)
        self.dropout_keys, self.draws = self.keys, 0

    def uniform(self, *shape: int) -> Tensor:
        self.draws += 1
        elements = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(GOLDEN)
        elements = elements + np.uint64((self.draws << 40) * GOLDEN & MASK)
        bits = mix(self.keys[:, None] ^ mix(elements)) >> np.uint64(40)
        return torch.from_numpy((bits * 2.0**-24).astype(np.float32)).reshape(-1, *shape)

    def kept(self, p: float, x: Tensor) -> Tensor:
        """The next mask of dropout for x [B, ...]: a number for each element, above `p` or not."""
        self.dropout_keys = self.dropout_keys + np.uint64(0xD1342543DE82EF95)
        elements = np.arange(x[0].numel(), dtype=np.uint64) * np.uint64(GOLDEN)
        x64 = self.dropout_keys[:, None] + elements
        x64 = (x64 ^ (x64 >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x64 = (x64 ^ (x64 >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        kept = x64.view(np.int64) >= int((p - 0.5) * 2.0**64)
        return torch.from_numpy(kept).view_as(x)


class Dropout(nn.Dropout):
    numbers: list[SampleNumbers]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * self.numbers[0].kept(self.p, x) / (1 - self.p)


def build(workload: Any, seed: int, data: Rows) -> nn.Module:
    """The model of a seed in double precision, complex numbers too.

    Lazy modules get their weights from the first two samples, in evaluation mode.
    """
    torch.manual_seed(seed_of(seed))
    np.random.seed(seed_of(seed) % 2**32)
    random.seed(seed_of(seed))
    network: nn.Module = workload.build()
    network.double()
    network._apply(lambda t: t.to(torch.complex128) if t.is_complex() else t)
    if any(map(is_lazy, (*network.parameters(), *network.buffers()))):
        network.eval()
        with torch.no_grad():
            workload.forward(network, take(data, slice(2)))
        network.train()
    numbers: list[SampleNumbers] = []
    for module in network.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
            module.numbers = numbers
    network.numbers = numbers
    return network


@dataclass
class Plain:
    """What the loop found."""

    network: nn.Module
    losses: list[float] = field(default_factory=list)
    """The mean loss of each step's batch, before the step."""
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)


def take(data: Rows, index: Any) -> Rows:
    """Samples as the model gets them, floating-point columns in the precision of the weights."""
    rows = {name: values[index].clone() for name, values in data.items()}
    return {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}


def with_buffers_of_the_first(networks: list[nn.Module]) -> list[nn.Module]:
    for network in networks[1:]:
        for own, first in zip(network.buffers(), networks[0].buffers(), strict=True):
            if not own.equal(first):  # some overlap themselves in memory, and cannot be written
                own.copy_(first)
    return networks


def evaluate(workload: Any, networks: list[nn.Module], data: Rows) -> dict[str, float]:
    """The mean loss and metrics over a split, each network on its share, in evaluation mode."""
    count = len(next(iter(data.values())))
    sums: dict[str, float] = {}
    bounds = [count * share // len(networks) for share in range(len(networks) + 1)]
    for share, network in enumerate(with_buffers_of_the_first(networks)):
        modes = {module: module.training for module in network.modules()}
        network.eval()
        with torch.no_grad():
            rows = take(data, slice(bounds[share], bounds[share + 1]))
            output = workload.forward(network, rows)
            found = {"loss": workload.loss(output, rows), **workload.metrics(output, rows)}
        for name, values in found.items():
            sums[name] = sums.get(name, 0.0) + values.double().sum().item()
        for module, mode in modes.items():
            module.training = mode
    return workload.summary({name: total / count for name, total in sums.items()})


def train(
    workload: Any,
    train: Rows,
    val: Rows,
    *,
    steps: int,
    batch: int,
    evaluated: set[int],
    rule: dict[str, Any],
    clip: float,
    seed: int = 0,
    shares: int = 1,
    parts: int = 1,
) -> Plain:
    """`steps` steps on batches of `batch`, in `shares` workers of `parts` micro-batches each."""
    networks = [build(workload, seed, train) for _ in range(shares)]
    optimizers = [optimizer(network, rule) for network in networks]
    samples, each = len(next(iter(train.values()))), batch // shares // parts
    stream, plain = order(seed, samples, steps * batch), Plain(networks[0])
    for step in range(steps):
        loss = 0.0
        for share, network in enumerate(with_buffers_of_the_first(networks)):
            for part in range(parts):
                torch.manual_seed(seed_of(seed, step, share, part))
                begin = step * batch + (share * parts + part) * each
                numbers = SampleNumbers(seed, range(begin, begin + each))
                network.numbers[:] = [numbers]
                rows = workload.augment(take(train, stream[begin : begin + each]), numbers)
                loss_B = workload.loss(workload.forward(network, rows), rows)
                (loss_B.sum() / batch).backward()
                loss += loss_B.sum().item() / batch
        plain.losses.append(loss)
        for weights in zip(*(network.parameters() for network in networks), strict=True):
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            for weight in weights:
                weight.grad = torch.stack(gradients).sum(0) if gradients else None
        for network, own in zip(networks, optimizers, strict=True):
            nn.utils.clip_grad_norm_(network.parameters(), clip)
            for group in own.param_groups:
                group["lr"] = rule["lr"] * share_of_peak(step, steps)
            own.step()
            own.zero_grad()
        if step + 1 in evaluated:
            plain.evaluations[step + 1] = evaluate(workload, networks, val)
    return plain


def optimizer(network: nn.Module, rule: dict[str, Any]) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not."""
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": rule["weight_decay"]},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    if rule["name"] == "adamw":
        return torch.optim.AdamW(groups, lr=rule["lr"], foreach=False)
    momentum = rule.get("momentum", 0.9)
    return torch.optim.SGD(
        groups, lr=rule["lr"], momentum=momentum, nesterov=momentum > 0, foreach=False
    )


def share_of_peak(step: int, steps: int, warmup: float = 0.25) -> float:
    """A linear rise over a quarter of the steps, then a cosine to zero at the last step."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - 1 - rise)))) / 2
