"""The matrix of small models and ways to train them, as a table.

`python -m tests.trainers.conformance.matrix [WORDS]` prints the cells whose row has these words in
its name, with the tracebacks of errors; it writes nothing.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.trainers.conformance.columns import (
    ALONE,
    PAIRED,
    Refused,
    Row,
    Wrong,
    check_paired,
)
from tests.trainers.conformance.runs import Pair

from wild_models import all_models  # isort: skip

COLUMNS = ["1 worker", *PAIRED, *(name for name in ALONE if name != "1 worker")]


@dataclass(frozen=True)
class Cell:
    """Equal to the plain loop, refused in a sentence, or wrong."""

    refused: str = ""
    wrong: str = ""

    def __str__(self) -> str:
        if self.wrong:
            return f"WRONG: {self.wrong}"
        return f"refused: {self.refused}" if self.refused else "equal"


def run_matrix(
    root: Path, names: Iterable[str], show: Callable[[str, str, Cell], object] = lambda *_: None
) -> dict[str, dict[str, Cell]]:
    """Train each model in each column; cells by row and column, also given to `show` at once."""
    torch.set_num_threads(1)
    models = all_models()
    cells: dict[str, dict[str, Cell]] = {name: {} for name in names}

    def check(name: str, column: str, function: Callable[..., object], *arguments: Any) -> None:
        cells[name][column] = _cell(root, function, rows[name], *arguments)
        show(name, column, cells[name][column])

    pair = Pair(root)
    try:
        rows = {name: Row(models[name], root) for name in cells}
        jobs = [
            (name, column, rows[name].job(column, **sections))
            for name in rows
            for column, sections in PAIRED.items()
        ]
        for _, _, job in jobs:
            pair.submit(job)
        for name in rows:
            for column, function in ALONE.items():
                check(name, column, function)
        for name, column, job in jobs:
            check(name, column, check_paired, job, pair.result())
    finally:
        pair.close()
    return cells


def _cell(root: Path, check: Callable[..., object], *arguments: Any) -> Cell:
    try:
        check(*arguments)
    except Refused as error:
        return Cell(refused=_without_paths(str(error), root))
    except Wrong as error:
        return Cell(wrong=_without_paths(str(error), root))
    except Exception as error:
        if os.environ.get("CONFORMANCE_TRACEBACKS"):
            traceback.print_exc()
        return Cell(wrong=_without_paths(f"{type(error).__name__}: {error}", root))
    return Cell()


def _without_paths(text: str, root: Path) -> str:
    return text.replace(str(root), "...").splitlines()[0][:300]


HEADER = """\
# Conformance

```console
.venv/bin/pytest -m "" tests/trainers/conformance/test_conformance.py
```

This page is written by that test, which fails when the page is not what it found. Run it once more,
and commit the page with the change that made it another one.

Each row is a small model as users write them (`tests/trainers/conformance/wild_models`), each
column a way to train it. **=** says that all losses, metrics and final weights are those of a plain
PyTorch loop in float64 that knows nothing of Heliostat (`tests/trainers/conformance/plain.py`), to
1e-9. A number says that Heliostat refuses in the sentence below: before the first step, or at the
first evaluation if the mistake is in the metrics. In the last column it says why a sweep trains
such a trial by itself. **wrong** is a known fault, and the test fails while there is one.

Where workers or micro-batches are not the same mathematics, the plain loop does what is documented:

- Normalization is over the samples of a worker's micro-batch.
- All workers begin a step, and an evaluation, with the buffers of the first one. The model is that
  of the first one.
- Masks of `nn.Dropout` are a function of the seed and the sample. All other random numbers come
  from torch's generator, seeded from the seed, the step, the worker and the micro-batch.
- Models that train in float32, as their rows say, are compared to 2e-5.

"""


def as_page(cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """The page docs/conformance.md."""
    sentences = list(dict.fromkeys(cell.refused for row in cells.values() for cell in row.values()))
    numbers = {text: number for number, text in enumerate(filter(None, sentences), start=1)}

    def shown(cell: Cell) -> str:
        if cell.wrong:
            return "**wrong**"
        return f"[{numbers[cell.refused]}]" if cell.refused else "="

    lines = [
        f"| model | {' | '.join(COLUMNS)} |",
        f"|---|{':-:|' * len(COLUMNS)}",
        *(
            f"| {name} | {' | '.join(shown(row[column]) for column in COLUMNS)} |"
            for name, row in cells.items()
        ),
    ]
    notes = [f"{number}. {text}" for text, number in numbers.items()]
    return HEADER + "\n".join([*lines, "", "Refused:", "", *notes]) + "\n"


if __name__ == "__main__":
    os.environ["CONFORMANCE_TRACEBACKS"] = "1"
    words = sys.argv[1:]
    chosen = [name for name in all_models() if not words or any(word in name for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        run_matrix(
            Path(folder),
            chosen,
            lambda name, column, cell: print(f"{name:50} {column:26} {cell}", flush=True),
        )
