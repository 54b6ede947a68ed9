"""Protein folding: a backbone from a sequence and noisy contact scores of residue pairs.

**Data.** `generated` are chains with ideal bonds and angles (Engh and Huber 1991) of helices,
strands and loops. Their loops' torsions are optimised until a chain is as compact as a globular
protein, without clashes. Sequences are drawn to suit the structure: by hydropathy, and by the usual
frequencies in helices, strands and turns. Each pair of residues 3 or more apart has a score, as an
analysis of co-evolution would yield: noise of standard deviation 1, plus `signal` if the beta
carbons are within 8 Å. Training samples get new noise each time, the others always the same. Your
own data: PDB and mmCIF files, whose chains are cut into windows and get such scores from their own
contacts. A hash of a chain's sequence puts it into `train`, `val` or `test`.

**Model.** AlphaFold 2 (Jumper et al. 2021, doi:10.1038/s41586-021-03819-2), but far smaller and
without alignments, templates, recycling and side chains. A trunk keeps a vector for each residue
and each pair: attention biased by pairs; pairs updated by outer products and by multiplication
around triangles (`triangles: false` leaves these out, for comparison). It predicts distances of
alpha carbons. The initial structure is their multidimensional scaling, in the mirror image with
right-handed helices; starting from one point for all residues takes much more training. Then
invariant point attention, the same layer `iterations` times, moves the residues' frames. The loss
is the frame aligned point error (FAPE) of alpha carbons after each iteration, plus the
cross-entropy of the distances.

**Metrics.** For alpha carbons, in [0, 1]: `lddt_ca`, which needs no superposition; `tm_score`,
normalised to the window; `gdt_ts`. Measured: `docs/answers.md`, in comparison with the same model
without triangles, shuffled scores and distance geometry.

**Not shown:** folding from a sequence alone, about which this data says little; side chains; chains
longer than a window. Generated folds have no hydrogen-bonded sheets, and the errors of real
co-evolution data are more systematic than noise. Similar chains of files may be in different
splits.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cluster.base.config import Spec
from trainers.counter_rng import SampleRandom
from trainers.workload import Batch
from trainers.workloads.folding.geometry import pairwise_distances
from trainers.workloads.folding.metrics import lddt, tm_score_and_gdt_ts
from trainers.workloads.folding.network import (
    NANOMETRE,
    FoldingOutput,
    Frames,
    Network,
    bin_edges,
    relative_positions,
    rotations_from_vectors,
)
from trainers.workloads.folding.proteins import MIN_SEPARATION, Proteins
from trainers.workloads.folding.structures import AMINO_ACIDS

# Suffixes: B samples, I and J residues, F features, X coordinates in Å, R iterations. Rotations are
# [B, I, X, X] and have none.

CLAMP_DISTANCE, SLOPE_BEYOND_CLAMP = 10.0, 0.1
"""FAPE grows with this smaller slope beyond this distance in Å: far residues get a gradient, but do
not outweigh near ones."""
PositiveInt = Annotated[int, Field(gt=0)]


class Folding(Proteins):
    """Predicts the backbones of windows of proteins."""

    class Model(Spec):
        """The size of the network."""

        blocks: PositiveInt = 2
        """Blocks of the trunk."""
        width: Annotated[int, Field(ge=8, multiple_of=4)] = 32
        """Channels of a residue pair; a residue has twice as many."""
        triangles: bool = True
        """Update pairs around triangles; without, information between pairs passes only through
        residues."""
        iterations: PositiveInt = 4
        """Iterations of the structure layer."""

    data: Proteins.Data
    model: Model

    def build(self) -> nn.Module:
        fields = self.model
        return Network(fields.blocks, fields.width, fields.triangles, fields.iterations)

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        """Scores with new noise, drawn for the upper triangle and mirrored."""
        length = batch["residue"].shape[1]
        noise_BIJ = random.normal(length, length).to(batch["score"].dtype)
        noise_BIJ = torch.where(
            relative_positions(length, noise_BIJ.device) >= MIN_SEPARATION, noise_BIJ, 0
        )
        contact_BIJ = batch["contact"].to(noise_BIJ.dtype)
        score_BIJ = self.data.signal * contact_BIJ + noise_BIJ + noise_BIJ.mT
        return {**batch, "score": score_BIJ}

    def forward(self, model: nn.Module, batch: Batch) -> FoldingOutput:
        """Distance logits, and the structure after each iteration."""
        folded: FoldingOutput = model(input_features(batch["residue"], batch["score"]), whole=True)
        return folded

    def loss(self, output: FoldingOutput, batch: Batch) -> Tensor:
        """FAPE of the last iteration + 0.5 x mean FAPE + 0.3 x cross-entropy of the distances."""
        with torch.autocast(batch["backbone"].device.type, enabled=False):
            nitrogen_BIX, alpha_BIX, carbon_BIX = batch["backbone"].unbind(2)
            frames = (
                rotations_from_vectors(carbon_BIX - alpha_BIX, nitrogen_BIX - alpha_BIX),
                alpha_BIX,
            )
            true_BIJX = in_local_frames(frames, alpha_BIX)
            steps = zip(output.rotation.unbind(1), output.place_BRIX.unbind(1), strict=True)
            error_RB = torch.stack([fape(found, true_BIJX) for found in steps])
            bin_BIJ = (pairwise_distances(alpha_BIX)[..., None] > bin_edges(alpha_BIX)).sum(-1)
            logit_BKIJ = output.distance_BIJK.permute(0, 3, 1, 2)
            entropy_BIJ = F.cross_entropy(logit_BKIJ, bin_BIJ, reduction="none")
            return error_RB[-1] + error_RB.mean(0) / 2 + 0.3 * entropy_BIJ.mean((1, 2))

    def metrics(self, output: FoldingOutput, batch: Batch) -> dict[str, Tensor]:
        found_BIX, true_BIX = output.place_BRIX[:, -1], batch["backbone"][:, :, 1]
        tm_B, gdt_B = tm_score_and_gdt_ts(found_BIX, true_BIX)
        return {"lddt_ca": lddt(found_BIX, true_BIX), "tm_score": tm_B, "gdt_ts": gdt_B}

    def example(self) -> Tensor:
        length = self.data.length
        return input_features(
            torch.zeros(1, length, dtype=torch.uint8), torch.zeros(1, length, length)
        )

    @property
    def evaluation_batch(self) -> int:
        """As many samples as have 2**24 pair channels in the widest layer, 64 MiB."""
        return min(512, max(1, (1 << 24) // (4 * self.model.width * self.data.length**2)))


def input_features(residue_BI: Tensor, score_BIJ: Tensor) -> Tensor:
    """The network's input [B, I, F]: one-hot amino acids, and the scores with all residues."""
    kinds = torch.arange(len(AMINO_ACIDS), device=residue_BI.device)
    one_hot_BIF = (residue_BI[..., None] == kinds).to(score_BIJ.dtype)
    return torch.cat([one_hot_BIF, score_BIJ], -1)


def in_local_frames(frames: Frames, place_BJX: Tensor) -> Tensor:
    """Positions in each residue's local frame [B, I, J, X]."""
    rotation, origin_BIX = frames
    return (place_BJX[:, None] - origin_BIX[:, :, None]) @ rotation


def fape(found: Frames, true_BIJX: Tensor) -> Tensor:
    """Frame aligned point error [B] of the alpha carbons, in units of 10 Å.

    `true_BIJX` are the true positions in each residue's true frame.
    """
    off_BIJX = in_local_frames(found, found[1]) - true_BIJX
    off_BIJ = (off_BIJX.square().sum(-1) + 1e-4).sqrt()
    clamped_BIJ = torch.minimum(
        off_BIJ, CLAMP_DISTANCE + SLOPE_BEYOND_CLAMP * (off_BIJ - CLAMP_DISTANCE)
    )
    return clamped_BIJ.mean((1, 2)) / NANOMETRE
