"""`folding` with and without triangles, compared with chance and with distance geometry."""

import tempfile
import time
from pathlib import Path

import numpy as np
import tmtools
import torch
from answers import shipped_spec, table
from scipy.sparse.csgraph import shortest_path
from torch import Tensor, nn

from cluster.base.config import apply_overrides
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.state import load_model_weights
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_splits
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.run_folder import CHECKPOINTS
from trainers.spec import RunSpec, resolve
from trainers.workload import Batch
from trainers.workloads.folding.geometry import pairwise_distances
from trainers.workloads.folding.metrics import lddt, tm_score_and_gdt_ts
from trainers.workloads.folding.network import (
    DISTANCE_BINS,
    bin_edges,
    initial_frames,
    multidimensional_scaling,
)
from trainers.workloads.folding.proteins import sample_columns
from trainers.workloads.folding.structures import (
    UNKNOWN_INDEX,
    chain_segments,
    structure_files,
    windows,
)
from trainers.workloads.folding.workload import Folding

FOLDER = Path(tempfile.gettempdir()) / "heliostat-answers"
NEXT, NEXT_BUT_ONE, TOUCHING = 3.8, 5.8, 6.5
"""Distances in Å of alpha carbons: one and two places apart in a chain, and in contact."""


def answer() -> str:
    FOLDER.mkdir(exist_ok=True)
    with_triangles, without = trained(True), trained(False)
    workload, network, _ = with_triangles
    test = open_splits(prepare_dataset(workload, FOLDER))["test"]
    true = test["backbone"][:, :, 1]
    likely, contact = best_scores(test["score"].float()), test["contact"] > 0
    random = torch.Generator().manual_seed(0)
    rows = [
        row("another held-out fold", rated(true.roll(1, 0), true)),
        row(
            "`folding` as shipped, scores shuffled",
            found(workload, network, shuffled(test, random)),
        ),
        row("distance geometry of the best L scores", better(geometry(likely), true)),
        trained_row("`folding` without triangles", *without, test),
        trained_row("`folding` as shipped", *with_triangles, test),
        row("distance geometry of all true contacts", better(geometry(contact), true)),
        row("scaling of the true distances in bins", rated(binned(true), true)),
    ]
    real, count = real_windows(workload)
    rows += [
        row("2GTL and 7OK9: `folding` as shipped", found(workload, network, real)),
        row(
            "2GTL and 7OK9: its scores shuffled",
            found(workload, network, shuffled(real, random)),
        ),
    ]
    return "\n\n".join(
        [
            f"{len(true):,} held-out folds of {workload.data.length} residues, predicted from "
            "sequences and contact scores that are as noisy as in training: a contact raises the "
            f"score by {workload.data.signal:g} standard deviations of the noise. Distance "
            "geometry takes the shortest paths along the chain and over contacts as distances, "
            "scales them to three dimensions, and takes the better of the structure and its mirror "
            "image. The true contacts have no noise. The true distances are the most that the "
            "network could know before it moves anything.",
            table([("", "lDDT-C\N{GREEK SMALL LETTER ALPHA}", "TM-score", "GDT_TS"), *rows]),
            f"The last two rows are {len(real['residue'])} windows of {count} chains of the real "
            "structures 2GTL and 7OK9, with scores simulated from their contacts. The network was "
            "trained on generated folds only.",
        ]
    )


def trained(triangles: bool) -> tuple[Folding, nn.Module, float]:
    """Train with the ordinary loop; returns the workload, its network, and the seconds."""
    data = apply_overrides(shipped_spec("folding"), [f"model.triangles={triangles}".lower()])
    spec, workload = resolve(data, RunSpec)
    assert isinstance(workload, Folding)
    dataset, folder = prepare_dataset(workload, FOLDER), Path(tempfile.mkdtemp(dir=FOLDER))
    began = time.monotonic()
    train(spec, workload, dataset, folder, NullReporter())
    seconds = time.monotonic() - began
    checkpoint = Checkpoints(folder / CHECKPOINTS, spec.checkpoint).latest()
    assert checkpoint is not None
    network = workload.build()
    load_model_weights(checkpoint, network)
    return workload, network.eval(), seconds


def found(workload: Folding, network: nn.Module, split: Batch) -> list[float]:
    """lDDT, TM-score and GDT_TS of the network's predictions for a split."""
    batch = {name: v.float() if v.is_floating_point() else v for name, v in split.items()}
    with torch.inference_mode():
        places = [
            workload.forward(network, {"residue": residue, "score": score}).place_BRIX[:, -1]
            for residue, score in zip(
                batch["residue"].split(64), batch["score"].split(64), strict=True
            )
        ]
    return rated(torch.cat(places), batch["backbone"][:, :, 1])


def rated(places: Tensor, true: Tensor) -> list[float]:
    return [
        lddt(places, true).mean().item(),
        *(s.mean().item() for s in tm_score_and_gdt_ts(places, true)),
    ]


def better(places: Tensor, true: Tensor) -> list[float]:
    """The scores of each structure or its mirror image, whichever is better."""
    tm, gdt = (
        torch.stack(each).amax(0).mean().item()
        for each in zip(
            *(tm_score_and_gdt_ts(hand, true) for hand in (places, -places)), strict=True
        )
    )
    return [lddt(places, true).mean().item(), tm, gdt]


def row(name: str, found: list[float]) -> list[str]:
    return [name, *(f"{each:.3f}" for each in found)]


def trained_row(
    name: str, workload: Folding, network: nn.Module, seconds: float, test: Batch
) -> list[str]:
    weights = sum(weight.numel() for weight in network.parameters())
    return row(f"{name}: {weights:,} weights, {seconds:.0f} s", found(workload, network, test))


def shuffled(split: Batch, random: torch.Generator) -> Batch:
    """The split with the residues of each sample's scores in random order."""
    order = torch.rand(split["residue"].shape, generator=random).argsort(1)
    each = torch.arange(len(order))[:, None, None]
    return {**split, "score": split["score"][each, order[:, :, None], order[:, None]]}


def best_scores(score: Tensor) -> Tensor:
    """The L best-scored pairs that are 6 or more residues apart, as contacts [B, L, L]."""
    length = score.shape[1]
    far = torch.ones(length, length).triu(6) > 0
    lowest = score.masked_fill(~far, -torch.inf).flatten(1).topk(length).values[:, -1]
    best = (score >= lowest[:, None, None]) & far
    return best | best.mT


def geometry(contact: Tensor) -> Tensor:
    """Coordinates [B, L, 3] with distances near the shortest paths over contacts [B, L, L]."""
    length = contact.shape[1]
    apart = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    along = np.where(apart == 1, NEXT, np.where(apart == 2, NEXT_BUT_ONE, 0.0))
    ways = [
        shortest_path(np.where((along == 0) & each, TOUCHING, along)) for each in contact.numpy()
    ]
    return multidimensional_scaling(torch.from_numpy(np.stack(ways)).float())


def binned(true: Tensor) -> Tensor:
    """Coordinates from the true distances, to the precision of the network's bins."""
    bins = (pairwise_distances(true)[..., None] > bin_edges(true)).sum(-1)
    return initial_frames(1e4 * torch.nn.functional.one_hot(bins, DISTANCE_BINS).float())[1]


def real_windows(workload: Folding) -> tuple[Batch, int]:
    """Samples of the structures that come with tmtools, and the number of different chains."""
    data, seen, cut = workload.data, set(), []
    for path in structure_files(Path(tmtools.__file__).parent / "data"):
        for piece in chain_segments(Path(path)):
            what = piece.residue_L.tobytes()
            if what not in seen and UNKNOWN_INDEX not in piece.residue_L:
                seen.add(what)
                cut += [(piece.chain_sequence, *window) for window in windows(piece, data.length)]
    residue, backbone = (np.stack(each) for each in list(zip(*cut, strict=True))[1:])
    columns = sample_columns(residue, backbone, data.signal, np.random.default_rng(data.seed))
    count = len({whole for whole, *_ in cut})
    return {name: torch.from_numpy(values) for name, values in columns.items()}, count
