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

from cluster.base.errors import DataError
from tests.trainers.data.given_tables import GivenTables, given_tables
from trainers.data.dataset import prepare_dataset, source_files
from trainers.data.splits import count_samples, open_split
from trainers.data.tables import table
from trainers.workload import Workload, load_workload


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
        together = threading.Barrier(2, timeout=20)

        class Slow(GivenTables):
            def dataset(self) -> dict[str, pa.Table]:
                together.wait()
                return super().dataset()

        workload = Slow(train=table(x=np.arange(5)), val=table(x=np.arange(5)))
        with ThreadPoolExecutor(2) as pool:
            folders = set(pool.map(lambda _: prepare_dataset(workload, tmp_path), range(2)))
        assert workload.made == 2
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
        files = [path.name for path in source_files(load_workload("folding"))]
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
        os.utime(path, ns=(1, 1))
        seen.add(prepare_dataset(workload, tmp_path))
        assert len(seen) == 3

    def test_a_new_data_set_of_the_same_name_is_read(self, tmp_path: Path) -> None:
        """Even though the machine's cache holds the decoded splits of the old one."""
        workload = given_tables(x=np.arange(3))
        folder = prepare_dataset(workload, tmp_path / "first")
        assert len(open_split(folder, "train")["x"]) == 3
        workload.splits = given_tables(x=np.arange(10, 15)).splits
        again = prepare_dataset(workload, tmp_path / "second")
        assert count_samples(again, "train") == 5
        assert open_split(again, "train")["x"].tolist() == [10, 11, 12, 13, 14]
