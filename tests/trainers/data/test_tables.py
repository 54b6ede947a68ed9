"""Every dtype and shape of numbers is stored and read exactly; other columns are refused."""

import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
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

    @pytest.mark.parametrize("dtype", ["complex64", "complex128"])
    @pytest.mark.parametrize("shape", [(5,), (5, 2)])
    def test_complex_numbers_are_read_back_bit_by_bit(
        self, tmp_path: Path, dtype: str, shape: tuple[int, ...]
    ) -> None:
        random = np.random.default_rng(0)
        values = (random.normal(size=shape) + 1j * random.normal(size=shape)).astype(dtype)
        back = open_split(prepare_dataset(given_tables(x=values), tmp_path), "train")["x"]
        assert back.numpy().dtype == values.dtype
        assert np.array_equal(back.numpy(), values)

    @pytest.mark.parametrize(
        ("values", "problem"),
        [
            ([1, 2], "is a list; give a numpy array of numbers [N] or [N, ...]"),
            (range(2), "is a range; give a numpy array of numbers [N] or [N, ...]"),
            (None, "is a NoneType; give a numpy array of numbers [N] or [N, ...]"),
            (np.float64(3), "is a single number; give one row for each sample"),
            (np.zeros((2, 0)), "has no numbers in its rows of shape [0]"),
            (np.zeros(2, np.longdouble), "is float128; training reads numbers"),
            (np.array([[1], [1, 2]], object), "is object; training reads numbers"),
            (
                np.ma.array([1, 2], mask=[False, True]),
                "has missing values; training reads numbers: fill them in",
            ),
            (
                pd.Series([1, None], dtype="Int64"),
                "has missing values; training reads numbers: fill them in",
            ),
            (
                pa.array([1, None]),
                "is a Int64Array; give a numpy array of numbers [N] or [N, ...]",
            ),
        ],
    )
    def test_anything_but_an_array_of_numbers_is_refused(self, values: Any, problem: str) -> None:
        with pytest.raises(DataError) as caught:
            table(x=values)
        assert str(caught.value) == f"table: column 'x' {problem}"

    def test_columns_of_different_lengths_are_refused(self) -> None:
        with pytest.raises(DataError) as caught:
            table(x=np.zeros(3), y=np.zeros((4, 2)))
        assert str(caught.value) == (
            "table: column 'y' has 4 rows and column 'x' has 3; a sample has one row of each"
        )

    @pytest.mark.parametrize("values", [torch.arange(3.0), pd.Series([0.0, 1.0, 2.0])])
    def test_what_is_an_array_too_is_taken(self, values: Any) -> None:
        assert table(x=values).column("x").to_pylist() == [0, 1, 2]


N = 12
RANDOM = np.random.default_rng(0)
PAIRS = RANDOM.normal(size=(N, 2))
HALVES = pa.array([1.5, 2.5] * (N // 2))
TENSOR = RANDOM.normal(size=(N + 2, 2, 3))
READABLE: dict[str, tuple[pa.Array | pa.ChunkedArray, Any]] = {
    "numbers": (pa.array(PAIRS[:, 0]), PAIRS[:, 0]),
    "float16": (pa.array(PAIRS[:, 0].astype(np.float16)), PAIRS[:, 0].astype(np.float16)),
    "uint64": (pa.array([2**64 - 1 - i for i in range(N)], pa.uint64()), None),
    "int64": (pa.array([2**53 + 1 + i for i in range(N)]), None),
    "times": (pa.array(1.7e9 + 0.25 * np.arange(N)), 1.7e9 + 0.25 * np.arange(N)),
    "booleans": (pa.array([i % 3 == 0 for i in range(N)]), np.arange(N) % 3 == 0),
    "sliced booleans": (
        pa.array([i % 3 == 0 for i in range(N + 5)])[5:],
        np.arange(5, N + 5) % 3 == 0,
    ),
    "lists": (pa.array(PAIRS.tolist()), PAIRS),
    "large lists": (pa.array(PAIRS.tolist(), pa.large_list(pa.float64())), PAIRS),
    "sliced lists": (pa.array([[0.0, 0.0], *PAIRS.tolist()])[1:], PAIRS),
    "lists of booleans": (pa.array((PAIRS > 0).tolist()), PAIRS > 0),
    "lists of lists": (pa.array([[[i], [2 * i]] for i in range(N)]), None),
    "lists of one size": (pa.FixedSizeListArray.from_arrays(pa.array(PAIRS.ravel()), 2), PAIRS),
    "sliced lists of one size": (
        pa.FixedSizeListArray.from_arrays(pa.array(np.append([0.0, 0.0], PAIRS.ravel())), 2)[1:],
        PAIRS,
    ),
    "dictionary": (HALVES.dictionary_encode(), np.array([1.5, 2.5] * (N // 2))),
    "chunks of dictionaries": (
        pa.chunked_array(
            [
                HALVES[:4].dictionary_encode(),
                HALVES[5:].dictionary_encode(),
                HALVES[4:5].dictionary_encode(),
            ]
        ),
        np.array([1.5, 2.5, 1.5, 2.5, 2.5, 1.5, 2.5, 1.5, 2.5, 1.5, 2.5, 1.5]),
    ),
    "runs": (
        pa.RunEndEncodedArray.from_arrays(pa.array([4, N], pa.int32()), pa.array([1.0, 2.0])),
        np.array([1.0] * 4 + [2.0] * (N - 4)),
    ),
    "tensors": (pa.FixedShapeTensorArray.from_numpy_ndarray(TENSOR)[2:], TENSOR[2:]),
    "turned tensors": (
        pa.FixedShapeTensorArray.from_numpy_ndarray(TENSOR[2:].transpose(0, 2, 1)),
        TENSOR[2:].transpose(0, 2, 1),
    ),
    "chunks": (pa.chunked_array([PAIRS[:5, 1], PAIRS[5:, 1]]), PAIRS[:, 1]),
    "a slice": (pa.array(np.append([9.0, 9.0], PAIRS[:, 0]))[2:], PAIRS[:, 0]),
}
"""Columns as people have them in Parquet files, and their values; None for those of `to_pylist`."""
UNREADABLE: dict[str, tuple[pa.Array, str]] = {
    "nulls": (pa.array([1.0, None]), "has nulls (1 of 2)"),
    "nulls of integers": (pa.array([None, None, 1]), "has nulls (2 of 3)"),
    "nothing but nulls": (pa.nulls(2), "has nulls (2 of 2)"),
    "nulls in lists": (pa.array([[1.0, None], [2.0, 3.0]]), "has nulls (1 of 4)"),
    "a null in a dictionary": (
        pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([1.0, None])),
        "has nulls (1 of 2)",
    ),
    "ragged lists": (pa.array([[1.0], [1.0, 2.0]]), "has lists of 1 to 2 values"),
    "ragged lists of lists": (pa.array([[[1.0, 2.0], [3.0]]]), "has lists of 1 to 2 values"),
    "empty lists": (pa.array([[], []], pa.list_(pa.int8())), "has empty lists"),
    "texts": (pa.array(["a", "b"]), "is string"),
    "a dictionary of texts": (
        pa.array(["a", "b"]).dictionary_encode(),
        "is dictionary<values=string, indices=int32, ordered=0>",
    ),
    "lists of texts": (pa.array([["a"], ["b"]]), "is string"),
    "structs": (pa.array([{"a": 1.0}]), "is struct<a: double>"),
    "time stamps": (pa.array([0, 1], pa.timestamp("us")), "is timestamp[us]"),
    "dates": (pa.array([0, 1], pa.date32()), "is date32[day]"),
    "durations": (pa.array([0, 1], pa.duration("s")), "is duration[s]"),
    "times of day": (pa.array([0, 1], pa.time32("s")), "is time32[s]"),
    "decimals": (pa.array([decimal.Decimal("1.25")]), "is decimal128(3, 2)"),
    "bytes": (pa.array([b"ab"], pa.binary(2)), "is fixed_size_binary[2]"),
}


class TestColumns:
    @pytest.mark.parametrize("kind", READABLE)
    def test_numbers_of_one_shape_are_read_in_whatever_form(
        self, tmp_path: Path, kind: str
    ) -> None:
        column, expected = READABLE[kind]
        rows = pa.table({"x": column, "row": np.arange(N)})
        folder = prepare_dataset(GivenTables(train=rows, val=rows), tmp_path)
        found = open_split(folder, "train")["x"]
        if expected is None:
            assert found.tolist() == column.to_pylist()
        else:
            assert found.numpy().dtype == expected.dtype
            assert np.array_equal(found.numpy(), expected)

    @pytest.mark.parametrize("kind", UNREADABLE)
    def test_others_are_refused_when_the_data_set_is_made(self, tmp_path: Path, kind: str) -> None:
        column, problem = UNREADABLE[kind]
        splits = {"train": table(x=np.zeros(2)), "val": pa.table({"x": column})}
        with pytest.raises(DataError) as caught:
            prepare_dataset(GivenTables(**splits), tmp_path)
        message = str(caught.value)
        assert message.startswith(f"split 'val', column 'x' {problem}; training reads numbers")
        assert "\n" not in message
        assert list((tmp_path / "datasets").iterdir()) == []

    def test_a_name_that_is_there_twice_is_refused(self, tmp_path: Path) -> None:
        rows = pa.table([pa.array([1]), pa.array([2])], names=["x", "x"])
        with pytest.raises(DataError, match=r"^split 'train', column 'x' is there twice$"):
            prepare_dataset(GivenTables(train=rows, val=rows), tmp_path)
