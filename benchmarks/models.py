"""The models that benchmarks train: the shipped digits network, and a small GPT."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import Batch, Spec, Workload, table


class Text(Workload):
    """A GPT over random bytes: its speed is that of real text."""

    class Data(Spec):
        """Sequences of `context` + 1 bytes."""

        sequences: int = 4096
        context: int = 128

    class Model(Spec):
        """A decoder of pre-norm blocks."""

        layers: int = 4
        width: int = 128
        heads: int = 4

    def dataset(self) -> dict[str, pa.Table]:
        shape = (self.data.sequences, self.data.context + 1)
        bytes_NT = np.random.default_rng(0).integers(0, 256, shape, dtype=np.int64)
        return {"train": table(tokens=bytes_NT), "val": table(tokens=bytes_NT[:8])}

    def build(self) -> nn.Module:
        return Gpt(self.data.context, self.model)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(batch["tokens"][:, :-1])
        return logits

    def loss(self, output: Any, batch: Batch) -> Tensor:
        target_BT = batch["tokens"][:, 1:]
        return F.cross_entropy(output.mT, target_BT, reduction="none").mean(1)


class Gpt(nn.Module):
    def __init__(self, context: int, spec: Text.Model) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, spec.width)
        self.place = nn.Parameter(0.02 * torch.randn(context, spec.width))
        self.blocks = nn.Sequential(*(Block(spec) for _ in range(spec.layers)))
        self.norm = nn.LayerNorm(spec.width)
        self.head = nn.Linear(spec.width, 256, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embed(tokens_BT) + self.place
        logits_BTV: Tensor = self.head(self.norm(self.blocks(x_BTC)))
        return logits_BTV


class Block(nn.Module):
    def __init__(self, spec: Text.Model) -> None:
        super().__init__()
        self.heads = spec.heads
        self.norm1, self.norm2 = nn.LayerNorm(spec.width), nn.LayerNorm(spec.width)
        self.mix = nn.Linear(spec.width, 3 * spec.width)
        self.out = nn.Linear(spec.width, spec.width)
        self.mlp = nn.Sequential(
            nn.Linear(spec.width, 4 * spec.width), nn.GELU(), nn.Linear(4 * spec.width, spec.width)
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        b, t, c = x_BTC.shape
        qkv = self.mix(self.norm1(x_BTC)).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x_BTC + self.mlp(self.norm2(x_BTC))
