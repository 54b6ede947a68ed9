"""A data set is built once, whole, and anew when anything that it is made from changes."""

import hashlib
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.base.config import Spec
from cluster.base.errors import DataError
from tests.trainers.data.given_tables import GivenTables, given_tables
from trainers.data.dataset import dataset_name, prepare_dataset
from trainers.data.splits import count_samples, open_split
from trainers.data.tables import table
from trainers.data.workload_code import workload_code
from trainers.workload import Batch, Workload, load_workload


def whole_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestPrepare:
    def test_the_files_and_their_manifest(self, tmp_path: Path) -> None:
        parts = {"train": 7, "val": 3, "test": 2}
        workload = GivenTables(**{k: table(x=np.arange(n)) for k, n in parts.items()})
        folder = prepare_dataset(workload, tmp_path / "runs")
        files = whole_files(folder)
        manifest = json.loads(files.pop("manifest.json"))
        assert folder.parent == tmp_path / "runs" / "datasets"
        assert folder.name.startswith("giventables-")
        assert set(files) == {f"{split}.parquet" for split in parts}
        for split, count in parts.items():
            content = files[f"{split}.parquet"]
            assert manifest["files"][f"{split}.parquet"] == {
                "rows": count,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            assert count_samples(folder, split) == count
        assert count_samples(folder, "other") == 0
        assert manifest["data"] == {"number": workload.data.number, "source": ""}
        assert list(folder.parent.iterdir()) == [folder]

    def test_it_is_built_once(self, tmp_path: Path) -> None:
        workload = given_tables(x=np.arange(5))
        folder = prepare_dataset(workload, tmp_path)
        before = whole_files(folder)
        assert prepare_dataset(workload, tmp_path) == folder
        assert workload.made == 1
        assert whole_files(folder) == before

    def test_an_unfinished_data_set_is_built_again(self, tmp_path: Path) -> None:
        """A killed process leaves its files beside the final name, never under it."""
        workload = given_tables(x=np.arange(5))
        name = prepare_dataset(workload, tmp_path / "elsewhere").name
        left = tmp_path / "datasets" / f".{name}-killed"
        left.mkdir(parents=True)
        (left / "train.parquet").write_bytes(b"half")
        folder = prepare_dataset(workload, tmp_path)
        assert open_split(folder, "train")["x"].tolist() == [0, 1, 2, 3, 4]

    def test_other_users_can_read_it(self, tmp_path: Path) -> None:
        """Storage is shared; the permissions are those of the umask, as for any other folder."""
        folder = prepare_dataset(given_tables(x=np.arange(5)), tmp_path)
        assert folder.stat().st_mode == folder.parent.stat().st_mode

    def test_two_processes_that_build_it_at_once_get_one_data_set(self, tmp_path: Path) -> None:
        """Each is building while the other one is."""
        together, building = threading.Barrier(2, timeout=120), list[int]()

        class Slow(GivenTables):
            def dataset(self) -> dict[str, pa.Table]:
                building.append(together.wait())
                return super().dataset()

        workload = Slow(train=table(x=np.arange(5)), val=table(x=np.arange(5)))
        with ThreadPoolExecutor(2) as pool:
            folders = set(pool.map(lambda _: prepare_dataset(workload, tmp_path), range(2)))
        assert sorted(building) == [0, 1]
        assert list((tmp_path / "datasets").iterdir()) == [*folders]
        assert open_split(folders.pop(), "train")["x"].tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("split", ["train", "val"])
    @pytest.mark.parametrize("left", ["absent", "empty"])
    def test_train_and_val_are_required(self, tmp_path: Path, split: str, left: str) -> None:
        splits = {"train": table(x=np.arange(4)), "val": table(x=np.arange(4))}
        splits[split] = splits[split].slice(0, 0)
        if left == "absent":
            del splits[split]
        with pytest.raises(DataError) as caught:
            prepare_dataset(GivenTables(**splits), tmp_path)
        assert (
            str(caught.value)
            == f"the data set of giventables has no samples in its split {split!r}"
        )
        assert list((tmp_path / "datasets").iterdir()) == []

    def test_a_missing_split_is_reported(self, tmp_path: Path) -> None:
        folder = prepare_dataset(given_tables(x=np.arange(4)), tmp_path)
        with pytest.raises(DataError) as caught:
            open_split(folder, "test")
        assert str(caught.value) == f"{folder / 'test.parquet'}: no such split"


class TestFingerprint:
    def own(self, **data: Any) -> Workload:
        sys.modules.pop("spirals", None)
        own = load_workload("spirals:Spirals")
        return own(own.Data(**data), own.Model())

    def test_covers_the_data_section_and_the_code(self, own_folder: Path) -> None:
        first = prepare_dataset(self.own(), own_folder)
        assert prepare_dataset(self.own(points=400), own_folder) == first
        fewer = prepare_dataset(self.own(points=200), own_folder)
        source = own_folder / "spirals.py"
        source.write_text(source.read_text().replace("default_rng(0)", "default_rng(20)"))
        recoded = prepare_dataset(self.own(), own_folder)
        assert len({first, fewer, recoded}) == 3
        assert count_samples(fewer, "train") == 140
        points = [open_split(folder, "train")["point"] for folder in (first, recoded)]
        assert not torch.equal(*points)

    def test_covers_all_modules_of_a_shipped_workload(self) -> None:
        """Its package also has modules that define none of its classes."""
        files = [path.name for path in workload_code(load_workload("folding")).files]
        assert files == sorted(files)
        assert {"folds.py", "proteins.py", "structures.py", "workload.py"} <= set(files)

    @pytest.mark.parametrize("shape", ["folder", "file"])
    def test_covers_the_files_that_it_names(self, tmp_path: Path, shape: str) -> None:
        folder = tmp_path / "source"
        (folder / "inner").mkdir(parents=True)
        path = folder / "inner" / "a.csv"
        path.write_text("1")
        workload = given_tables(x=np.arange(4))
        workload.data = GivenTables.Data(
            number=0, source=str(folder if shape == "folder" else path)
        )
        seen = {prepare_dataset(workload, tmp_path), prepare_dataset(workload, tmp_path)}
        assert len(seen) == 1
        path.write_text("22")
        seen.add(prepare_dataset(workload, tmp_path))
        assert len(seen) == 2

    @pytest.mark.parametrize(
        "section",
        [
            {"source": "points.csv"},
            {"source": "./points.csv"},
            {"source": "folder"},
            {"source": "*.csv"},
            {"files": ["points.csv"]},
            {"parts": {"a": {"path": "points.csv"}}},
            {"parts": {"points.csv": {"path": "?"}}},
            {"inner": {"pair": ("points.csv", 1)}},
            {"inner": {"path": "points.csv"}},
            {"inner": {"several": ["points.csv"]}},
        ],
        ids=[
            *("name", "relative", "folder", "wildcard", "list", "nested", "key"),
            *("tuple", "path", "set"),
        ],
    )
    def test_covers_any_path_at_any_depth(self, own_folder: Path, section: dict[str, Any]) -> None:
        """By the contents: a file that was only touched or copied is the same data."""
        path = own_folder / ("folder/a.csv" if "folder" in section.values() else "points.csv")
        path.parent.mkdir(exist_ok=True)
        workload = NamedFiles(NamedFiles.Data(**section), None)

        def name() -> str:
            return dataset_name(workload, own_folder / "runs")

        path.write_text("1,0\n")
        first = name()
        os.utime(path, ns=(1, 1))
        assert name() == first
        path.write_text("2,0\n")  # of the same size, with the same time
        os.utime(path, ns=(1, 1))
        second = name()
        assert second != first
        path.write_text("1,0\n")
        assert name() == first
        (own_folder / "runs").mkdir()
        (own_folder / "runs" / "other").write_text("no data")
        assert name() == first

    def test_a_changed_file_is_read(self, own_folder: Path) -> None:
        """`points.csv` in the working folder, changed within a moment to others of its size."""
        workload = NamedFiles(NamedFiles.Data(source="points.csv"), None)
        for value in (1.5, 2.5, 3.5):
            Path("points.csv").write_text(f"{value}\n{value}\n")
            split = open_split(prepare_dataset(workload, own_folder), "train")
            assert split["x"].tolist() == [value, value]

    def test_what_is_no_data_is_not_read(self, own_folder: Path) -> None:
        """Separators, texts that are too long for a path, the folder of the runs."""
        storage = own_folder / "runs"
        texts = [
            "/",
            "~",
            "",
            ".",
            "runs",
            ".*",
            "**",
            "x" * 5000,
            "a\0b",
            "s3://bucket/points.csv",
        ]
        workload = NamedFiles(NamedFiles.Data(files=texts), None)
        first = dataset_name(workload, storage)
        (storage / "datasets").mkdir(parents=True)
        for path in (storage / "a", storage / "datasets" / "b", Path("mlflow.db"), Path(".hidden")):
            path.write_text("changes with every run")
        assert dataset_name(workload, storage) == first
        named_like_fields = NamedFiles(NamedFiles.Data(), None)
        before = dataset_name(named_like_fields, storage)
        Path("source").write_text("1")
        Path("inner").mkdir()
        Path("inner/path").write_text("1")
        assert dataset_name(named_like_fields, storage) == before
        first = dataset_name(workload, storage)
        Path("points.csv").write_text("1")
        assert dataset_name(workload, storage) != first

    def test_a_file_that_cannot_be_read_is_named(
        self, own_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("points.csv").write_text("1")

        opened = Path.open

        def refused(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.name == "points.csv":
                raise PermissionError(13, "Permission denied", path)
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refused)
        workload = NamedFiles(NamedFiles.Data(source="points.csv"), None)
        with pytest.raises(DataError, match=r"^data: .*/points\.csv: Permission denied$"):
            dataset_name(workload, own_folder)

    def test_a_new_data_set_of_the_same_name_is_read(self, tmp_path: Path) -> None:
        """Even though the machine's cache holds the decoded splits of the old one."""
        workload = given_tables(x=np.arange(3))
        folder = prepare_dataset(workload, tmp_path / "first")
        assert len(open_split(folder, "train")["x"]) == 3
        workload.splits = given_tables(x=np.arange(10, 15)).splits
        again = prepare_dataset(workload, tmp_path / "second")
        assert count_samples(again, "train") == 5
        assert open_split(again, "train")["x"].tolist() == [10, 11, 12, 13, 14]


class Inner(Spec):
    pair: tuple[str, int] = ("", 0)
    path: Path = Path()
    several: frozenset[str] = frozenset()


class NamedFiles(Workload):
    """A data set of the numbers in a file; its fields may name files anywhere."""

    class Data(Spec):
        source: str = ""
        files: list[str] = []
        parts: dict[str, dict[str, str]] = {}
        inner: Inner = Inner()

    def dataset(self) -> dict[str, pa.Table]:
        rows = table(x=np.loadtxt(self.data.source, dtype=np.float32, ndmin=1))
        return {"train": rows, "val": rows}

    def build(self) -> torch.nn.Module:
        raise NotImplementedError

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        raise NotImplementedError

    def loss(self, output: Any, batch: Batch) -> torch.Tensor:
        raise NotImplementedError


class TestWrongDataset:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                None,
                "Given.dataset must return a dictionary of tables, {'train': ..., 'val': ...} "
                "(got NoneType)",
            ),
            (
                {"train": [1, 2], "val": [3]},
                "split 'train' is a list; it must be a pyarrow.Table (trainers.table makes one)",
            ),
            (
                {"train": table(x=np.arange(2)), "validation": table(x=np.arange(2))},
                "the data set of given has no samples in its split 'val'; it has 'validation'",
            ),
        ],
    )
    def test_other_things_than_tables_are_refused(
        self, tmp_path: Path, given: Any, message: str
    ) -> None:
        class Given(GivenTables):
            def dataset(self) -> Any:
                return given

        with pytest.raises(DataError) as caught:
            prepare_dataset(Given(), tmp_path)
        assert str(caught.value) == message
