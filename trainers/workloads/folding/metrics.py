"""The field's measures of how well a predicted structure matches the true one."""

import torch
from torch import Tensor

from trainers.workloads.folding.geometry import best_rotation, pairwise_distances

# Suffixes: B samples, L residues, X coordinates in Å, S superpositions.

SUPERPOSITION_STEPS = 8
"""Iterations that improve a superposition."""


def lddt(found_BLX: Tensor, true_BLX: Tensor) -> Tensor:
    """Local distance difference test of the atoms [B], in [0, 1]; needs no superposition.

    The share of true distances below 15 Å that are reproduced within 0.5, 1, 2 and 4 Å, averaged
    (Mariani et al. 2013, doi:10.1093/bioinformatics/btt473).
    """
    found_BLL, true_BLL = pairwise_distances(found_BLX), pairwise_distances(true_BLX)
    itself_LL = torch.eye(true_BLX.shape[1], dtype=torch.bool, device=true_BLX.device)
    counts_BLL = (true_BLL < 15) & ~itself_LL
    off_BLL = (found_BLL - true_BLL).abs()
    kept_BLL = torch.stack([off_BLL < within for within in (0.5, 1, 2, 4)]).to(off_BLL.dtype)
    return (kept_BLL.mean(0) * counts_BLL).sum((1, 2)) / counts_BLL.sum((1, 2)).clamp(min=1)


def tm_score_and_gdt_ts(found_BLX: Tensor, true_BLX: Tensor) -> tuple[Tensor, Tensor]:
    """TM-score and GDT_TS of the atoms, [B] each, in [0, 1].

    Both are defined as the maximum over all superpositions. The search starts from superpositions
    of the whole chain and of parts of it, and weights each residue by the slope of its term in the
    TM-score, which never makes that score worse. TM-score: Zhang and Skolnick 2004
    (doi:10.1002/prot.20264); GDT_TS: the shares of residues within 1, 2, 4 and 8 Å (Zemla 2003,
    doi:10.1093/nar/gkg571).
    """
    scale = tm_scale(true_BLX.shape[1])
    weight_SBL = _initial_weights(true_BLX)
    off_SBL, tm, within = weight_SBL, [], []
    for _ in range(SUPERPOSITION_STEPS):
        off_SBL = _distances_after_fit(weight_SBL, found_BLX, true_BLX)
        term_SBL = 1 / (1 + (off_SBL / scale).square())
        weight_SBL = term_SBL.square()
        tm.append(term_SBL.mean(2).amax(0))
        near = torch.stack([off_SBL < cutoff for cutoff in (1, 2, 4, 8)])
        within.append(near.to(off_SBL.dtype).mean(3).amax(1))
    return torch.stack(tm).amax(0), torch.stack(within).amax(0).mean(0)


def tm_scale(length: int) -> float:
    """The distance in Å at which a residue counts half in a TM-score normalised to `length`."""
    return float(1.24 * (length - 15) ** (1 / 3) - 1.8) if length > 21 else 0.5


def _initial_weights(like_BLX: Tensor) -> Tensor:
    """Weights [S, B, L] of the whole chain, its halves and its quarters, which overlap by half."""
    samples, length, _ = like_BLX.shape
    sizes = sorted({max(4, length // parts) for parts in (1, 2, 4)})
    starts = [(at, size) for size in sizes for at in range(0, length - size + 1, size // 2)]
    place_L = torch.arange(length, device=like_BLX.device)
    weight_SL = torch.stack([(place_L >= at) & (place_L < at + size) for at, size in starts])
    return weight_SL.to(like_BLX.dtype)[:, None].expand(-1, samples, -1)


def _distances_after_fit(weight_SBL: Tensor, found_BLX: Tensor, true_BLX: Tensor) -> Tensor:
    """Distances [S, B, L] after the weighted least-squares superposition."""
    share_SBL1 = (weight_SBL / weight_SBL.sum(2, keepdim=True))[..., None]
    found_SBLX = found_BLX - (share_SBL1 * found_BLX).sum(2, keepdim=True)
    true_SBLX = true_BLX - (share_SBL1 * true_BLX).sum(2, keepdim=True)
    products = (share_SBL1 * found_SBLX)[..., None] * true_SBLX[..., None, :]
    rotation = best_rotation(products.sum(2))
    turned_SBLX = (rotation[:, :, None] * found_SBLX[..., None, :]).sum(-1)
    return ((turned_SBLX - true_SBLX).square().sum(-1) + 1e-12).sqrt()
