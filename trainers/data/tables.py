"""Columns of numbers as Arrow tables: written from numpy arrays, read as tensors without a copy."""

import json
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from cluster.base.errors import DataError

NumberArray = npt.NDArray[Any]
HINTS = (
    (pa.types.is_temporal, "cast it to int64 or float64"),
    (pa.types.is_decimal, "cast it to float64"),
    (pa.types.is_string, "give each text a number"),
    (pa.types.is_large_string, "give each text a number"),
    (pa.types.is_struct, "give each field a column of its own"),
)
"""What to do about a type of column that training cannot read."""


class _NotNumbersError(Exception):
    """A column that training cannot read; the message is the rest of the sentence about it."""


def table(**columns: npt.ArrayLike) -> pa.Table:
    """A table from numpy arrays [N] or [N, ...] of numbers, real or complex; the same N for all.

    Rows with more than one number become fixed-size binary, which Parquet reads 6 to 11 times
    faster than lists. Their shape and dtype are kept in the column's metadata. Raises DataError
    for anything else than an array of numbers (or pandas and PyTorch's equivalents).
    """
    fields: list[pa.Field] = []
    arrays: list[pa.Array] = []
    for name, given in columns.items():
        try:
            values = _as_array(given)
        except _NotNumbersError as error:
            raise DataError(f"table: column {name!r} {error}") from None
        if arrays and len(values) != len(arrays[0]):
            raise DataError(
                f"table: column {name!r} has {len(values)} rows and column {fields[0].name!r} "
                f"has {len(arrays[0])}; a sample has one row of each"
            )
        field, array = _stored(name, values)
        fields.append(field)
        arrays.append(array)
    return pa.table(arrays, schema=pa.schema(fields))


def _as_array(given: Any) -> NumberArray:
    of_pandas = hasattr(given, "isna") and not isinstance(getattr(given, "dtype", None), np.dtype)
    if np.ma.is_masked(given) or (of_pandas and np.any(given.isna())):
        raise _NotNumbersError("has missing values; training reads numbers: fill them in")
    of_arrow = isinstance(given, pa.Array | pa.ChunkedArray)
    if of_arrow or not hasattr(given, "__array__"):
        raise _NotNumbersError(
            f"is a {type(given).__name__}; give a numpy array of numbers [N] or [N, ...]"
        )
    try:
        values = np.asarray(given)
        torch.from_numpy(np.empty(0, values.dtype.newbyteorder("=")))
    except (TypeError, RuntimeError):
        kind = getattr(given, "dtype", type(given).__name__)
        raise _NotNumbersError(f"is {kind}; training reads numbers") from None
    if values.ndim == 0:
        raise _NotNumbersError("is a single number; give one row for each sample")
    if 0 in values.shape[1:]:
        raise _NotNumbersError(f"has no numbers in its rows of shape {list(values.shape[1:])}")
    return values


def _stored(name: str, values: NumberArray) -> tuple[pa.Field, pa.Array]:
    """A column and its field as they are written."""
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    if values.ndim == 1 and values.dtype.kind in "iuf":  # Arrow packs booleans into bits
        array = pa.array(values)
        return pa.field(name, array.type, nullable=False), array
    row_bytes = values.dtype.itemsize * int(np.prod(values.shape[1:]))
    row = pa.binary(row_bytes)
    array = pa.FixedSizeBinaryArray.from_buffers(row, len(values), [None, pa.py_buffer(values)])
    shape = {"dtype": values.dtype.str, "shape": json.dumps(values.shape[1:])}
    return pa.field(name, row, nullable=False, metadata=shape), array


def stored_table(split: str, rows: Any) -> pa.Table:
    """A split of a workload's data set as it is written: as `table` would, with equal values.

    Its columns may hold whatever Arrow has for numbers of one shape: also booleans, lists,
    tensors, and dictionaries of numbers. Raises DataError, which names the split and the column,
    for anything else, and for nulls.
    """
    if not isinstance(rows, pa.Table):
        raise DataError(
            f"split {split!r} is a {type(rows).__name__}; it must be a pyarrow.Table "
            "(trainers.table makes one)"
        )
    if not len(rows):
        return rows
    fields, arrays = [], []
    for field, column in zip(rows.schema, rows.columns, strict=True):
        try:
            if rows.column_names.count(field.name) > 1:
                raise _NotNumbersError("is there twice")
            if _is_stored(field, column):
                fields.append(field.with_nullable(False))
                arrays.append(column)
                continue
            stored, array = _stored(field.name, _numbers(column.combine_chunks()))
        except _NotNumbersError as error:
            raise DataError(f"split {split!r}, column {field.name!r} {error}") from None
        fields.append(stored)
        arrays.append(array)
    return pa.table(arrays, schema=pa.schema(fields))


def _is_stored(field: pa.Field, column: pa.ChunkedArray) -> bool:
    """Whether the column is as `_stored` makes it."""
    _check_no_nulls(column)
    if pa.types.is_fixed_size_binary(field.type):
        return field.metadata is not None and b"shape" in field.metadata
    return bool(pa.types.is_integer(field.type) or pa.types.is_floating(field.type))


def _check_no_nulls(array: pa.Array | pa.ChunkedArray) -> None:
    if array.null_count:
        raise _NotNumbersError(
            f"has nulls ({array.null_count:,} of {len(array):,}); training reads numbers: fill "
            "them in, or leave these rows out"
        )


def _numbers(array: pa.Array) -> NumberArray:
    """The numbers of an Arrow array [N, ...]. Raises _NotNumbersError."""
    import pyarrow.compute as pc

    kind = array.type
    if isinstance(kind, pa.FixedShapeTensorType):
        _check_no_nulls(array.storage.flatten())
        tensor: NumberArray = array.to_numpy_ndarray()
        return tensor
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
    elif pa.types.is_run_end_encoded(kind):
        array = pc.run_end_decode(array)
    _check_no_nulls(array)
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if any(is_list(array.type) for is_list in lists):
        lengths = pc.min_max(pc.list_value_length(array)).as_py()
        if lengths["min"] != lengths["max"]:
            raise _NotNumbersError(
                f"has lists of {lengths['min']} to {lengths['max']} values; training reads "
                "numbers of one shape: pad them, with their lengths as another column"
            )
        if not lengths["max"]:
            raise _NotNumbersError("has empty lists; training reads numbers")
        inner = _numbers(array.flatten())
        return inner.reshape(len(array), lengths["max"], *inner.shape[1:])
    numeric = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)
    if any(is_numeric(array.type) for is_numeric in numeric):
        values: NumberArray = array.to_numpy(zero_copy_only=False)
        return values
    hints = [hint for is_kind, hint in HINTS if is_kind(array.type)]
    raise _NotNumbersError(
        f"is {kind}; training reads numbers of one shape: "
        + (hints[0] if hints else "trainers.table makes such columns")
    )


def column_tensor(field: pa.Field, column: pa.ChunkedArray) -> Tensor:
    """A read-only tensor that shares the column's memory; DataError if it holds no numbers."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_fixed_size_binary(field.type) and field.metadata:
        dtype = np.dtype(field.metadata[b"dtype"].decode())
        shape = json.loads(field.metadata[b"shape"])
        values = np.frombuffer(array.buffers()[1], dtype).reshape(-1, *shape)
        values = values[array.offset : array.offset + len(array)]
    elif array.null_count == 0 and (
        pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    ):
        values = np.from_dlpack(array)  # `to_numpy` imports pandas
    else:
        raise DataError(
            f"column {field.name!r} is {field.type}; training reads numbers of one shape "
            "(trainers.table makes such columns)"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(values)
