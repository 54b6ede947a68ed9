"""Structures of atoms with energies and forces, from extended XYZ files and ASE databases."""

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cluster.base.errors import DataError

# Suffix: N atoms.

Array = npt.NDArray[Any]


DATABASES = (".db", ".json")
SUFFIXES = (".xyz", ".extxyz", *DATABASES)


class StructureRecord(NamedTuple):
    """The place of a structure in a file."""

    offset: int
    """Its first byte; in a database, the id of its row."""
    line: int = 0
    """Its first line in a text file, from 1."""
    atoms: int = 0
    """Its number of atoms in a text file."""


class LabelledStructure(NamedTuple):
    """A structure with its energy and forces."""

    where: str
    """Its origin, for error messages."""
    atoms: Any
    """An `ase.Atoms`."""
    energy: float
    """Of the whole structure in eV."""
    forces_N3: Array
    """In eV/Å."""


def structure_files(folder: Path) -> list[Path]:
    """The files of structures in a folder; DataError if there are none."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    if not found:
        raise DataError(f"{folder}: has no file that ends with one of {', '.join(SUFFIXES)}")
    return found


def scan(path: Path) -> list[StructureRecord]:
    """The places of all structures of a file."""
    return list(_scan_database(path) if path.suffix in DATABASES else _scan_xyz(path))


def _scan_xyz(path: Path) -> Iterator[StructureRecord]:
    """The structures of an extended XYZ file; reads only their numbers of atoms."""
    with path.open("rb") as file:
        line = 1
        while head := file.readline():
            if not head.strip():
                line += 1
                continue
            if not head.strip().isdigit():
                said = head.strip().decode(errors="replace")[:40]
                raise DataError(f"{path}: line {line}: {said!r} is not a number of atoms")
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
    except Exception as error:  # SQLite and JSON raise errors of their own
        raise DataError(f"{path}: is not readable as an ASE database: {_reason(error)}") from None


def read_structures(
    path: Path, records: Sequence[StructureRecord], energy: str, forces: str
) -> Iterator[LabelledStructure]:
    """Read some structures of a file, whose energies and forces have the given names."""
    from ase.db import connect
    from ase.io import read

    database = connect(path) if path.suffix in DATABASES else None
    with path.open("rb") as file:
        for record in records:
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
            except Exception as error:  # a broken file can make the reader raise anything
                raise DataError(f"{where}: cannot be read: {_reason(error)}") from None
            yield _with_labels(where, atoms, {"energy": energy, "forces": forces})


def _with_labels(where: str, atoms: Any, names: dict[str, str]) -> LabelledStructure:
    """The structure with its energy and forces: a calculator's results, or stored by `names`."""
    if not len(atoms):
        raise DataError(f"{where}: has no atoms")
    known = {**atoms.info, **atoms.arrays, **(atoms.calc.results if atoms.calc else {})}
    for field, name in names.items():
        if known.get(name) is None:
            raise DataError(f"{where}: has no {name!r} (data.{field})")
    try:
        energy = float(known[names["energy"]])
        forces_N3 = np.asarray(known[names["forces"]], float).reshape(len(atoms), 3)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: cannot be read: {_reason(error)}") from None
    if not (np.isfinite(energy) and np.isfinite(forces_N3).all()):
        raise DataError(f"{where}: energy or forces are not finite")
    return LabelledStructure(where, atoms, energy, forces_N3)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]
