"""Data sets in parts: the same files on every machine, and no finished part is built again."""

from pathlib import Path
from typing import Any

import pytest

from cluster.base.errors import DataError
from heliostat.main import main
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import count_samples, open_split, read_dataset_manifest
from trainers.stores import MANIFEST
from trainers.workload import PartitionedWorkload, load_workload

SOURCE = '''
"""Five parts of numbers; each build leaves a mark, and one part may be broken."""

import secrets
from pathlib import Path

import numpy as np

from trainers import DataError, PartedWorkload, Spec, table


class Counted(PartedWorkload):
    class Data(Spec):
        marks: str  # a folder, with + for /: files at a real path would count as data
        broken: int = -1

    def mark(self, name):
        return Path(self.data.marks.replace("+", "/")) / name

    def parts(self):
        return list(range(5))

    def common(self, parts):
        self.mark(f"common-{secrets.token_hex(4)}").touch()
        return {"first.txt": b"100"}

    def part(self, part, common):
        self.mark(f"{part}-{secrets.token_hex(4)}").touch()
        if part == self.data.broken and not self.mark("repaired").exists():
            raise DataError("numbers.txt: line 7: is none")
        first = int(common["first.txt"]) + 10 * part
        made = {"train": table(x=np.arange(first, first + 10))}
        return made | ({"val": table(x=np.arange(first, first + 2))} if part % 2 else {})

    def build(self):
        raise NotImplementedError

    forward = loss = build
'''
WHOLE = [100 + i for i in range(50)]


@pytest.fixture
def marks(tmp_path: Path, modules: Path) -> Path:
    (modules / "counted.py").write_text(SOURCE)
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def counted(marks: Path, **data: Any) -> PartitionedWorkload:
    found = load_workload("counted:Counted")
    workload = found(found.Data(marks=str(marks).replace("/", "+"), **data), found.Model())
    assert isinstance(workload, PartitionedWorkload)
    return workload


def built(marks: Path) -> list[str]:
    """The parts that have been built so far, once for each build."""
    return sorted(path.name.partition("-")[0] for path in marks.glob("*-*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def test_parts_are_joined_in_their_order(marks: Path, tmp_path: Path) -> None:
    folder = prepare_dataset(counted(marks), tmp_path)
    files = read_dataset_manifest(folder)["files"]
    assert contents(folder).keys() == files.keys()
    assert sorted(files) == [
        "first.txt",
        *(f"train-0000{part}.parquet" for part in range(5)),
        *(f"val-0000{part}.parquet" for part in (1, 3)),
    ]
    assert (
        count_samples(folder, "train"),
        count_samples(folder, "val"),
        count_samples(folder, "test"),
    ) == (50, 4, 0)
    assert open_split(folder, "train")["x"].tolist() == WHOLE
    assert open_split(folder, "val")["x"].tolist() == [110, 111, 130, 131]
    assert prepare_dataset(counted(marks), tmp_path) == folder
    assert built(marks) == ["0", "1", "2", "3", "4", "common"]
    in_memory = counted(marks).dataset()
    assert in_memory["train"]["x"].to_pylist() == WHOLE


def test_a_build_continues_where_it_was_stopped(
    marks: Path, tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, as without Ray; a part with a damaged file is built again."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    workload = counted(marks, broken=3)
    with pytest.raises(DataError, match=r"^numbers.txt: line 7: is none$"):
        prepare_dataset(workload, tmp_path)
    assert built(marks) == ["0", "1", "2", "3", "common"]
    (half,) = (tmp_path / "datasets").glob(".*/train-00001.parquet")
    half.write_bytes(half.read_bytes()[:-1])
    (half.parent / ".train-00003.parquet.1234").write_bytes(b"left by a killed process")
    (marks / "repaired").touch()
    seen: list[tuple[int, int]] = []
    folder = prepare_dataset(workload, tmp_path, on_progress=lambda *counts: seen.append(counts))
    assert built(marks) == ["0", "1", "1", "2", "3", "3", "4", "common"]
    assert seen == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert open_split(folder, "train")["x"].tolist() == WHOLE
    assert contents(folder).keys() == read_dataset_manifest(folder)["files"].keys()


def test_ray_builds_the_same_bytes_and_raises_the_same_errors(
    marks: Path, tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = prepare_dataset(counted(marks), tmp_path / "there")
    with pytest.raises(DataError) as caught:
        prepare_dataset(counted(marks, broken=2), tmp_path / "there")
    assert str(caught.value) == "numbers.txt: line 7: is none"
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    here = prepare_dataset(counted(marks), tmp_path / "here")
    assert contents(there) == contents(here)


def test_the_command_builds_it_and_then_checks_it(
    marks: Path,
    tmp_path: Path,
    ray_cluster: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = str(marks).replace("/", "+")
    command = ["data", "counted:Counted", "--set", f"data.marks={plain}"]
    assert main(command) == 0
    first = capfd.readouterr().out
    assert first.startswith("5 parts\n")
    assert "train       50      5" in first
    assert main(command) == 0
    assert "is there, every checksum is right" in capfd.readouterr().out
    (file,) = Path("runs/datasets").glob("counted-*/val-00003.parquet")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(command) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{file.absolute()}: is not what the manifest says; remove ")


MIXED = """
import numpy as np
import pyarrow as pa

from trainers import PartitionedWorkload, Spec, table

KINDS = {
    "same": lambda: table(y=np.zeros(2), x=np.ones((2, 3), np.float32)),
    "dtype": lambda: table(x=np.ones((2, 3), np.int32), y=np.zeros(2)),
    "shape": lambda: table(x=np.ones((2, 3, 1), np.float32), y=np.zeros(2)),
    "scalar": lambda: table(x=np.ones((2, 3), np.float32), y=np.zeros(2, np.int64)),
    "missing": lambda: table(x=np.ones((2, 3), np.float32)),
    "more": lambda: table(x=np.ones((2, 3), np.float32), y=np.zeros(2), z=np.zeros(2)),
    "nulls": lambda: pa.table({"x": [[1.0, 1.0, 1.0]], "y": [None]}),
}


class Mixed(PartitionedWorkload):
    class Data(Spec):
        second: str

    def parts(self):
        return ["first", self.data.second]

    def part(self, part, common):
        first = table(x=np.ones((2, 3), np.float32), y=np.zeros(2))
        return {"train": first if part == "first" else KINDS[part](), "val": first}

    def build(self):
        raise NotImplementedError

    forward = loss = build
"""


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ("same", None),
        ("dtype", "column 'x' is <i4 [3] in part 1 and <f4 [3] in part 0"),
        ("shape", "column 'x' is <f4 [3, 1] in part 1 and <f4 [3] in part 0"),
        ("scalar", "column 'y' is int64 in part 1 and double in part 0"),
        ("missing", "column 'y' is absent in part 1 and double in part 0"),
        ("more", "column 'z' is double in part 1 and absent in part 0"),
        ("nulls", "column 'y' has nulls (1 of 1); training reads numbers"),
    ],
)
def test_parts_have_the_same_columns_in_any_order(
    modules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    second: str,
    problem: str | None,
) -> None:
    """Joined, the bytes of other parts would be read as numbers of the first one's type."""
    (modules / "mixed_parts.py").write_text(MIXED)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    found = load_workload("mixed_parts:Mixed")
    workload = found(found.Data(second=second), found.Model())
    if problem is None:
        split = open_split(prepare_dataset(workload, tmp_path), "train")
        assert split["x"].tolist() == [[1, 1, 1]] * 4
        assert split["y"].tolist() == [0] * 4
        return
    with pytest.raises(DataError) as caught:
        prepare_dataset(workload, tmp_path)
    assert str(caught.value).startswith(f"split 'train', {problem}")
