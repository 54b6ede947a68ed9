"""A split is read as memory-mapped tensors."""

from pathlib import Path

import numpy as np

from tests.trainers.data.given_tables import given_tables
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_split


def test_a_split_is_memory_mapped(tmp_path: Path) -> None:
    """Its tensors lie in the pages of a file, which all processes of the machine share."""
    columns = {"scalar": np.arange(5000), "row": np.zeros((5000, 3), np.float32)}
    split = open_split(prepare_dataset(given_tables(**columns), tmp_path), "train")
    for name, values in columns.items():
        address = split[name].data_ptr()
        assert file_at(address).name == "train.arrow"
        assert file_at(address + values.nbytes - 1).name == "train.arrow"


def file_at(address: int) -> Path:
    """The file that this process has mapped at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= address < stop:
            return Path(path)
    raise AssertionError("no memory of this process")
