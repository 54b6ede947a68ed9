"""The folding network: a trunk over residues and their pairs, and a structure module."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.workload import model_dtype
from trainers.workloads.folding.folds import ANGLE_AT_CA, CA_C, N_CA
from trainers.workloads.folding.geometry import quaternion_to_rotation
from trainers.workloads.folding.structures import AMINO_ACIDS

# Suffixes: B samples, I and J residues, F features, S channels of a residue, P of a pair, H heads,
# N points of a head, X coordinates in Å, K bins of distance, R iterations, A atoms. Rotations are
# [B, I, X, X] and have none.

DISTANCE_BINS = 24
FIRST_EDGE, LAST_EDGE = 4.0, 22.0
"""The end of the first distance bin and the start of the last one, in Å."""
MAX_RELATIVE_POSITION = 32
"""Larger distances along the chain share one embedding."""
NANOMETRE = 10.0
"""In Å: the unit in which positions are of order one."""

Frames = tuple[Tensor, Tensor]
"""Rotations [B, I, X, X], whose columns are a residue's axes, and positions [B, I, X] of its CA."""


class FoldingOutput(NamedTuple):
    """The network's output for training."""

    distance_BIJK: Tensor
    """Logits of the distance bins of alpha carbons."""
    rotation: Tensor
    """[B, R, I, X, X], after each iteration."""
    place_BRIX: Tensor


class Network(nn.Module):
    """Backbones [B, I, A, X] from features [B, I, F]; with `whole`, a `FoldingOutput`."""

    def __init__(self, blocks: int, width: int, triangles: bool, iterations: int) -> None:
        """The arguments are the fields of `Folding.Model`."""
        super().__init__()
        single, pair = 2 * width, width
        self.residue = nn.Linear(len(AMINO_ACIDS), single)
        self.sides = nn.Linear(len(AMINO_ACIDS), 2 * pair)
        self.score = nn.Linear(1, pair)
        self.place = nn.Embedding(2 * MAX_RELATIVE_POSITION + 1, pair)
        self.blocks = nn.ModuleList(Block(single, pair, triangles) for _ in range(blocks))
        self.distance = nn.Sequential(nn.LayerNorm(pair), nn.Linear(pair, DISTANCE_BINS))
        self.single_norm, self.pair_norm = nn.LayerNorm(single), nn.LayerNorm(pair)
        self.structure = StructureLayer(single, pair)
        self.iterations = iterations

    def forward(self, feature_BIF: Tensor, whole: bool = False) -> Tensor | FoldingOutput:
        dtype, kinds = model_dtype(self), len(AMINO_ACIDS)
        kind_BIF, score_BIJ = feature_BIF[..., :kinds], feature_BIF[..., kinds:]
        left_BIP, right_BJP = self.sides(kind_BIF).chunk(2, -1)
        apart_IJ = (
            relative_positions(feature_BIF.shape[1], feature_BIF.device).clamp(
                -MAX_RELATIVE_POSITION, MAX_RELATIVE_POSITION
            )
            + MAX_RELATIVE_POSITION
        )
        pair_BIJP = left_BIP[:, :, None] + right_BJP[:, None] + self.place(apart_IJ)
        pair_BIJP = pair_BIJP + self.score(score_BIJ[..., None])
        single_BIS = self.residue(kind_BIF)
        for block in self.blocks:
            single_BIS, pair_BIJP = block(single_BIS, pair_BIJP)
        logit_BIJK = self.distance(pair_BIJP + pair_BIJP.transpose(1, 2)).to(dtype)
        with torch.autocast(
            feature_BIF.device.type, enabled=False
        ):  # positions need full precision
            single_BIS = self.single_norm(single_BIS.to(dtype))
            pair_BIJP = self.pair_norm(pair_BIJP.to(dtype))
            frames, steps = initial_frames(logit_BIJK.detach()), []
            for _ in range(self.iterations):
                single_BIS, frames = self.structure(single_BIS, pair_BIJP, frames)
                steps.append(frames)
                frames = frames[0].detach(), frames[1]  # as AlphaFold does, for stability
        if not whole:
            return ideal_backbone(steps[-1])
        return FoldingOutput(
            logit_BIJK, *(torch.stack(each, 1) for each in zip(*steps, strict=True))
        )


def bin_edges(like: Tensor) -> Tensor:
    """The edges between the distance bins [K - 1]."""
    return torch.linspace(
        FIRST_EDGE, LAST_EDGE, DISTANCE_BINS - 1, dtype=like.dtype, device=like.device
    )


def relative_positions(length: int, device: torch.device) -> Tensor:
    """The position of residue j relative to residue i in the chain [I, J]."""
    place_I = torch.arange(length, device=device)
    return place_I - place_I[:, None]


def rotations_from_vectors(along: Tensor, beside: Tensor) -> Tensor:
    """Rotations [..., X, X]: x along one vector [..., X], y towards another (Gram-Schmidt)."""
    x = F.normalize(along, dim=-1)
    y = F.normalize(beside - x * (x * beside).sum(-1, keepdim=True), dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], -1)


def initial_frames(logit_BIJK: Tensor) -> Frames:
    """Frames along a chain of alpha carbons, from the expected distances.

    Positions are the classical multidimensional scaling (Torgerson 1952, doi:10.1007/BF02288916) of
    the distances, mirrored if the chain turns to the left on average: helices are right-handed.
    """
    width = (LAST_EDGE - FIRST_EDGE) / (DISTANCE_BINS - 2)
    middle_K = bin_edges(logit_BIJK) - width / 2
    middle_K = torch.cat([middle_K, middle_K[-1:] + width])
    expected_BIJ = (logit_BIJK.softmax(-1) * middle_K).sum(-1)
    eye = torch.eye(logit_BIJK.shape[1], dtype=middle_K.dtype, device=middle_K.device)
    place_BIX = multidimensional_scaling(expected_BIJ * (1 - eye))
    step_BIX = place_BIX.diff(dim=1)
    turn_BIX = torch.linalg.cross(step_BIX[:, :-2], step_BIX[:, 1:-1])
    hand_B = (turn_BIX * step_BIX[:, 2:]).sum((1, 2))
    sign_B = torch.where(hand_B < 0, -1.0, 1.0).to(place_BIX.dtype)
    place_BIX = place_BIX * sign_B[:, None, None]
    step_BIX = step_BIX * sign_B[:, None, None]
    before_BIX, after_BIX = step_BIX[:, :-1], step_BIX[:, 1:]
    inner = rotations_from_vectors(after_BIX + before_BIX, before_BIX - after_BIX)
    return torch.cat([inner[:, :1], inner, inner[:, -1:]], 1), place_BIX


def multidimensional_scaling(distance_BIJ: Tensor) -> Tensor:
    """Positions [B, I, X] with about these distances, in either mirror image."""
    square_BIJ = distance_BIJ.square()
    across_B1J, down_BI1 = square_BIJ.mean(1, keepdim=True), square_BIJ.mean(2, keepdim=True)
    product_BIJ = (across_B1J + down_BI1 - square_BIJ - square_BIJ.mean((1, 2), keepdim=True)) / 2
    size_BX, axis_BIX = (each[..., -3:] for each in torch.linalg.eigh(product_BIJ))
    place_BIX: Tensor = axis_BIX * size_BX.clamp(min=1e-3).sqrt()[:, None]
    return place_BIX


def ideal_backbone(frames: Frames) -> Tensor:
    """N, CA and C [B, I, A, X] of the residues with these frames, with ideal geometry."""
    rotation, place_BIX = frames
    x, y = rotation[..., 0], rotation[..., 1]
    nitrogen_BIX = place_BIX + N_CA * (math.cos(ANGLE_AT_CA) * x + math.sin(ANGLE_AT_CA) * y)
    return torch.stack([nitrogen_BIX, place_BIX, place_BIX + CA_C * x], 2)


class Block(nn.Module):
    """Updates residues by attention biased by pairs, and pairs by residues and triangles."""

    def __init__(self, single: int, pair: int, triangles: bool) -> None:
        super().__init__()
        self.attention = PairAttention(single, pair)
        self.single_mlp, self.pair_mlp = _mlp(single), _mlp(pair)
        self.outer_norm = nn.LayerNorm(single)
        self.outer_in, self.outer_out = nn.Linear(single, pair), nn.Linear(pair // 2, pair)
        kinds = (True, False) if triangles else ()
        self.triangles = nn.ModuleList(TriangleUpdate(pair, outgoing) for outgoing in kinds)

    def forward(self, single_BIS: Tensor, pair_BIJP: Tensor) -> tuple[Tensor, Tensor]:
        single_BIS = single_BIS + self.attention(single_BIS, pair_BIJP)
        single_BIS = single_BIS + self.single_mlp(single_BIS)
        left_BIP, right_BJP = self.outer_in(self.outer_norm(single_BIS)).chunk(2, -1)
        pair_BIJP = pair_BIJP + self.outer_out(left_BIP[:, :, None] * right_BJP[:, None])
        for triangle in self.triangles:
            pair_BIJP = pair_BIJP + triangle(pair_BIJP)
        return single_BIS, pair_BIJP + self.pair_mlp(pair_BIJP)


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )


class PairAttention(nn.Module):
    """Attention over residues, with a bias for each pair."""

    def __init__(self, single: int, pair: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(single)
        self.query_key_value = nn.Linear(single, 3 * single, bias=False)
        self.bias, self.out = nn.Linear(pair, heads, bias=False), nn.Linear(single, single)

    def forward(self, single_BIS: Tensor, pair_BIJP: Tensor) -> Tensor:
        parts = self.query_key_value(self.norm(single_BIS)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        logit_BHIJ = query @ key.mT / math.sqrt(query.shape[-1])
        weight_BHIJ = (logit_BHIJ + self.bias(pair_BIJP).permute(0, 3, 1, 2)).softmax(-1)
        update_BIS: Tensor = self.out((weight_BHIJ @ value).transpose(1, 2).flatten(2))
        return update_BIS


class TriangleUpdate(nn.Module):
    """Updates pair (i, j) by products of pairs (i, k) and (j, k), or (k, i) and (k, j)."""

    def __init__(self, pair: int, outgoing: bool) -> None:
        super().__init__()
        self.outgoing, self.norm = outgoing, nn.LayerNorm(pair)
        self.edges, self.gates = nn.Linear(pair, 2 * pair), nn.Linear(pair, 3 * pair)
        self.product_norm, self.out = nn.LayerNorm(pair), nn.Linear(pair, pair)
        nn.init.zeros_(self.out.weight)

    def forward(self, pair_BIJP: Tensor) -> Tensor:
        pair_BIJP = self.norm(pair_BIJP)
        gate_BIJP, *gates = self.gates(pair_BIJP).sigmoid().chunk(3, -1)
        sides = self.edges(pair_BIJP).chunk(2, -1)
        one_BPIK, other_BPJK = (
            (side * gate).permute(0, 3, 1, 2) for side, gate in zip(sides, gates, strict=True)
        )
        if not self.outgoing:
            one_BPIK, other_BPJK = one_BPIK.mT, other_BPJK.mT
        product_BIJP = (one_BPIK @ other_BPJK.mT).permute(0, 2, 3, 1)
        update_BIJP: Tensor = gate_BIJP * self.out(self.product_norm(product_BIJP))
        return update_BIJP


class StructureLayer(nn.Module):
    """Moves the residues' frames; equivariant to rotations and translations."""

    def __init__(self, single: int, pair: int) -> None:
        super().__init__()
        self.attention = InvariantPointAttention(single, pair)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(single), nn.LayerNorm(single)
        self.mlp = nn.Sequential(nn.Linear(single, single), nn.ReLU(), nn.Linear(single, single))
        self.move = nn.Linear(single, 6)
        nn.init.zeros_(self.move.weight)
        nn.init.zeros_(self.move.bias)

    def forward(
        self, single_BIS: Tensor, pair_BIJP: Tensor, frames: Frames
    ) -> tuple[Tensor, Frames]:
        update_BIS = self.attention(single_BIS, pair_BIJP, frames)
        single_BIS = self.attention_norm(single_BIS + update_BIS)
        single_BIS = self.mlp_norm(single_BIS + self.mlp(single_BIS))
        turn_BIX, step_BIX = self.move(single_BIS).chunk(2, -1)
        rotation, place_BIX = frames
        real_BI1 = torch.ones_like(turn_BIX[..., :1])
        turn = quaternion_to_rotation(F.normalize(torch.cat([real_BI1, turn_BIX], -1), dim=-1))
        step_BIX = NANOMETRE * (rotation @ step_BIX[..., None]).squeeze(-1)
        return single_BIS, (rotation @ turn, place_BIX + step_BIX)


class InvariantPointAttention(nn.Module):
    """Invariant point attention: weights also depend on distances between the residues' points."""

    def __init__(
        self, single: int, pair: int, heads: int = 4, query_points: int = 4, value_points: int = 6
    ) -> None:
        super().__init__()
        self.heads, self.query_points, self.value_points, head = (
            heads,
            query_points,
            value_points,
            single // (2 * heads),
        )
        self.query_key_value = nn.Linear(single, 3 * heads * head, bias=False)
        self.points = nn.Linear(single, 3 * heads * (2 * query_points + value_points))
        self.bias = nn.Linear(pair, heads, bias=False)
        self.nearness = nn.Parameter(torch.full((heads,), math.log(math.e - 1)))
        self.out = nn.Linear(heads * (head + 4 * value_points + pair), single)

    def forward(self, single_BIS: Tensor, pair_BIJP: Tensor, frames: Frames) -> Tensor:
        rotation, place_BIX = frames[0], frames[1] / NANOMETRE
        place_BIX = place_BIX - place_BIX.mean(
            1, keepdim=True
        )  # it cancels, and smaller numbers are more exact
        parts = self.query_key_value(single_BIS).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        local_points = self.points(single_BIS).unflatten(-1, (-1, 3))
        points = (local_points @ rotation.mT + place_BIX[:, :, None]).unflatten(2, (self.heads, -1))
        query_points, key_points, value_BJHNX = points.split(
            (self.query_points, self.query_points, self.value_points), 3
        )
        query_BHIF, key_BHJF = (
            each.flatten(3).transpose(1, 2) for each in (query_points, key_points)
        )
        near_BHIJ = query_BHIF.square().sum(-1, keepdim=True) - 2 * query_BHIF @ key_BHJF.mT
        near_BHIJ = near_BHIJ + key_BHJF.square().sum(-1)[:, :, None]
        weight_H11 = F.softplus(self.nearness)[:, None, None] / math.sqrt(18 * self.query_points)
        logit_BHIJ = query @ key.mT / math.sqrt(query.shape[-1]) - weight_H11 * near_BHIJ
        logit_BHIJ = logit_BHIJ + self.bias(pair_BIJP).permute(0, 3, 1, 2)
        weight_BHIJ = (logit_BHIJ / math.sqrt(3)).softmax(-1)
        point_BHIF = weight_BHIJ @ value_BJHNX.flatten(3).transpose(1, 2)
        point_BIHNX = point_BHIF.transpose(1, 2).unflatten(-1, (self.value_points, 3))
        local_BIFX = (point_BIHNX.flatten(2, 3) - place_BIX[:, :, None]) @ rotation
        pairs_BIHP = weight_BHIJ.transpose(1, 2) @ pair_BIJP
        found = [
            (weight_BHIJ @ value).transpose(1, 2).flatten(2),
            local_BIFX.flatten(2),
            (local_BIFX.square().sum(-1) + 1e-6).sqrt(),
            pairs_BIHP.flatten(2),
        ]
        update_BIS: Tensor = self.out(torch.cat(found, -1))
        return update_BIS
