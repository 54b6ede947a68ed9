"""Words, recurrent networks, attention."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from wild_models.base import CLASSES, WORDS, Wild


class Words(Wild):
    def forward(self, model, batch):
        return model(batch["t"])


class EmbeddingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8, padding_idx=0)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, t):
        return self.last(self.embedding(t).sum(1))


class Embedding(Words):
    """embedding with padding"""

    def build(self):
        return EmbeddingNet()


class BoundedEmbedding(Words):
    """embedding with max_norm, which changes its weights in forward"""

    def build(self):
        network = EmbeddingNet()
        network.embedding = nn.Embedding(WORDS, 8, max_norm=1.0)
        return network


class SparseEmbedding(Words):
    """sparse gradients"""

    optimizer = {"name": "sgd", "lr": 0.1, "weight_decay": 0.0}

    def build(self):
        network = EmbeddingNet()
        network.embedding = nn.Embedding(WORDS, 8, sparse=True)
        return network


class RecurrentNet(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.blocks = nn.ModuleList(layers)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, t):
        h = self.embedding(t)
        for block in self.blocks:
            h, _ = block(h)
        return self.last(h[:, -1])


class LSTM(Words):
    """LSTM"""

    def build(self):
        return RecurrentNet(nn.LSTM(8, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True))


class GRU(Words):
    """GRU of two layers, bidirectional"""

    def build(self):
        return RecurrentNet(nn.GRU(8, 4, num_layers=2, bidirectional=True, batch_first=True))


class DroppingLSTM(Words):
    """LSTM with its own dropout"""

    def build(self):
        return RecurrentNet(nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True))


class CellNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(WORDS, 8), nn.GRUCell(8, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, t):
        words = self.embedding(t)
        h = torch.zeros_like(words[:, 0])
        for step in range(t.shape[1]):
            h = self.cell(words[:, step], h)
        return self.last(h)


class Cell(Words):
    """a recurrent cell in a loop"""

    def build(self):
        return CellNet()


class PackedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, t, length):
        packed = pack_padded_sequence(
            self.embedding(t), length.cpu(), batch_first=True, enforce_sorted=False
        )
        output, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.last(output.sum(1) / length[:, None])


class Packed(Wild):
    """packed sequences of several lengths"""

    def build(self):
        return PackedNet()

    def forward(self, model, batch):
        return model(batch["t"], batch["length"])


class Masked(Words):
    """a mean over the words of each sample, masked"""

    def build(self):
        return nn.Sequential(nn.Embedding(WORDS, 8), nn.Tanh(), nn.Linear(8, WORDS))

    def forward(self, model, batch):
        return model(batch["t"][:, :-1])

    def loss(self, output, batch):
        after = batch["t"][:, 1:]
        each = F.cross_entropy(output.flatten(0, 1), after.flatten(), reduction="none")
        mask = torch.arange(after.shape[1])[None] < batch["length"][:, None]
        return (each.view_as(after) * mask).sum(1) / batch["length"]

    def metrics(self, output, batch):
        return {"length": batch["length"].double()}


class TrimmedBatch(Words):
    """batches cut to their longest sample"""

    def build(self):
        return RecurrentNet(nn.GRU(8, 8, batch_first=True))

    def forward(self, model, batch):
        return model(batch["t"][:, : int(batch["length"].max())].contiguous())

    def loss(self, output, batch):
        return super().loss(output, batch) + 0.01 * batch["length"].max()


class AttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.project, self.back = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(16, 16).tril().bool(), persistent=False)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.project(self.norm(x)).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mask = self.mask[:length, :length]
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.back(h.transpose(1, 2).reshape(batch, length, 8))


class AttentionNet(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.place = nn.Parameter(0.1 * torch.randn(1, 16, 8))
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, t):
        h = self.embedding(t) + self.place[:, : t.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.last(h.mean(1))


class Attention(Words):
    """causal attention in blocks"""

    def build(self):
        return AttentionNet([AttentionBlock(), AttentionBlock()])


class Encoder(Words):
    """nn.TransformerEncoderLayer"""

    def build(self):
        return AttentionNet(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)
        )


class DroppingEncoder(Words):
    """nn.TransformerEncoder with dropout, also in its attention"""

    def build(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        return AttentionNet([nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)])


class PaddedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, t):
        h = self.embedding(t)
        h, _ = self.attention(h, h, h, key_padding_mask=t == 0, need_weights=False)
        return self.last(h.masked_fill((t == 0)[..., None], 0.0).sum(1))


class Padded(Words):
    """nn.MultiheadAttention with a padding mask"""

    def build(self):
        return PaddedNet()
