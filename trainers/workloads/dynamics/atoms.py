"""Structures of atoms with energies and forces: copper trajectories, or your own files.

The docstring of `workload.py` describes the data.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from cluster.base.errors import DataError, SpecError
from trainers.data.tables import table
from trainers.workload import PartitionedWorkload, SplitFractions, shipped_or_path
from trainers.workloads.dynamics.copper import simulate_trajectory
from trainers.workloads.dynamics.structure_files import (
    Array,
    LabelledStructure,
    StructureRecord,
    read_structures,
    scan,
    structure_files,
)

# Suffixes: N atoms, K neighbours of an atom, R = 1 + K, X four numbers, S structures, Z elements.

SPLITS = ("train", "val", "test")
TRAIN_K = (20, 1600)
VAL_K = range(300, 1501, 300)
TEST_K = range(250, 1601, 150)
"""Temperatures of the trajectories; for training, their square roots are evenly spaced."""
STRUCTURES_PER_PART = 500
"""Structures that a part of the data set takes from a file."""
REFERENCES_FILE, REFERENCE_STRUCTURES = "references.json", 1000
"""The file of single atoms' energies, and the number of structures that they are fitted to."""

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class StructurePart(NamedTuple):
    """A simulated trajectory, by a seed; or some structures of a file."""

    split: str
    seed: int = 0
    temperature_k: float = 0.0
    path: str = ""
    records: tuple[StructureRecord, ...] = ()


class Structures(PartitionedWorkload):
    """Base of workloads whose data are structures of atoms."""

    class Data(SplitFractions):
        """The structures, and the size of their arrays."""

        renamed_fields = {"atoms": "max_atoms", "neighbors": "max_neighbors"}

        source: Annotated[str, shipped_or_path("emt")] = "emt"
        """emt; or a file or folder of extended XYZ (.xyz, .extxyz) or ASE databases (.db, .json).
        A folder may have train/ and optionally val/ and test/; otherwise each file is split."""
        energy: str = "energy"
        """The name of the energy, in eV, in files."""
        forces: str = "forces"
        """The name of the forces, in eV/Å, in files."""
        val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
        """Share of a file's structures for validation, before those for testing."""
        test_fraction: Fraction = 0.1
        """Share of a file's structures, at its end, for testing."""
        cutoff: Annotated[float, Field(gt=0)] = 5.0
        """Largest distance of neighbouring atoms, in Å."""
        max_atoms: PositiveInt = 32
        """Largest number of atoms of a structure; smaller ones are padded."""
        max_neighbors: PositiveInt = 64
        """Largest number of neighbours of an atom within the cutoff, with periodic images."""
        trajectories: PositiveInt = 40
        """emt: training trajectories; there are 5 more for validation and 10 for testing."""
        frames: PositiveInt = 10
        """emt: frames per trajectory."""
        seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
        """emt: seed of the strain and of the thermal noise."""

    data: Data

    def made_with(self) -> dict[str, str]:
        try:
            return {"ase": version("ase")}
        except PackageNotFoundError:
            raise SpecError(
                "workload: dynamics needs the package ase, which is not installed "
                "(pip install 'heliostat[dynamics]')"
            ) from None

    def parts(self) -> list[StructurePart]:
        if self.data.source != "emt":
            return _file_parts(self.data)
        # Denser at low temperatures, which determine the elastic constants.
        coldest, hottest = TRAIN_K
        train_k = np.linspace(coldest**0.5, hottest**0.5, self.data.trajectories) ** 2
        each = [("train", k) for k in train_k]
        each += [("val", k) for k in VAL_K] + [("test", k) for k in TEST_K]
        return [StructurePart(split, seed, float(k)) for seed, (split, k) in enumerate(each)]

    def common(self, parts: Sequence[StructurePart]) -> dict[str, bytes]:
        """For files: the energy of a single atom of each element in eV, by atomic number."""
        if self.data.source == "emt":
            return {}  # EMT's energies are relative to the perfect crystal
        training = [part for part in parts if part.split == "train"]
        count = -(-REFERENCE_STRUCTURES // max(1, len(training)))
        some = [part._replace(records=part.records[:count]) for part in training]
        found = fit_references(each for part in some for each in self._structures(part))
        return {REFERENCES_FILE: json.dumps(found).encode()}

    def part(self, part: StructurePart, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        references: dict[str, float] = json.loads(common.get(REFERENCES_FILE, b"{}"))
        rows = [self._row(each, references) for each in self._structures(part)]
        atoms, energy, forces = (np.stack(column) for column in zip(*rows, strict=True))
        return {part.split: table(atoms=atoms, energy=energy, forces=forces)}

    def _structures(self, part: StructurePart) -> Iterator[LabelledStructure]:
        data = self.data
        if part.path:
            return read_structures(Path(part.path), part.records, data.energy, data.forces)
        return simulate_trajectory(data.seed, part.seed, part.temperature_k, data.frames)

    def _row(self, found: LabelledStructure, references: Mapping[str, float]) -> tuple[Any, ...]:
        """A structure's row in the data set: atoms [N, R, X], energy [], forces [N, 3]."""
        data, (count, size) = self.data, found.forces_N3.shape
        if count > data.max_atoms:
            raise DataError(f"{found.where}: has {count} atoms, data.max_atoms is {data.max_atoms}")
        some_NRX = neighbor_array(found.atoms, data.cutoff)
        most = some_NRX.shape[1] - 1
        if most > data.max_neighbors:
            raise DataError(
                f"{found.where}: an atom has {most} neighbours within {data.cutoff:g} Å, "
                f"data.max_neighbors is {data.max_neighbors}"
            )
        atoms_NRX = empty_structure(data.max_atoms, data.max_neighbors, data.cutoff)
        atoms_NRX[:count, : most + 1] = some_NRX
        forces_N3 = np.zeros((data.max_atoms, size), np.float32)
        forces_N3[:count] = found.forces_N3
        alone = sum(references.get(str(number), 0.0) for number in found.atoms.numbers)
        return atoms_NRX, np.float32(found.energy - alone), forces_N3


def empty_structure(atoms: int, neighbors: int, cutoff: float) -> Array:
    """Padding [N, R, X]: no atoms, and neighbours beyond the cutoff, which have no effect."""
    empty_NRX = np.zeros((atoms, 1 + neighbors, 4), np.float32)
    empty_NRX[:, 1:, 1] = 2 * cutoff
    return empty_NRX


def neighbor_array(atoms: Any, cutoff: float) -> Array:
    """An `ase.Atoms` as one array [N, R, X]; R - 1 is the largest number of neighbours of an atom.

    An atom's first row is its atomic number and position in Å. Each further row is a neighbour: its
    index, and the vector to it or to its periodic image.
    """
    from ase.neighborlist import neighbor_list

    first_E, second_E, vector_E3 = neighbor_list("ijD", atoms, cutoff)  # sorted by the first
    count_N = np.bincount(first_E, minlength=len(atoms))
    place_E = np.arange(len(first_E)) - np.repeat(count_N.cumsum() - count_N, count_N)
    found_NRX = empty_structure(len(atoms), max(1, count_N.max(initial=0)), cutoff).astype(float)
    found_NRX[:, 0] = np.column_stack([atoms.numbers, atoms.positions])
    found_NRX[first_E, 1 + place_E] = np.column_stack([second_E, vector_E3])
    return found_NRX


def fit_references(structures: Iterator[LabelledStructure]) -> dict[str, float]:
    """The energy of a single atom of each element in eV, by least squares."""
    numbers, energies = [], []
    for found in structures:
        numbers.append(np.bincount(found.atoms.numbers, minlength=120))
        energies.append(found.energy)
    count_SZ = np.array(numbers, float)
    there = np.flatnonzero(count_SZ.sum(0))
    share_Z, *_ = np.linalg.lstsq(count_SZ[:, there], np.array(energies), rcond=None)
    return {str(number): float(share) for number, share in zip(there, share_Z, strict=True)}


def _file_parts(data: Structures.Data) -> list[StructurePart]:
    parts = []
    for path, shares in _files_and_shares(data):
        records = scan(path)
        bounds = np.rint(len(records) * np.cumsum([0.0, *shares])).astype(int).tolist()
        for split, (low, high) in zip(SPLITS, itertools.pairwise(bounds), strict=True):
            for start in range(low, high, STRUCTURES_PER_PART):
                some = tuple(records[start : min(high, start + STRUCTURES_PER_PART)])
                parts.append(StructurePart(split, path=str(path), records=some))
    if not any(part.split == "train" for part in parts):
        raise DataError(f"{data.source}: has no structures to train on")
    return parts


def _files_and_shares(data: Structures.Data) -> Iterator[tuple[Path, tuple[float, float, float]]]:
    """The source's files, each with the shares of its structures for train, val and test."""
    source, val, test = Path(data.source), data.val_fraction, data.test_fraction
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_file():
        yield source, (1 - val - test, val, test)
    elif not (source / "train").is_dir():
        yield from ((path, (1 - val - test, val, test)) for path in structure_files(source))
    else:
        cut = 0.0 if (source / "val").is_dir() else val
        yield from ((path, (1 - cut, cut, 0.0)) for path in structure_files(source / "train"))
        for split, shares in (("val", (0.0, 1.0, 0.0)), ("test", (0.0, 0.0, 1.0))):
            if (source / split).is_dir():
                yield from ((path, shares) for path in structure_files(source / split))
