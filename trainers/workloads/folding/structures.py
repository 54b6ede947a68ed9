"""Protein structures from PDB and mmCIF files."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.base.errors import DataError

# Suffix: L residues.

Array = npt.NDArray[Any]

AMINO_ACIDS = "ARNDCQEGHILKMFPSTWYV"
AMINO_ACID_INDEX = {letter: place for place, letter in enumerate(AMINO_ACIDS)}
UNKNOWN_INDEX = len(AMINO_ACIDS)
"""The index of any other residue, and of one that is modified beyond recognition."""
NUMBER = re.compile(rb"\s*[-+]?(\d+\.?\d*|\.\d+)\s*")
SUFFIXES = (".pdb", ".ent", ".cif")
BACKBONE_ATOMS = ("N", "CA", "C")
CHAIN_BREAK = 2.0
"""A larger distance between C and the next N, in Å, is a gap in a chain; the bond has 1.33."""


def structure_files(folder: Path) -> list[str]:
    """All PDB and mmCIF files below a folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.name.lower().removesuffix(".gz").endswith(SUFFIXES) and path.is_file()
    ]
    if not found:
        raise DataError(f"{folder}: has no structure files ({', '.join(SUFFIXES)})")
    return [str(path) for path in found]


class ChainSegment(NamedTuple):
    """A part of a chain without gaps."""

    chain_sequence: str
    """Names of all residues of the whole chain: from the file's sequence record, if it has one,
    otherwise from the residues with coordinates."""
    residue_L: Array
    """As indices into AMINO_ACIDS."""
    backbone: Array
    """[L, 3, 3] in Å."""


def chain_segments(path: Path) -> list[ChainSegment]:
    """The segments of all chains of a file's first model; residues without N, CA or C are gaps."""
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
            raise DataError(f"{path}: {where}: its coordinates are not numbers")
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
    """Raise DataError if coordinates of a PDB file are not numbers: gemmi reads those as 0."""
    read = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with read(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                cells = [line[at : at + 8] for at in (30, 38, 46)]
                numbers = all(NUMBER.fullmatch(cell) for cell in cells)
                if line.startswith((b"ATOM  ", b"HETATM")) and not numbers:
                    text = line[30:54].decode(errors="replace").strip()
                    raise DataError(f"{path}: line {number}: {text!r} are not coordinates")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _amino_acid_index(name: str) -> int:
    """The index of a residue's name; a modified residue counts as its parent amino acid."""
    import gemmi

    return AMINO_ACID_INDEX.get(
        gemmi.find_tabulated_residue(name).one_letter_code.upper(), UNKNOWN_INDEX
    )


def windows(piece: ChainSegment, length: int) -> list[tuple[Array, Array]]:
    """Windows of `length` residues that overlap by half; none if the segment is shorter."""
    starts = range(0, len(piece.residue_L) - length + 1, max(1, length // 2))
    parts = [slice(start, start + length) for start in starts]
    return [(piece.residue_L[part], piece.backbone[part]) for part in parts]
