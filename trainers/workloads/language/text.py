"""Text as windows of tokens: documents from files, their splits and the tokenizer.

The docstring of `workload.py` describes the data.
"""

import functools
import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from cluster.base.errors import DataError, SpecError
from trainers.data.tables import table
from trainers.workload import PartitionedWorkload, SplitFractions, shipped_or_path
from trainers.workloads.language.documents import (
    Span,
    file_spans,
    read_documents,
    split_file,
    standard_library_files,
    visible_files,
)
from trainers.workloads.language.tokenizer import (
    TOKENIZER_FILE,
    encode_byte_pairs,
    encode_bytes,
    train_tokenizer,
)

# Suffix: N tokens of a text.

PART_BYTES = 4 << 20
"""Size of a part's text; may be exceeded, since records are not cut."""
TOKENIZER_TRAINING_BYTES = 64 << 20
"""Amount of training text, from the first parts, that trains the tokenizer."""
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


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
                    "data.vocabulary: more than 256 needs the package tokenizers, which is not "
                    "installed (pip install 'heliostat[language]')"
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
        return {TOKENIZER_FILE: train_tokenizer(self._training_texts(parts), self.data.vocabulary)}

    def part(self, part: TextPart, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        documents: dict[str, list[bytes]] = {"train": [], "val": [], "test": []}
        for split, document in self.documents(part):
            documents[split].append(document)
        encode = encode_bytes
        if self.data.vocabulary > 256:
            encode = functools.partial(encode_byte_pairs, tokenizer=common[TOKENIZER_FILE])
        tables = {split: self._windows(*encode(found)) for split, found in documents.items()}
        return {split: rows for split, rows in tables.items() if len(rows)}

    def documents(self, part: TextPart) -> Iterator[tuple[str, bytes]]:
        """The documents of a part, each with its split."""
        for span in part.spans:
            for document in read_documents(span, self.data.field):
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
        yield val, test, file_spans(standard_library_files(), PART_BYTES)
    elif not source.exists():
        raise DataError(f"{source}: no such file or folder")
    elif source.is_file() and source.suffix not in (".jsonl", ".parquet"):
        size = source.stat().st_size
        first, second = round(size * (1 - val - test)), round(size * (1 - test))
        yield 0.0, 0.0, split_file(source, 0, first, PART_BYTES)
        yield 1.0, 0.0, split_file(source, first, second, PART_BYTES)
        yield 0.0, 1.0, split_file(source, second, size, PART_BYTES)
    elif source.is_file():
        yield val, test, file_spans([source], PART_BYTES)
    elif not (source / "train").is_dir():
        yield val, test, file_spans(visible_files(source), PART_BYTES)
    else:
        own_val = (source / "val").is_dir()
        yield 0.0 if own_val else val, 0.0, file_spans(visible_files(source / "train"), PART_BYTES)
        yield 1.0, 0.0, file_spans(visible_files(source / "val"), PART_BYTES)
        yield 0.0, 1.0, file_spans(visible_files(source / "test"), PART_BYTES)


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
