"""Documents from plain files, JSON lines and Parquet, and the spans that divide large files."""

import itertools
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.base.errors import DataError

EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library to leave out."""


class Span(NamedTuple):
    """The lines of a file that begin in the bytes [start, stop); for Parquet, its row groups."""

    path: str
    start: int
    stop: int
    size: int
    """In bytes; approximate for Parquet."""


def standard_library_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        path
        for path in root.rglob("*.py")
        if EXCLUDED_FOLDERS.isdisjoint(path.parts[len(root.parts) :])
    ]
    return sorted(found)


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder, except hidden ones."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return [folder / path for path in sorted(found) if not any(p[0] == "." for p in path.parts)]


def file_spans(files: Iterable[Path], span_bytes: int) -> list[Span]:
    """Each plain file as one span, and files of records as several."""
    spans = []
    for path in files:
        if path.suffix == ".parquet":
            with _open_parquet(path) as file:
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).total_byte_size
                    spans.append(Span(str(path), group, group + 1, size))
        else:
            size = path.stat().st_size
            step = span_bytes if path.suffix == ".jsonl" else max(1, size)
            spans += split_file(path, 0, size, step)
    return spans


def split_file(path: Path, start: int, stop: int, step: int) -> list[Span]:
    """Spans of `step` bytes between `start` and `stop`."""
    ends = [*range(start, stop, step), stop]
    return [Span(str(path), low, high, high - low) for low, high in itertools.pairwise(ends)]


def read_documents(span: Span, field: str) -> Iterator[bytes]:
    """The documents of a span that are not empty, as UTF-8."""
    path = Path(span.path)
    if path.suffix == ".parquet":
        found: Iterable[bytes] = _parquet_documents(path, span.start, field)
    elif path.suffix == ".jsonl":
        found = _json_documents(span, field)
    else:
        text = b"".join(_lines(span))
        _check_utf8(text, span)
        found = [text]
    yield from (document for document in found if document)


def _lines(span: Span) -> Iterator[bytes]:
    """The lines that begin in a span; a line that begins before it belongs to another span."""
    with Path(span.path).open("rb") as file:
        if span.start:
            file.seek(span.start - 1)
            file.readline()
        while file.tell() < span.stop:
            yield file.readline()


def _check_utf8(text: bytes, span: Span) -> None:
    """Raise DataError unless the text is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        line = _line_number(span, text[: error.start].count(b"\n"))
        raise DataError(f"{span.path}: line {line}: is not UTF-8 ({error.reason})") from None


def _line_number(span: Span, index: int) -> int:
    """The line number in its file, from 1, of a span's line."""
    with Path(span.path).open("rb") as file:
        before = file.read(span.start).count(b"\n")
        if span.start:
            file.seek(span.start - 1)
            before += file.read(1) != b"\n"
    return before + index + 1


def _json_documents(span: Span, field: str) -> Iterator[bytes]:
    for index, line in enumerate(_lines(span)):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            where = f"{span.path}: line {_line_number(span, index)}"
            reason = getattr(error, "msg", error)
            raise DataError(f"{where}: is not JSON: {reason}") from None
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            where = f"{span.path}: line {_line_number(span, index)}"
            raise DataError(f"{where}: has no text under {field!r} (data.field)")
        yield text.encode(errors="replace")  # JSON can contain lone surrogates


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: is not readable as Parquet: {reason}") from None


def _parquet_documents(path: Path, group: int, field: str) -> Iterator[bytes]:
    with _open_parquet(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise DataError(f"{path}: no column {field!r} (data.field; has: {', '.join(names)})")
        first = sum(file.metadata.row_group(each).num_rows for each in range(group))
        try:
            column = file.read_row_group(group, [field])[field].to_pylist()
        except (pa.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{path}: row {first}: cannot be read: {reason}") from None
    for row, text in enumerate(column, start=first):
        if not isinstance(text, str):
            raise DataError(f"{path}: row {row}: {field} holds no text")
        yield text.encode()
