"""Text as windows of tokens: documents from files, their splits and the tokenizer.

The docstring of `workload.py` describes the data.
"""

import functools
import hashlib
import itertools
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cluster.base.errors import DataError, SpecError
from trainers.data.tables import table
from trainers.workload import PartitionedWorkload, SplitFractions, shipped_or_path

# Suffixes: N tokens of a text.

PART_BYTES = 4 << 20
"""Size of a part's text; may be exceeded, since records are not cut."""
TOKENIZER_TRAINING_BYTES = 64 << 20
"""Amount of training text, from the first parts, that trains the tokenizer."""
TOKENIZER, SEPARATOR = "tokenizer.json", "<|end|>"
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library to leave out."""


class Span(NamedTuple):
    """The lines of a file that begin in the bytes [start, stop); for Parquet, its row groups."""

    path: str
    start: int
    stop: int
    size: int
    """In bytes; approximate for Parquet."""


class TextPart(NamedTuple):
    """A part of the data set: some spans, and the shares of their documents for val and test."""

    val: float
    test: float
    spans: tuple[Span, ...]


class Text(PartitionedWorkload):
    """Base of workloads whose data is text, in windows of `context` + 1 tokens."""

    class Data(SplitFractions):
        """The source of the text, and its form in the data set."""

        source: Annotated[str, shipped_or_path("stdlib")] = "stdlib"
        """stdlib, a file, or a folder of files. Relative paths are made absolute."""
        field: str = "text"
        """The column of Parquet files, or the key of JSON lines (.jsonl), that holds the text."""
        vocabulary: Annotated[int, Field(ge=256, le=1 << 20)] = 256
        """Number of tokens: 256 are the bytes; with more, byte-pair encoding is trained."""
        context: PositiveInt = 256
        """Tokens per window."""
        val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
        """Share of the documents for validation, unless the source has its own val folder."""
        test_fraction: Fraction = 0.1
        """Share of the documents for testing, unless the source is already split."""

    data: Data

    def made_with(self) -> dict[str, str]:
        used = {"python": platform.python_version()} if self.data.source == "stdlib" else {}
        if self.data.vocabulary > 256:
            try:
                used["tokenizers"] = version("tokenizers")
            except PackageNotFoundError:
                raise SpecError(
                    "data.vocabulary: more than 256 takes tokenizers, which is not installed "
                    "(pip install 'heliostat[language]')"
                ) from None
        return used

    def parts(self) -> list[TextPart]:
        return [
            TextPart(val, test, pack)
            for val, test, spans in _source_spans(self.data)
            for pack in _pack_spans(spans)
        ]

    def common(self, parts: Sequence[TextPart]) -> dict[str, bytes]:
        if self.data.vocabulary == 256:
            return {}
        return {TOKENIZER: _train_tokenizer(self._training_texts(parts), self.data.vocabulary)}

    def part(self, part: TextPart, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        documents: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
        for split, document in self.documents(part):
            documents[split].append(document)
        encode = _encode_bytes
        if self.data.vocabulary > 256:
            encode = functools.partial(_encode_byte_pairs, tokenizer=common[TOKENIZER])
        tables = {split: self._windows(*encode(found)) for split, found in documents.items()}
        return {split: rows for split, rows in tables.items() if len(rows)}

    def documents(self, part: TextPart) -> Iterator[tuple[str, bytes]]:
        """The documents of a part, each with its split."""
        for span in part.spans:
            for document in _documents(span, self.data.field):
                place = int.from_bytes(hashlib.sha256(document).digest()[:8], "big") / 2**64
                held_out = "val" if place < part.test + part.val else "train"
                yield "test" if place < part.test else held_out, document

    def _training_texts(self, parts: Sequence[TextPart]) -> Iterator[str]:
        size = 0
        for part in parts:
            for split, document in self.documents(part):
                if split == "train" and size < TOKENIZER_TRAINING_BYTES:
                    size += len(document)
                    yield document.decode()
            if size >= TOKENIZER_TRAINING_BYTES:
                return

    def _windows(self, tokens_N: npt.NDArray[Any], bytes_N: npt.NDArray[np.int64]) -> pa.Table:
        """Windows that overlap by one token: the last of a window is the first of the next."""
        context = self.data.context
        count = max(0, len(tokens_N) - 1) // context
        place = np.arange(count)[:, None] * context + np.arange(context + 1)
        return table(
            tokens=tokens_N[place],
            bytes=bytes_N[place[:, 1:]].sum(1).astype(np.int32),
        )


def _source_spans(data: Text.Data) -> Iterator[tuple[float, float, list[Span]]]:
    """Spans of the source, with the shares of their documents for validation and testing."""
    val, test = data.val_fraction, data.test_fraction
    source = Path(data.source)
    if data.source == "stdlib":
        yield val, test, _file_spans(_standard_library())
    elif not source.exists():
        raise DataError(f"{source}: no such file or folder")
    elif source.is_file() and source.suffix not in (".jsonl", ".parquet"):
        size = source.stat().st_size
        first, second = round(size * (1 - val - test)), round(size * (1 - test))
        yield 0.0, 0.0, _split_file(source, 0, first, PART_BYTES)
        yield 1.0, 0.0, _split_file(source, first, second, PART_BYTES)
        yield 0.0, 1.0, _split_file(source, second, size, PART_BYTES)
    elif source.is_file():
        yield val, test, _file_spans([source])
    elif not (source / "train").is_dir():
        yield val, test, _file_spans(_visible_files(source))
    else:
        own_val = (source / "val").is_dir()
        yield 0.0 if own_val else val, 0.0, _file_spans(_visible_files(source / "train"))
        yield 1.0, 0.0, _file_spans(_visible_files(source / "val"))
        yield 0.0, 1.0, _file_spans(_visible_files(source / "test"))


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        path
        for path in root.rglob("*.py")
        if EXCLUDED_FOLDERS.isdisjoint(path.parts[len(root.parts) :])
    ]
    return sorted(found)


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder, except hidden ones."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return [folder / path for path in sorted(found) if not any(p[0] == "." for p in path.parts)]


def _file_spans(files: Iterable[Path]) -> list[Span]:
    """Plain files become one span each, files of records several."""
    spans = []
    for path in files:
        if path.suffix == ".parquet":
            with _open_parquet(path) as file:
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).total_byte_size
                    spans.append(Span(str(path), group, group + 1, size))
        else:
            size = path.stat().st_size
            step = PART_BYTES if path.suffix == ".jsonl" else max(1, size)
            spans += _split_file(path, 0, size, step)
    return spans


def _split_file(path: Path, start: int, stop: int, step: int) -> list[Span]:
    ends = [*range(start, stop, step), stop]
    return [Span(str(path), low, high, high - low) for low, high in itertools.pairwise(ends)]


def _pack_spans(spans: Iterable[Span]) -> Iterator[tuple[Span, ...]]:
    """Consecutive spans grouped to about PART_BYTES."""
    pack: list[Span] = []
    size = 0
    for span in spans:
        pack.append(span)
        size += span.size
        if size >= PART_BYTES:
            yield tuple(pack)
            pack, size = [], 0
    if pack:
        yield tuple(pack)


def _documents(span: Span, field: str) -> Iterator[bytes]:
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


EncodedText = tuple[npt.NDArray[Any], npt.NDArray[np.int64]]
"""Tokens [N], and the number of text bytes of each."""


def _encode_bytes(documents: Sequence[bytes]) -> EncodedText:
    """Each byte is a token; byte 0, which does not occur in text, ends a document."""
    tokens_N = np.frombuffer(b"".join(document + b"\0" for document in documents), np.uint8)
    return tokens_N, np.ones(len(tokens_N), np.int64)


def _train_tokenizer(texts: Iterator[str], vocabulary: int) -> bytes:
    """Train a byte-pair tokenizer; returns it as a file of the `tokenizers` library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content: str = tokenizer.to_str()
    return content.encode()


def _encode_byte_pairs(documents: Sequence[bytes], tokenizer: bytes) -> EncodedText:
    """Encode by byte pairs. A token's name has one character for each of its bytes."""
    from tokenizers import Tokenizer

    merged = Tokenizer.from_str(tokenizer.decode())
    merged.encode_special_tokens = True  # the separator's name may occur in a text
    size, end = merged.get_vocab_size(), merged.token_to_id(SEPARATOR)
    length_V = np.array([len(merged.id_to_token(token) or "") for token in range(size)])
    length_V[end] = 1
    encoded = merged.encode_batch([document.decode() for document in documents])
    tokens = [token for each in encoded for token in (*each.ids, end)]
    tokens_N = np.array(tokens, np.int16 if size <= 1 << 15 else np.int32)
    return tokens_N, length_V[tokens_N]
