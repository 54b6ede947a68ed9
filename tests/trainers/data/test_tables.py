"""Every dtype and shape of numbers is stored and read exactly; other columns are refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cluster.base.errors import DataError
from tests.trainers.data.given_tables import GivenTables, given_tables
from trainers.data.dataset import prepare_dataset
from trainers.data.sampling import SampleStream
from trainers.data.splits import open_split
from trainers.data.tables import table

DTYPES = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
DTYPES += ["float16", "float32", "float64", "bool"]


class TestTable:
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(
        max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(data=st.data())
    def test_every_dtype_and_shape_is_read_back_bit_by_bit(
        self, tmp_path: Path, dtype: str, data: st.DataObject
    ) -> None:
        shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
        values = data.draw(hnp.arrays(np.dtype(dtype), shape))
        folder = prepare_dataset(given_tables(x=values), tmp_path)
        back = open_split(folder, "train")["x"]
        assert back.dtype == torch.from_numpy(values[:1].copy()).dtype
        assert tuple(back.shape) == shape
        assert back.numpy().tobytes() == values.tobytes()
        _, batch = SampleStream({"x": back}, seed=0, global_batch=3).batch(0)
        assert batch["x"].shape == (3, *shape[1:])

    def test_a_view_is_stored_by_its_values(self, tmp_path: Path) -> None:
        values = np.arange(24, dtype=np.int32).reshape(4, 6)
        folder = prepare_dataset(
            given_tables(part=values[::2, 1:4], turned=values.T[:2], back=values[:2, 0][::-1]),
            tmp_path,
        )
        split = open_split(folder, "train")
        assert split["part"].tolist() == [[1, 2, 3], [13, 14, 15]]
        assert split["turned"].tolist() == [[0, 6, 12, 18], [1, 7, 13, 19]]
        assert split["back"].tolist() == [6, 0]

    @pytest.mark.parametrize("shape", [(3,), (3, 2)])
    def test_a_foreign_byte_order_is_converted(
        self, tmp_path: Path, shape: tuple[int, ...]
    ) -> None:
        values = np.arange(np.prod(shape), dtype=">f4").reshape(shape)
        back = open_split(prepare_dataset(given_tables(x=values), tmp_path), "train")["x"]
        assert back.tolist() == values.tolist()

    def test_columns_stay_together_by_row(self, tmp_path: Path) -> None:
        count = 1000
        image = np.arange(count * 6, dtype=np.uint16).reshape(count, 2, 3)
        folder = prepare_dataset(given_tables(image=image, label=np.arange(count)), tmp_path)
        _, batch = SampleStream(open_split(folder, "train"), seed=1, global_batch=64).batch(3)
        assert torch.equal(batch["image"][:, 0, 0].long(), batch["label"] * 6)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: pa.table({"x": ["a", "b"]}),
            lambda: pa.table({"x": [[1, 2], [3, 4]]}),
            lambda: pa.table({"x": [[1, 2], [3]]}),
            lambda: pa.table({"x": [1, None, 3]}),
            lambda: pa.table({"x": pa.array([b"ab", b"cd"], pa.binary(2))}),
            lambda: pa.table({"x": pa.array([0, 1], pa.timestamp("s"))}),
            lambda: table(x=np.array(["a", "b"])),
            lambda: table(x=np.array([["a", "b"], ["c", "d"]])),
            lambda: table(x=np.zeros((2, 2), "datetime64[s]")),
        ],
        ids=[
            "text",
            "lists",
            "ragged",
            "nulls",
            "bytes",
            "times",
            "numpy-text",
            "numpy-texts",
            "numpy-times",
        ],
    )
    def test_other_columns_than_numbers_of_one_shape_are_refused(
        self, tmp_path: Path, make: Callable[[], pa.Table]
    ) -> None:
        """With the column's name, when the table or the data set is built, or when it is read."""
        with pytest.raises(DataError, match=r"column 'x'.* numbers"):
            open_split(prepare_dataset(GivenTables(train=make(), val=make()), tmp_path), "train")
