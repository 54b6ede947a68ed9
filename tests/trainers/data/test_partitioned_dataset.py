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
