"""The models that benchmarks train, besides the shipped digits network."""

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import Batch, Spec, Workload, table


class Text(Workload):
    """A GPT over random bytes, which is as fast as on real text.

    The network computes the loss, so torch.compile compiles it too.
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


class Chains(Text):
    """A GPT over bytes, each of which can be followed by four others only, so that it can learn."""

    def dataset(self) -> dict[str, pa.Table]:
        draw = np.random.default_rng(0)
        follow_V4 = draw.integers(0, 256, (256, 4))
        count = self.data.sequences * 9 // 8
        bytes_NT = np.empty((count, self.data.context + 1), np.int64)
        bytes_NT[:, 0] = draw.integers(0, 256, count)
        for place in range(self.data.context):
            choice_N = draw.integers(0, 4, count)
            bytes_NT[:, place + 1] = follow_V4[bytes_NT[:, place], choice_N]
        train, val = np.split(bytes_NT, [self.data.sequences])
        return {"train": table(tokens=train), "val": table(tokens=val)}


class Gpt(nn.Module):
    """The mean cross-entropy [B] of the next tokens in sequences of tokens [B, T + 1]."""

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


class Mlp(Workload):
    """scikit-learn's handwritten digits, and a network of three linear layers."""

    class Model(Spec):
        """Two hidden layers with dropout after each."""

        width: int = 128
        dropout: float = 0.0

    def dataset(self) -> dict[str, pa.Table]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        order = np.random.default_rng(0).permutation(len(bunch.target))
        pixels_NP = (bunch.data[order] / 16).astype(np.float32)
        label_N = bunch.target[order].astype(np.int64)
        return {
            "train": table(pixels=pixels_NP[:1437], label=label_N[:1437]),
            "val": table(pixels=pixels_NP[1437:], label=label_N[1437:]),
        }

    def build(self) -> nn.Module:
        width, dropout = self.model.width, self.model.dropout
        first = (nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout))
        second = (nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        return nn.Sequential(*first, *second, nn.Linear(width, 10))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        logits_BK: Tensor = model(batch["pixels"])
        return logits_BK

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch["label"], reduction="none")

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(1) == batch["label"]).float()}
