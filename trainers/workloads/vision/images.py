"""Images and their labels from files: decoded, resized and split.

The docstring of `workload.py` describes the data.
"""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from cluster.base.errors import DataError
from trainers.data.tables import table
from trainers.workload import SplitFractions, Workload, shipped_or_path

# Suffixes: N images of the set, C channels, H x W pixels.

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats to decode. Pillow's other readers are stubs or start programs (Ghostscript)."""

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Images(Workload):
    """Base of workloads whose data are labelled images of one size."""

    class Data(SplitFractions):
        """The source of the images, and their form in the data set."""

        source: Annotated[str, shipped_or_path("digits")] = "digits"
        """digits; or a folder with one subfolder per class, a Parquet file, or a folder of Parquet
        files with the columns image (encoded) and label. Relative paths are made absolute."""
        size: Annotated[int, Field(ge=2, le=4096)] = 8
        """Height and width in pixels. Other images are resized to it."""
        channels: Literal[1, 3] = 1
        """1 for greyscale, 3 for RGB."""
        classes: Annotated[int, Field(ge=2)] = 10
        """Number of classes; checked against the data."""
        val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
        """Share of each class for validation, unless the source has its own val folder."""
        test_fraction: Fraction = 0.2
        """Share of each class for testing, unless the source is already split."""

    data: Data

    def dataset(self) -> dict[str, pa.Table]:
        found = {split: _decode(samples, self.data) for split, samples in _find_samples(self.data)}
        if "all" in found:
            found = _split_by_class(found["all"], self.data.val_fraction, self.data.test_fraction)
        elif "val" not in found:
            found |= _split_by_class(found["train"], self.data.val_fraction, 0.0)
        return {split: rows.drop_columns("key") for split, rows in found.items()}


class _Sample(NamedTuple):
    """An encoded image."""

    where: str
    content: bytes | Path
    label: int


def _find_samples(data: Images.Data) -> Iterator[tuple[str, list[_Sample]]]:
    """The source's splits; an unsplit source yields one split named `all`."""
    source = Path(data.source)
    if data.source == "digits":
        yield "all", _digits_samples(data)
    elif not source.exists():
        raise DataError(f"{source}: no such file or folder")
    elif source.is_file():
        yield "all", _parquet_samples(source, data)
    elif files := sorted(source.glob("[!.]*.parquet")):
        yield "all", [sample for file in files for sample in _parquet_samples(file, data)]
    elif not (source / "train").is_dir() or not _folders(source / "train"):
        yield "all", _folder_samples(source, data)
    else:
        for split, folder in _folders(source).items():
            if split not in ("train", "val", "test"):
                raise DataError(f"{folder}: only val and test are allowed beside train")
            if _folders(folder).keys() != _folders(source / "train").keys():
                raise DataError(f"{folder}: its class folders differ from those of train")
            yield split, _folder_samples(folder, data)


def _digits_samples(data: Images.Data) -> list[_Sample]:
    from sklearn.datasets import load_digits

    if data.classes != 10:
        raise DataError(f"digits: has 10 classes, data.classes is {data.classes}")
    bunch = load_digits()
    pixels_NHW = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    header = b"P5 8 8 255\n"  # makes a PGM file of raw pixels
    return [
        _Sample(f"digits: image {index}", header + pixels_HW.tobytes(), int(label))
        for index, (pixels_HW, label) in enumerate(zip(pixels_NHW, bunch.target, strict=True))
    ]


def _folders(path: Path) -> dict[str, Path]:
    """The subfolders that are not hidden, sorted by name."""
    return {p.name: p for p in sorted(path.iterdir()) if p.is_dir() and p.name[0] != "."}


def _folder_samples(path: Path, data: Images.Data) -> list[_Sample]:
    """The images of one subfolder per class, without hidden files and other kinds of files."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    folders = _folders(path)
    if len(folders) != data.classes:
        raise DataError(f"{path}: has {len(folders)} class folders, data.classes is {data.classes}")
    samples = []
    for label, folder in enumerate(folders.values()):
        files = [
            file
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in readable and "/." not in str(file).removeprefix(str(folder))
        ]
        if not files:
            raise DataError(f"{folder}: class folder without images")
        samples += [_Sample(str(file), file, label) for file in files]
    return samples


def _parquet_samples(path: Path, data: Images.Data) -> list[_Sample]:
    """The rows of a file whose images are encoded bytes, or structs with the bytes as `bytes`."""
    try:
        rows = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: is not readable as Parquet: {reason}") from None
    for column in ("image", "label"):
        if column not in rows.column_names:
            raise DataError(f"{path}: no column {column!r} (has: {', '.join(rows.column_names)})")
    if not pa.types.is_integer(rows.schema.field("label").type):
        raise DataError(f"{path}: label is {rows.schema.field('label').type}, not an integer")
    samples = []
    for number, columns in enumerate(rows.select(["image", "label"]).to_pylist()):
        row, image, label = f"{path}: row {number}", columns["image"], columns["label"]
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise DataError(f"{row}: image holds no encoded bytes")
        if label is None or not 0 <= label < data.classes:
            raise DataError(f"{row}: label {label} is out of range for data.classes {data.classes}")
        samples.append(_Sample(row, content, label))
    return samples


def _decode(samples: list[_Sample], data: Images.Data) -> pa.Table:
    """Columns image, label and key, a hash of the encoded image; sorted by key."""
    image_NCHW = np.empty((len(samples), data.channels, data.size, data.size), np.uint8)
    key_N = np.empty(len(samples), np.uint64)

    def decode(index: int) -> None:
        where, content, _ = samples[index]
        try:
            encoded = content.read_bytes() if isinstance(content, Path) else content
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                if image.mode[0] in "IF":  # Pillow would clip these to 255
                    raise ValueError(f"more than 8 bits per channel (mode {image.mode})")
                upright = ImageOps.exif_transpose(image)  # cameras set a flag only
                grey_or_rgb = upright.convert("L" if data.channels == 1 else "RGB")
                # Pillow's bilinear filter widens with the scale, which prevents aliasing.
                resized = grey_or_rgb.resize((data.size, data.size), Image.Resampling.BILINEAR)
        except UnidentifiedImageError:
            raise DataError(f"{where}: is not an image ({', '.join(FORMATS)})") from None
        except Exception as error:  # a broken file can make Pillow's decoders raise anything
            reason = str(error).partition("\n")[0]
            raise DataError(f"{where}: cannot be decoded: {reason}") from None
        pixels_HWC = np.asarray(resized).reshape(data.size, data.size, data.channels)
        image_NCHW[index] = pixels_HWC.transpose(2, 0, 1)
        key_N[index] = int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big")

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(samples))))  # raises the first error, drops the rest
    label_N = np.array([sample.label for sample in samples], np.int64)
    rows = table(image=image_NCHW, label=label_N, key=key_N)
    return rows.sort_by([("key", "ascending"), ("label", "ascending")])


def _split_by_class(rows: pa.Table, val: float, test: float) -> dict[str, pa.Table]:
    """Split each class in the order of the keys; copies of an image count as one."""
    key_N, label_N = rows["key"].to_numpy(), rows["label"].to_numpy()
    place_N = np.empty(len(rows))
    for label in np.unique(label_N):
        members = np.flatnonzero(label_N == label)
        keys, rank = np.unique(key_N[members], return_inverse=True)
        place_N[members] = (rank + 0.5) / len(keys)
    in_test, in_train = place_N < test, place_N >= test + val
    parts = {"train": in_train, "val": ~in_train & ~in_test, "test": in_test}
    return {split: rows.filter(pa.array(mask)) for split, mask in parts.items() if mask.any()}
