"""Natural and programming language: a GPT that predicts the next token of a text.

**Data.** `stdlib` is the source of the running Python's standard library without its tests, for
3.11 some 9 MB under the PSF licence; the manifest names the version, because the text depends on
it. Your own text comes from one file or a folder of files: Parquet with a text column, JSON lines
with a text key, all others plain UTF-8. A record, or a plain file, is a document. A hash of a
document's text puts it into `train`, `val` or `test`, so copies are in the same split. A folder
with `train/` and optionally `val/` and `test/` keeps its split, and a single plain file is cut
into three, with the test split at its end. Documents are joined with a separator and cut into
windows of `context` tokens; the rest at the end of a part is dropped.

**Vocabulary.** The 256 bytes, or byte-pair encoding trained on the training text (Sennrich et al.
2016, arXiv:1508.07909) by the `tokenizers` library, in `tokenizer.json` of the data set. It encodes
any text and decodes it exactly.

**Model.** A decoder in the style of Llama (Touvron et al. 2023, arXiv:2302.13971): RMSNorm
before each half of a block (Zhang and Sennrich 2019, arXiv:1910.07467), rotary positions (Su et
al. 2021, arXiv:2104.09864), SwiGLU (Shazeer 2020, arXiv:2002.05202), no biases. The residual
branches and the head start at zero: the first loss is the logarithm of the vocabulary's size.

**Metrics.** `perplexity` is per token, so it can only be compared within one vocabulary.
`bits_per_byte` is per byte of the text, with a separator as one byte, and can be compared with any
model or compressor of the same text. Each window starts without context, so both are a little
worse than with a sliding window. Measured: `docs/answers.md`.

**Not shown:** that the model understands anything. Files that are similar but not equal, as in
every collection, may be in different splits.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from cluster.base.config import Spec
from trainers.workload import Batch
from trainers.workloads.language.text import Text

# Suffixes: B of the batch, T tokens, C channels, H heads, D channels of a head, V vocabulary.

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Language(Text):
    """Predicts each token of a window of `context` + 1 tokens from the tokens before it."""

    class Model(Spec):
        """The size of the network."""

        layers: PositiveInt = 4
        """Number of transformer blocks."""
        width: PositiveInt = 128
        """Channels of the residual stream."""
        heads: PositiveInt = 4
        """Attention heads; each has width / heads channels, an even number."""
        dropout: Fraction = 0.0
        """Dropout probability of what a block adds to the residual stream."""

        @model_validator(mode="after")
        def _even_heads(self) -> "Language.Model":
            if self.width % (2 * self.heads):
                raise ValueError("width must be a multiple of 2 * heads")
            return self

    data: Text.Data
    model: Model

    def build(self) -> nn.Module:
        return GPT(self.data.vocabulary, self.model)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, T, V] of each token except the first."""
        logits_BTV: Tensor = model(batch["tokens"][:, :-1])
        return logits_BTV

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy in nats per token."""
        target_BT = batch["tokens"][:, 1:].long()
        loss = F.cross_entropy(output.flatten(0, 1), target_BT.flatten(), reduction="none")
        return loss.view(target_BT.shape).mean(1)

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"bytes": batch["bytes"].float()}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        bits = means["loss"] * self.data.context / math.log(2)
        return {
            "loss": means["loss"],
            "perplexity": math.exp(means["loss"]),
            "bits_per_byte": bits / means["bytes"],
        }

    def example(self) -> Tensor:
        return torch.zeros(1, self.data.context, dtype=torch.int64)

    def tensor_plan(self, model: nn.Module) -> dict[str, Any]:
        """Splits heads and hidden channels of blocks; norms, embedding and head are replicated."""
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        into = ("attention.query", "attention.key", "attention.value", "mlp.gate", "mlp.up")
        out = ("attention.out", "mlp.down")
        return {
            **{f"blocks.*.{name}": ColwiseParallel() for name in into},
            **{f"blocks.*.{name}": RowwiseParallel() for name in out},
        }

    @property
    def tokens_per_sample(self) -> int:
        return self.data.context

    @property
    def evaluation_batch(self) -> int:
        """As many samples as have 2**25 logits, 128 MiB."""
        return min(512, max(1, (1 << 25) // (self.data.context * self.data.vocabulary)))


class GPT(nn.Module):
    """Logits [B, T, V] of the token after each of the tokens [B, T]."""

    def __init__(self, vocabulary: int, spec: Language.Model) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, spec.width)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = nn.RMSNorm(spec.width)
        self.head = nn.Linear(spec.width, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.embed(tokens_BT.long())
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV: Tensor = self.head(self.norm(x_BTC))
        return logits_BTV.to(self.embed.weight.dtype)  # autocast stops here: the loss is exact


class Block(nn.Module):
    """Attention and a gated MLP, each with a skip connection; initialised as the identity."""

    def __init__(self, spec: Language.Model) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(spec.width), nn.RMSNorm(spec.width)
        self.attention, self.mlp = Attention(spec.width, spec.heads), SwiGLU(spec.width)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.dropout(self.attention(self.attention_norm(x_BTC)))
        more_BTC: Tensor = self.dropout(self.mlp(self.mlp_norm(x_BTC)))
        return x_BTC + more_BTC


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query, self.key, self.value = (_scaled_linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_BTC: Tensor) -> Tensor:
        def split(y_BTC: Tensor) -> Tensor:  # with tensor parallelism, a worker has only some heads
            return y_BTC.view(*y_BTC.shape[:2], -1, self.head_width).transpose(1, 2)

        query_BHTD, key_BHTD = _apply_rotary(split(self.query(x_BTC)), split(self.key(x_BTC)))
        value_BHTD = split(self.value(x_BTC))
        y_BHTD = F.scaled_dot_product_attention(query_BHTD, key_BHTD, value_BHTD, is_causal=True)
        y_BTC: Tensor = self.out(y_BHTD.transpose(1, 2).flatten(2))
        return y_BTC


class SwiGLU(nn.Module):
    """Gated MLP with about 8/3 of the width as hidden channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 32 * math.ceil(8 * width / 3 / 32)
        self.gate, self.up = _scaled_linear(width, hidden), _scaled_linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC: Tensor = self.down(F.silu(self.gate(x_BTC)) * self.up(x_BTC))
        return y_BTC


def _scaled_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias whose outputs have about the variance of its inputs."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=inputs**-0.5)
    return linear


def _apply_rotary(*each_BHTD: Tensor) -> Iterator[Tensor]:
    """Rotary positions: rotates channel pairs, half apart, by 1 to 1e-4 radians per token."""
    length, width = each_BHTD[0].shape[-2:]
    device = each_BHTD[0].device
    rate_D = 1e4 ** (-2 * torch.arange(width // 2, device=device) / width)
    angle_TD = torch.arange(length, device=device)[:, None] * rate_D
    cos_TD, sin_TD = angle_TD.cos(), angle_TD.sin()
    for x_BHTD in each_BHTD:
        left, right = x_BHTD.chunk(2, dim=-1)
        turned = left * cos_TD - right * sin_TD, left * sin_TD + right * cos_TD
        yield torch.cat(turned, dim=-1).to(x_BHTD.dtype)
