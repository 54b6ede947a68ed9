"""Structures of proteins: read from PDB and mmCIF files, and compared by the field's measures."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.base.errors import DataError

# Suffixes: B samples, L residues, X coordinates in Å, S superpositions, Q quaternions.

Array = npt.NDArray[Any]

AMINO_ACIDS = "ARNDCQEGHILKMFPSTWYV"
AMINO_ACID_INDEX = {letter: place for place, letter in enumerate(AMINO_ACIDS)}
UNKNOWN_INDEX = len(AMINO_ACIDS)
"""Where a residue is none of these, or one of them that has been changed beyond its name."""
NUMBER = re.compile(rb"\s*[-+]?(\d+\.?\d*|\.\d+)\s*")
SUFFIXES = (".pdb", ".ent", ".cif")
BACKBONE_ATOMS = ("N", "CA", "C")
CHAIN_BREAK = 2.0
"""Å between C and the next N from which on a chain is interrupted; the bond has 1.33."""
SUPERPOSITION_STEPS = 8
"""Steps of a superposition uphill."""


def structure_files(folder: Path) -> list[str]:
    """All PDB and mmCIF files in a folder and below it."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.name.lower().removesuffix(".gz").endswith(SUFFIXES) and path.is_file()
    ]
    if not found:
        raise DataError(f"{folder}: has no files of structures ({', '.join(SUFFIXES)})")
    return [str(path) for path in found]


class ChainSegment(NamedTuple):
    """What is uninterrupted of a chain."""

    chain_sequence: str
    """Names of all residues of the chain that it is of: as in the record of the sequence, or where
    there is none, as there are places."""
    residue_L: Array
    """As places in AMINO_ACIDS."""
    backbone: Array
    """[L, 3, 3] in Å."""


def chain_segments(path: Path) -> list[ChainSegment]:
    """Of all chains of the file's first model; what lacks N, CA or C interrupts a chain."""
    structure = _read_structure(path)
    structure.setup_entities()
    found = [
        piece for chain in structure[0] for piece in _segments_of_chain(chain, structure, path)
    ]
    if not found:
        raise DataError(f"{path}: has no residue with the atoms N, CA and C")
    return found


def _segments_of_chain(chain: Any, structure: Any, path: Path) -> Iterator[ChainSegment]:
    residues = [
        residue
        for residue in chain.first_conformer()
        if all(residue.find_atom(atom, "*") for atom in BACKBONE_ATOMS)
    ]
    if not residues:
        return
    places = [[residue[atom][0].pos.tolist() for atom in BACKBONE_ATOMS] for residue in residues]
    for residue, each in zip(residues, places, strict=True):
        if not np.isfinite(each).all():
            where = f"residue {residue.seqid} of chain {chain.name}"
            raise DataError(f"{path}: {where}: its coordinates are no numbers")
    polymer = chain.get_polymer()
    entity = structure.get_entity_of(polymer) if len(polymer) else None
    names = entity.full_sequence if entity else ()
    whole = " ".join(names or (residue.name for residue in residues))
    residue_L, backbone = (
        np.array([_amino_acid_index(residue.name) for residue in residues]),
        np.array(places),
    )
    gaps = np.linalg.norm(backbone[1:, 0] - backbone[:-1, 2], axis=-1) > CHAIN_BREAK
    starts = np.flatnonzero(gaps) + 1
    for piece in zip(np.split(residue_L, starts), np.split(backbone, starts), strict=True):
        yield ChainSegment(whole, *piece)


def _read_structure(path: Path) -> Any:
    import gemmi

    if not path.name.lower().removesuffix(".gz").endswith(".cif"):
        _check_numbers(path)
    try:
        structure = gemmi.read_structure(str(path))
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        reason = re.sub(r"^:(\d+):\d+\(\d+\)", r"line \1", str(error).replace(str(path), ""))
        raise DataError(f"{path}: {' '.join(reason.split())}") from None
    if not len(structure):
        raise DataError(f"{path}: has no atoms")
    return structure


def _check_numbers(path: Path) -> None:
    """DataError for a PDB file with coordinates that are no numbers, which gemmi takes for 0."""
    read = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with read(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                cells = [line[at : at + 8] for at in (30, 38, 46)]
                numbers = all(NUMBER.fullmatch(cell) for cell in cells)
                if line.startswith((b"ATOM  ", b"HETATM")) and not numbers:
                    text = line[30:54].decode(errors="replace").strip()
                    raise DataError(f"{path}: line {number}: {text!r} are no coordinates")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _amino_acid_index(name: str) -> int:
    """The place in AMINO_ACIDS of a residue's name; changed ones count as what they were."""
    import gemmi

    return AMINO_ACID_INDEX.get(
        gemmi.find_tabulated_residue(name).one_letter_code.upper(), UNKNOWN_INDEX
    )


def windows(piece: ChainSegment, length: int) -> list[tuple[Array, Array]]:
    """Residues and backbones of `length` that overlap by half; none where a piece is shorter."""
    starts = range(0, len(piece.residue_L) - length + 1, max(1, length // 2))
    parts = [slice(start, start + length) for start in starts]
    return [(piece.residue_L[part], piece.backbone[part]) for part in parts]


def lddt(found_BLX: Tensor, true_BLX: Tensor) -> Tensor:
    """Local distance difference test of the atoms [B], in [0, 1]; it needs no superposition.

    The share of the true distances below 15 Å that are met within 0.5, 1, 2 and 4 Å, on average
    (Mariani et al. 2013, doi:10.1093/bioinformatics/btt473).
    """
    found_BLL, true_BLL = pairwise_distances(found_BLX), pairwise_distances(true_BLX)
    itself_LL = torch.eye(true_BLX.shape[1], dtype=torch.bool, device=true_BLX.device)
    counts_BLL = (true_BLL < 15) & ~itself_LL
    off_BLL = (found_BLL - true_BLL).abs()
    kept_BLL = torch.stack([off_BLL < within for within in (0.5, 1, 2, 4)]).to(off_BLL.dtype)
    return (kept_BLL.mean(0) * counts_BLL).sum((1, 2)) / counts_BLL.sum((1, 2)).clamp(min=1)


def pairwise_distances(place_BLX: Tensor) -> Tensor:
    """Distances [B, L, L], with zeros that have a gradient."""
    square_BLL = (place_BLX[:, :, None] - place_BLX[:, None]).square().sum(-1)
    return (square_BLL + 1e-8).sqrt()


def tm_score_and_gdt_ts(found_BLX: Tensor, true_BLX: Tensor) -> tuple[Tensor, Tensor]:
    """TM-score and GDT_TS of the atoms [B] each, in [0, 1], residue by residue.

    Both ask for the best of all superpositions. They are sought from those of the whole chain and
    of pieces of it, upwards: weighting each residue by the slope of its term in the TM-score never
    makes that score worse. TM-score: Zhang and Skolnick 2004 (doi:10.1002/prot.20264); GDT_TS:
    the shares of residues within 1, 2, 4 and 8 Å (Zemla 2003, doi:10.1093/nar/gkg571).
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
    """Å at which a residue counts half in a TM-score normalised to this length."""
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
    """Distances [S, B, L] after the weighted superposition of least squares."""
    share_SBL1 = (weight_SBL / weight_SBL.sum(2, keepdim=True))[..., None]
    found_SBLX = found_BLX - (share_SBL1 * found_BLX).sum(2, keepdim=True)
    true_SBLX = true_BLX - (share_SBL1 * true_BLX).sum(2, keepdim=True)
    products = (share_SBL1 * found_SBLX)[..., None] * true_SBLX[..., None, :]
    rotation = best_rotation(products.sum(2))
    turned_SBLX = (rotation[:, :, None] * found_SBLX[..., None, :]).sum(-1)
    return ((turned_SBLX - true_SBLX).square().sum(-1) + 1e-12).sqrt()


def best_rotation(product: Tensor) -> Tensor:
    """Rotations [..., 3, 3] that take points to others best, from the sums of their products.

    The largest eigenvector of a symmetric matrix is the rotation's quaternion: Horn 1987
    (doi:10.1364/JOSAA.4.000629).
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in product.unbind(-2))
    rows = [
        [xx + yy + zz, yz - zy, zx - xz, xy - yx],
        [yz - zy, xx - yy - zz, xy + yx, zx + xz],
        [zx - xz, xy + yx, yy - xx - zz, yz + zy],
        [xy - yx, zx + xz, yz + zy, zz - xx - yy],
    ]
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return quaternion_to_rotation(torch.linalg.eigh(matrix).eigenvectors[..., -1])


def quaternion_to_rotation(quaternion: Tensor) -> Tensor:
    """Rotations [..., 3, 3] of unit quaternions [..., 4], the real part first."""
    w, x, y, z = quaternion.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
