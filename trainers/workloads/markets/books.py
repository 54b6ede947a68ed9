"""Windows of limit order books: simulated, from LOBSTER's files, or from FI-2010's.

The docstring of `workload.py` describes the data.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from cluster.base.config import Spec
from cluster.base.errors import DataError
from trainers.data.tables import table
from trainers.workload import PartitionedWorkload, shipped_or_path
from trainers.workloads.markets.simulation import (
    EVENTS_PER_SAMPLE,
    LARGEST_SPREAD,
    LEVELS,
    Array,
    exact_up_probability,
    next_moves,
    scale_features,
    simulate,
)

# Suffixes: N rows of a file, F = 4 L features of L levels, S spreads, B sizes of a queue.

EXACT_FILE = "exact.npy"

PositiveInt = Annotated[int, Field(gt=0)]


class BookPart(NamedTuple):
    """Simulated books, by a seed; or a file."""

    split: str
    seed: int = 0
    path: str = ""


class OrderBooks(PartitionedWorkload):
    """Base of workloads whose data are windows of an order book."""

    class Data(Spec):
        """The order books, and the length of a sample."""

        source: Annotated[str, shipped_or_path("simulated")] = "simulated"
        """simulated; or a folder with LOBSTER's `*_orderbook_*.csv` or FI-2010's `*.txt`. In the
        order of their names, the last file is for testing, the one before for validation."""
        window: PositiveInt = 10
        """Events per sample."""
        train_parts: PositiveInt = 4
        """Simulated training parts, of about 25,000 samples each; there is one part more for
        validation and one for testing."""
        seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
        """Seed of the simulation."""
        horizon: Literal[10, 20, 30, 50, 100] = 10
        """Events between a sample and its label in FI-2010."""

        @field_validator("window")
        @classmethod
        def _between_samples(cls, window: int) -> int:
            if window > EVENTS_PER_SAMPLE:
                raise ValueError(f"must be at most {EVENTS_PER_SAMPLE}")
            return window

    data: Data

    def parts(self) -> list[BookPart]:
        if self.data.source != "simulated":
            return _file_parts(Path(self.data.source))
        count = self.data.train_parts
        splits = [*["train"] * count, "val", "test"]
        return [BookPart(split, number) for number, split in enumerate(splits)]

    def common(self, parts: Sequence[BookPart]) -> dict[str, bytes]:
        if self.data.source != "simulated":
            return {}
        file = io.BytesIO()
        np.save(
            file, np.stack([exact_up_probability(spread + 1) for spread in range(LARGEST_SPREAD)])
        )
        return {EXACT_FILE: file.getvalue()}

    def part(self, part: BookPart, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        if part.path:
            read = _read_fi2010 if part.path.endswith(".txt") else _read_lobster
            return {part.split: read(Path(part.path), self.data)}
        exact_SBB = np.load(io.BytesIO(common[EXACT_FILE]))
        return {part.split: simulate((self.data.seed, part.seed), self.data.window, exact_SBB)}


def _file_parts(folder: Path) -> list[BookPart]:
    """The folder's files in the order of their names, which is that of time if days name them."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = [*sorted(folder.glob("*_orderbook_*.csv")), *sorted(folder.glob("*.txt"))]
    if len(files) < 3:
        raise DataError(
            f"{folder}: has {len(files)} order-book files; needs at least three, for train, val "
            "and test"
        )
    splits = [*["train"] * (len(files) - 2), "val", "test"]
    return [BookPart(split, path=str(path)) for split, path in zip(splits, files, strict=True)]


def _read_numbers(path: Path, separator: str | None) -> Array:
    """A file of numbers, with the same count in each row: [N, columns]."""
    try:
        return np.loadtxt(path, delimiter=separator, ndmin=2)
    except ValueError:
        width = None
        with path.open(errors="replace") as file:
            for line, text in enumerate(file, start=1):
                cells = text.split(separator)
                width = width or len(cells)
                if len(cells) != width:
                    raise DataError(
                        f"{path}: line {line}: has {len(cells)} numbers, the first has {width}"
                    ) from None
                for cell in cells:
                    if not re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", cell):
                        raise DataError(
                            f"{path}: line {line}: {cell.strip()[:40]!r} is not a number"
                        ) from None
        raise


def _read_lobster(path: Path, data: OrderBooks.Data) -> pa.Table:
    """An order-book file of LOBSTER: prices in 1/10,000 dollars; a tick is a cent."""
    rows = _read_numbers(path, ",")
    if rows.shape[1] < 4 * LEVELS or rows.shape[1] % 4:
        raise DataError(f"{path}: has {rows.shape[1]} columns, needs {4 * LEVELS} of ten levels")
    book = rows[:, : 4 * LEVELS].reshape(-1, LEVELS, 4)
    mid_N = (book[:, 0, 0] + book[:, 0, 2]) / 2
    book[..., ::2] = (book[..., ::2] - mid_N[:, None, None]) / 100
    return _windows(
        scale_features(book), next_moves(mid_N[:, None])[:, 0], data.window, EVENTS_PER_SAMPLE
    )


def _read_fi2010(path: Path, data: OrderBooks.Data) -> pa.Table:
    """A file of FI-2010: one sample per column, normalised as the file's name says.

    Its labels are 1 for up, 2 for stationary, 3 for down. Stationary samples are part of windows,
    but no window ends at one.
    """
    rows = _read_numbers(path, None)
    if len(rows) != 149:
        raise DataError(f"{path}: has {len(rows)} lines, FI-2010's have 149")
    label_N = rows[144 + (10, 20, 30, 50, 100).index(data.horizon)]
    if not np.isin(label_N, (1, 2, 3)).all():
        raise DataError(
            f"{path}: line {145 + (10, 20, 30, 50, 100).index(data.horizon)}: labels are 1, 2 or 3"
        )
    return _windows(rows[: 4 * LEVELS].T.astype(np.float32), 2 - label_N, data.window, 1)


def _windows(features_NF: Array, move_N: Array, window: int, every: int) -> pa.Table:
    """Windows that end at every `every`-th row, except where the price does not move."""
    ends = np.arange(window - 1, len(features_NF), every)
    ends = ends[move_N[ends] != 0]
    index = ends[:, None] + np.arange(1 - window, 1)
    return table(book=features_NF[index], up=(move_N[ends] > 0).astype(np.uint8))
