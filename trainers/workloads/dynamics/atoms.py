"""Atoms with their energies and forces: from molecular dynamics of ASE's own, and from files.

What `trainers.workloads.dynamics.workload` says of its data is done here.
"""

import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from cluster.base.errors import DataError, SpecError
from trainers.data.tables import table
from trainers.workload import PartitionedWorkload, SplitFractions, shipped_or_path

# Suffixes: N atoms, K neighbours of an atom, R = 1 + K, X four numbers, S structures, Z elements.

Array = npt.NDArray[Any]

SPLITS = ("train", "val", "test")
LATTICE_CONSTANT, CELLS_PER_SIDE = 3.61, 2
"""Of copper: the cubic cell's side in Å, and how many of them a structure has along each side."""
STRAIN = 0.03
"""Cells are this much longer or shorter along each axis, and sheared by as much at most."""
TRAIN_K = (20, 1600)
VAL_K = range(300, 1501, 300)
TEST_K = range(250, 1601, 150)
"""Temperatures of the trajectories; those to train on are evenly spaced in their square roots."""
TIME_STEP_FS, FRICTION_PER_FS = 5.0, 0.02
BURN_IN_STEPS, STEPS_PER_FRAME = 50, 10
"""Steps until a crystal has its temperature, and between frames."""
STRUCTURES_PER_PART = 500
"""Structures of a file in a part of the data set."""
REFERENCES_FILE, REFERENCE_STRUCTURES = "references.json", 1000
"""Energies of single atoms, and how many structures they are fitted to."""

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class StructureRecord(NamedTuple):
    """A structure in a file."""

    offset: int
    """Where it begins, in bytes; in a database its row's id."""
    line: int = 0
    """Of a text file, from 1."""
    atoms: int = 0


class StructurePart(NamedTuple):
    """A trajectory that is made from a seed, or some structures of a file."""

    split: str
    seed: int = 0
    temperature_k: float = 0.0
    path: str = ""
    records: tuple[StructureRecord, ...] = ()


class LabelledStructure(NamedTuple):
    """A structure, an `ase.Atoms`, with what is known of it."""

    where: str
    atoms: Any
    energy: float
    """Of the whole structure in eV."""
    forces_N3: Array
    """In eV/Å."""


class Structures(PartitionedWorkload):
    """What has structures of atoms for its data."""

    class Data(SplitFractions):
        """Which structures, and the shape that they are kept in."""

        renamed_fields = {"atoms": "max_atoms", "neighbors": "max_neighbors"}

        source: Annotated[str, shipped_or_path("emt")] = "emt"
        """emt; or a file or folder of extended XYZ (.xyz, .extxyz) or ASE databases (.db, .json).
        A folder may have train/, and optionally val/ and test/, else each file is cut in place."""
        energy: str = "energy"
        """What files call the energy, in eV."""
        forces: str = "forces"
        """What files call the forces, in eV/Å."""
        val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
        """Share of a file's structures, before those at its end, that are to validate on."""
        test_fraction: Fraction = 0.1
        """Share of a file's structures, at its end, that are held out for testing."""
        cutoff: Annotated[float, Field(gt=0)] = 5.0
        """Å within which atoms see each other."""
        max_atoms: PositiveInt = 32
        """Room for a structure's atoms; smaller ones are filled up with nothing."""
        max_neighbors: PositiveInt = 64
        """Room for an atom's neighbours within the cutoff, images in other cells among them."""
        trajectories: PositiveInt = 40
        """Of emt, to train on; there are 5 more to validate and 10 to test on."""
        frames: PositiveInt = 10
        """Of each trajectory of emt."""
        seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
        """Decides how cells are strained and what thermal noise there is in emt."""

    data: Data

    def made_with(self) -> dict[str, str]:
        try:
            return {"ase": version("ase")}
        except PackageNotFoundError:
            raise SpecError(
                "workload: dynamics takes ase, which is not installed "
                "(pip install 'heliostat[dynamics]')"
            ) from None

    def parts(self) -> list[StructurePart]:
        if self.data.source != "emt":
            return _file_parts(self.data)
        # The closer together the colder: there is little else to tell elastic constants from.
        coldest, hottest = TRAIN_K
        train_k = np.linspace(coldest**0.5, hottest**0.5, self.data.trajectories) ** 2
        each = [("train", k) for k in train_k]
        each += [("val", k) for k in VAL_K] + [("test", k) for k in TEST_K]
        return [StructurePart(split, seed, float(k)) for seed, (split, k) in enumerate(each)]

    def common(self, parts: Sequence[StructurePart]) -> dict[str, bytes]:
        """Of files, what an atom of each element adds to the energy, in eV by atomic number."""
        if self.data.source == "emt":
            return {}  # energies there are of the perfect crystal's
        training = [part for part in parts if part.split == "train"]
        count = -(-REFERENCE_STRUCTURES // max(1, len(training)))
        some = [part._replace(records=part.records[:count]) for part in training]
        found = fit_references(each for part in some for each in _read_structures(part, self.data))
        return {REFERENCES_FILE: json.dumps(found).encode()}

    def part(self, part: StructurePart, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        references: dict[str, float] = json.loads(common.get(REFERENCES_FILE, b"{}"))
        found = (
            _read_structures(part, self.data) if part.path else simulate_trajectory(part, self.data)
        )
        rows = [self._row(each, references) for each in found]
        atoms, energy, forces = (np.stack(column) for column in zip(*rows, strict=True))
        return {part.split: table(atoms=atoms, energy=energy, forces=forces)}

    def _row(self, found: LabelledStructure, references: Mapping[str, float]) -> tuple[Any, ...]:
        """atoms [N, R, X], energy [], forces [N, 3], as the data set has them."""
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
    """Room for atoms [N, R, X] in which there are none: neighbours beyond the cutoff count nil."""
    empty_NRX = np.zeros((atoms, 1 + neighbors, 4), np.float32)
    empty_NRX[:, 1:, 1] = 2 * cutoff
    return empty_NRX


def neighbor_array(atoms: Any, cutoff: float) -> Array:
    """An `ase.Atoms` as one array [N, R, X], with room for the neighbours of whoever has most.

    First its atomic number and position in Å, then of each neighbour which atom it is and the
    vector to it: not that atom's own position, but that of its image.
    """
    from ase.neighborlist import neighbor_list

    first_E, second_E, vector_E3 = neighbor_list("ijD", atoms, cutoff)  # sorted by the first
    count_N = np.bincount(first_E, minlength=len(atoms))
    place_E = np.arange(len(first_E)) - np.repeat(count_N.cumsum() - count_N, count_N)
    found_NRX = empty_structure(len(atoms), max(1, count_N.max(initial=0)), cutoff).astype(float)
    found_NRX[:, 0] = np.column_stack([atoms.numbers, atoms.positions])
    found_NRX[first_E, 1 + place_E] = np.column_stack([second_E, vector_E3])
    return found_NRX


def simulate_trajectory(part: StructurePart, data: Structures.Data) -> Iterator[LabelledStructure]:
    """Frames of a strained crystal of copper in a heat bath, by ASE's effective medium theory."""
    from ase import units
    from ase.build import bulk
    from ase.calculators.emt import EMT
    from ase.md.langevin import Langevin
    from ase.md.velocitydistribution import thermalize_momenta

    random = np.random.default_rng((data.seed, part.seed))
    shear_33 = random.uniform(-STRAIN, STRAIN, (3, 3)) / 2
    strain_33 = np.diag(random.uniform(-STRAIN, STRAIN, 3)) + (shear_33 + shear_33.T) / 2
    atoms = bulk("Cu", "fcc", a=LATTICE_CONSTANT, cubic=True) * (
        CELLS_PER_SIDE,
        CELLS_PER_SIDE,
        CELLS_PER_SIDE,
    )
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain_33), scale_atoms=True)
    atoms.calc = EMT()
    thermalize_momenta(atoms, temperature_K=part.temperature_k, rng=random)
    dynamics = Langevin(
        atoms,
        TIME_STEP_FS * units.fs,
        temperature_K=part.temperature_k,
        friction=FRICTION_PER_FS / units.fs,
        fixcm=False,  # where the crystal drifts to is nothing to its energy
        rng=random,
    )
    dynamics.run(BURN_IN_STEPS)
    for frame in range(data.frames):
        dynamics.run(STEPS_PER_FRAME)
        where = f"emt: trajectory {part.seed}, frame {frame}"
        yield LabelledStructure(where, atoms, atoms.get_potential_energy(), atoms.get_forces())


def fit_references(structures: Iterator[LabelledStructure]) -> dict[str, float]:
    """What an atom of each element adds to the energy, by least squares; in eV."""
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
        records = list(_scan_database(path) if path.suffix in (".db", ".json") else _scan_xyz(path))
        bounds = np.rint(len(records) * np.cumsum([0.0, *shares])).astype(int).tolist()
        for split, (low, high) in zip(SPLITS, itertools.pairwise(bounds), strict=True):
            for start in range(low, high, STRUCTURES_PER_PART):
                some = tuple(records[start : min(high, start + STRUCTURES_PER_PART)])
                parts.append(StructurePart(split, path=str(path), records=some))
    if not any(part.split == "train" for part in parts):
        raise DataError(f"{data.source}: has no structures to train on")
    return parts


def _files_and_shares(data: Structures.Data) -> Iterator[tuple[Path, tuple[float, float, float]]]:
    """The source's files, each with the shares of its structures that are in each split."""
    source, val, test = Path(data.source), data.val_fraction, data.test_fraction
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_file():
        yield source, (1 - val - test, val, test)
    elif not (source / "train").is_dir():
        yield from ((path, (1 - val - test, val, test)) for path in _structure_files(source))
    else:
        cut = 0.0 if (source / "val").is_dir() else val
        yield from ((path, (1 - cut, cut, 0.0)) for path in _structure_files(source / "train"))
        for split, shares in (("val", (0.0, 1.0, 0.0)), ("test", (0.0, 0.0, 1.0))):
            if (source / split).is_dir():
                yield from ((path, shares) for path in _structure_files(source / split))


def _structure_files(folder: Path) -> list[Path]:
    kinds = (".xyz", ".extxyz", ".db", ".json")
    found = [path for path in sorted(folder.iterdir()) if path.suffix in kinds]
    if not found:
        raise DataError(f"{folder}: has no file that ends with one of {', '.join(kinds)}")
    return found


def _scan_xyz(path: Path) -> Iterator[StructureRecord]:
    """The structures of an extended XYZ file, of which only the numbers of atoms are read."""
    with path.open("rb") as file:
        line = 1
        while head := file.readline():
            if not head.strip():
                line += 1
                continue
            if not head.strip().isdigit():
                said = head.strip().decode(errors="replace")[:40]
                raise DataError(f"{path}: line {line}: {said!r} is no number of atoms")
            record = StructureRecord(file.tell() - len(head), line, int(head))
            body = sum(1 for _ in itertools.islice(file, record.atoms + 1))
            if body < record.atoms + 1:
                raise DataError(
                    f"{path}: line {line}: ends after {max(0, body - 1)} of {record.atoms} atoms"
                )
            yield record
            line += 1 + body


def _scan_database(path: Path) -> Iterator[StructureRecord]:
    from ase.db import connect

    try:
        for row in connect(path).select(sort="id", include_data=False):
            yield StructureRecord(row.id)
    except Exception as error:  # SQLite's and JSON's own
        raise DataError(f"{path}: is not readable as an ASE database: {_reason(error)}") from None


def _read_structures(part: StructurePart, data: Structures.Data) -> Iterator[LabelledStructure]:
    """The structures of a part of a file."""
    from ase.db import connect
    from ase.io import read

    path = Path(part.path)
    database = connect(path) if path.suffix in (".db", ".json") else None
    with path.open("rb") as file:
        for record in part.records:
            line = f"line {record.line}"
            where = f"{path}: {line if database is None else f'row {record.offset}'}"
            try:
                if database is None:
                    file.seek(record.offset)
                    lines = itertools.islice(file, record.atoms + 2)
                    text = io.StringIO(b"".join(lines).decode())
                    atoms = read(text, format="extxyz")
                else:
                    row = database.get(id=record.offset)
                    atoms = row.toatoms()
                    atoms.info = {**row.data, **row.key_value_pairs}
            except Exception as error:  # whatever a broken file leads to
                raise DataError(f"{where}: cannot be read: {_reason(error)}") from None
            yield _with_labels(where, atoms, data)


def _with_labels(where: str, atoms: Any, data: Structures.Data) -> LabelledStructure:
    """With energy and forces, which stand with a calculator's results, or by names of one's own."""
    if not len(atoms):
        raise DataError(f"{where}: has no atoms")
    known = {**atoms.info, **atoms.arrays, **(atoms.calc.results if atoms.calc else {})}
    for field in ("energy", "forces"):
        if known.get(name := getattr(data, field)) is None:
            raise DataError(f"{where}: has no {name!r} (data.{field})")
    try:
        energy = float(known[data.energy])
        forces_N3 = np.asarray(known[data.forces], float).reshape(len(atoms), 3)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: cannot be read: {_reason(error)}") from None
    if not (np.isfinite(energy) and np.isfinite(forces_N3).all()):
        raise DataError(f"{where}: energy or forces are not finite")
    return LabelledStructure(where, atoms, energy, forces_N3)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]
