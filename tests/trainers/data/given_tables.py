"""A workload whose data set is given as tables."""

import itertools
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import torch

from cluster.base.config import Spec
from trainers.data.tables import table
from trainers.workload import Batch, Workload

NUMBER = itertools.count()


class GivenTables(Workload):
    """A data set of given tables. Each instance has its own `data` section."""

    class Data(Spec):
        number: int
        source: str = ""

    def __init__(self, source: str = "", **splits: pa.Table) -> None:
        super().__init__(self.Data(number=next(NUMBER), source=source), self.Model())
        self.splits = splits
        self.made = 0

    def dataset(self) -> dict[str, pa.Table]:
        self.made += 1
        return self.splits

    def build(self) -> torch.nn.Module:
        raise NotImplementedError

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        raise NotImplementedError

    def loss(self, output: Any, batch: Batch) -> torch.Tensor:
        raise NotImplementedError


def given_tables(**columns: npt.NDArray[Any]) -> GivenTables:
    """A data set with two equal splits."""
    return GivenTables(train=table(**columns), val=table(**columns))
