"""The models that benchmarks train: the shipped digits network, and a small GPT."""

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import Batch, Spec, Workload, table


class Text(Workload):
    """A GPT over random bytes: its speed is that of real text.

    The loss is computed in the network, so that it is part of what torch.compile sees.
    """

    class Data(Spec):
        """Sequences of `context` + 1 bytes."""

        sequences: int = 4096
        context: int = 128

    class Model(Spec):
        """A decoder of pre-norm blocks, as GPT-2."""

        layers: int = 4
        width: int = 128
        heads: int = 4
        vocabulary: int = 256

    def dataset(self) -> dict[str, pa.Table]:
        shape = (self.data.sequences, self.data.context + 1)
        bytes_NT = np.random.default_rng(0).integers(0, 256, shape, dtype=np.int64)
        return {"train": table(tokens=bytes_NT), "val": table(tokens=bytes_NT[:8])}

    def build(self) -> nn.Module:
        return Gpt(self.data.context, self.model)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        loss_B: Tensor = model(batch["tokens"])
        return loss_B

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return output


class Gpt(nn.Module):
    """The mean cross-entropy [B] of sequences of tokens [B, T + 1], each given those before it."""

    def __init__(self, context: int, spec: Text.Model) -> None:
        super().__init__()
        self.embed = nn.Embedding(spec.vocabulary, spec.width)
        self.place = nn.Parameter(0.02 * torch.randn(context, spec.width))
        self.blocks = nn.Sequential(*(Block(spec) for _ in range(spec.layers)))
        self.norm = nn.LayerNorm(spec.width)
        self.head = nn.Linear(spec.width, spec.vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        self.embed.weight = self.head.weight

    def forward(self, tokens_BN: Tensor) -> Tensor:
        target_BT = tokens_BN[:, 1:]
        x_BTC = self.embed(tokens_BN[:, :-1]) + self.place
        logits_BTV = self.head(self.norm(self.blocks(x_BTC)))
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none")
        return loss.view_as(target_BT).mean(1)


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
