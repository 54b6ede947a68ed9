"""Data sets are made once and read exactly; the order of samples is a function of the position."""

import hashlib
import itertools
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cluster.base.config import Spec
from cluster.base.errors import DataError
from trainers.data.dataset import prepare_dataset
from trainers.data.sampling import SampleStream, epoch_permutation, shard_bounds
from trainers.data.splits import count_samples, open_split
from trainers.data.tables import table
from trainers.workload import Batch, Workload, load_workload

NUMBER = itertools.count()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded splits of these tests stay out of the machine's cache."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Given(Workload):
    """A data set of given tables. Each instance has a data section of its own."""

    class Data(Spec):
        number: int
        source: str = ""

    def __init__(self, source: str = "", **splits: pa.Table) -> None:
        super().__init__(self.Data(number=next(NUMBER), source=source), self.Model())
        self.splits = splits
        self.made = 0

    def dataset(self) -> dict[str, pa.Table]:
        self.made += 1
        return self.splits

    def build(self) -> torch.nn.Module:
        raise NotImplementedError

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        raise NotImplementedError

    def loss(self, output: Any, batch: Batch) -> torch.Tensor:
        raise NotImplementedError


def both(**columns: npt.NDArray[Any]) -> Given:
    """A data set whose two splits are alike."""
    return Given(train=table(**columns), val=table(**columns))


def whole_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


DTYPES = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
DTYPES += ["float16", "float32", "float64", "bool"]


class TestTable:
    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(
        max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(data=st.data())
    def test_every_dtype_and_shape_comes_back_bit_by_bit(
        self, tmp_path: Path, dtype: str, data: st.DataObject
    ) -> None:
        shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
        values = data.draw(hnp.arrays(np.dtype(dtype), shape))
        folder = prepare_dataset(both(x=values), tmp_path)
        back = open_split(folder, "train")["x"]
        assert back.dtype == torch.from_numpy(values[:1].copy()).dtype
        assert tuple(back.shape) == shape
        assert back.numpy().tobytes() == values.tobytes()
        _, batch = SampleStream({"x": back}, seed=0, global_batch=3).batch(0)
        assert batch["x"].shape == (3, *shape[1:])

    def test_a_view_is_stored_as_what_it_shows(self, tmp_path: Path) -> None:
        values = np.arange(24, dtype=np.int32).reshape(4, 6)
        folder = prepare_dataset(
            both(part=values[::2, 1:4], turned=values.T[:2], back=values[:2, 0][::-1]), tmp_path
        )
        split = open_split(folder, "train")
        assert split["part"].tolist() == [[1, 2, 3], [13, 14, 15]]
        assert split["turned"].tolist() == [[0, 6, 12, 18], [1, 7, 13, 19]]
        assert split["back"].tolist() == [6, 0]

    @pytest.mark.parametrize("shape", [(3,), (3, 2)])
    def test_a_foreign_byte_order_is_turned(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        values = np.arange(np.prod(shape), dtype=">f4").reshape(shape)
        back = open_split(prepare_dataset(both(x=values), tmp_path), "train")["x"]
        assert back.tolist() == values.tolist()

    def test_columns_stay_together_by_row(self, tmp_path: Path) -> None:
        count = 1000
        image = np.arange(count * 6, dtype=np.uint16).reshape(count, 2, 3)
        folder = prepare_dataset(both(image=image, label=np.arange(count)), tmp_path)
        _, batch = SampleStream(open_split(folder, "train"), seed=1, global_batch=64).batch(3)
        assert torch.equal(batch["image"][:, 0, 0].long(), batch["label"] * 6)

    @pytest.mark.parametrize(
        "make",
        [
            lambda: pa.table({"x": ["a", "b"]}),
            lambda: pa.table({"x": [[1, 2], [3, 4]]}),
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
            "lists",
            "ragged",
            "nulls",
            "bytes",
            "times",
            "numpy-text",
            "numpy-texts",
            "numpy-times",
        ],
    )
    def test_what_is_not_numbers_of_one_shape_is_refused(
        self, tmp_path: Path, make: Callable[[], pa.Table]
    ) -> None:
        """With the column's name: when the table or the set is made, or at last when it is read."""
        with pytest.raises(DataError, match=r"column 'x'.* numbers"):
            open_split(prepare_dataset(Given(train=make(), val=make()), tmp_path), "train")


class TestPrepare:
    def test_files_and_their_manifest(self, tmp_path: Path) -> None:
        parts = {"train": 7, "val": 3, "test": 2}
        workload = Given(**{k: table(x=np.arange(n)) for k, n in parts.items()})
        folder = prepare_dataset(workload, tmp_path / "runs")
        files = whole_files(folder)
        manifest = json.loads(files.pop("manifest.json"))
        assert folder.parent == tmp_path / "runs" / "datasets"
        assert folder.name.startswith("given-")
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

    def test_it_is_made_once(self, tmp_path: Path) -> None:
        workload = both(x=np.arange(5))
        folder = prepare_dataset(workload, tmp_path)
        before = whole_files(folder)
        assert prepare_dataset(workload, tmp_path) == folder
        assert workload.made == 1
        assert whole_files(folder) == before

    def test_a_set_that_was_not_finished_is_made_again(self, tmp_path: Path) -> None:
        """What a killed process leaves behind is beside the name, never under it."""
        workload = both(x=np.arange(5))
        name = prepare_dataset(workload, tmp_path / "elsewhere").name
        left = tmp_path / "datasets" / f".{name}-killed"
        left.mkdir(parents=True)
        (left / "train.parquet").write_bytes(b"half")
        folder = prepare_dataset(workload, tmp_path)
        assert open_split(folder, "train")["x"].tolist() == [0, 1, 2, 3, 4]

    def test_other_users_may_read_it(self, tmp_path: Path) -> None:
        """A cluster's storage is shared; the umask decides, as for any other folder."""
        folder = prepare_dataset(both(x=np.arange(5)), tmp_path)
        assert folder.stat().st_mode == folder.parent.stat().st_mode

    def test_two_that_make_it_at_once_have_one_in_the_end(self, tmp_path: Path) -> None:
        """Both are in the middle of making it when the other is."""
        together = threading.Barrier(2, timeout=20)

        class Slow(Given):
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
    def test_both_splits_are_needed(self, tmp_path: Path, split: str, left: str) -> None:
        splits = {"train": table(x=np.arange(4)), "val": table(x=np.arange(4))}
        splits[split] = splits[split].slice(0, 0)
        if left == "absent":
            del splits[split]
        with pytest.raises(DataError) as caught:
            prepare_dataset(Given(**splits), tmp_path)
        assert str(caught.value) == f"the data set of given has no samples in its split {split!r}"
        assert list((tmp_path / "datasets").iterdir()) == []

    def test_a_split_that_is_not_there(self, tmp_path: Path) -> None:
        folder = prepare_dataset(both(x=np.arange(4)), tmp_path)
        with pytest.raises(DataError) as caught:
            open_split(folder, "test")
        assert str(caught.value) == f"{folder / 'test.parquet'}: no such split"


class TestWhatItIsMadeFrom:
    def own(self, **data: Any) -> Workload:
        sys.modules.pop("spirals", None)
        own = load_workload("spirals:Spirals")
        return own(own.Data(**data), own.Model())

    def test_the_data_section_and_the_code(self, own_folder: Path) -> None:
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

    @pytest.mark.parametrize("shape", ["folder", "file"])
    def test_the_files_that_it_names(self, tmp_path: Path, shape: str) -> None:
        folder = tmp_path / "source"
        (folder / "inner").mkdir(parents=True)
        path = folder / "inner" / "a.csv"
        path.write_text("1")
        workload = both(x=np.arange(4))
        workload.data = Given.Data(number=0, source=str(folder if shape == "folder" else path))
        seen = {prepare_dataset(workload, tmp_path), prepare_dataset(workload, tmp_path)}
        assert len(seen) == 1
        path.write_text("22")
        seen.add(prepare_dataset(workload, tmp_path))
        os.utime(path, ns=(1, 1))
        seen.add(prepare_dataset(workload, tmp_path))
        assert len(seen) == 3

    def test_a_set_made_anew_is_what_is_read(self, tmp_path: Path) -> None:
        """Though the machine still holds the decoded splits of one that had the same name."""
        workload = both(x=np.arange(3))
        folder = prepare_dataset(workload, tmp_path / "first")
        assert len(open_split(folder, "train")["x"]) == 3
        workload.splits = both(x=np.arange(10, 15)).splits
        again = prepare_dataset(workload, tmp_path / "second")
        assert count_samples(again, "train") == 5
        assert open_split(again, "train")["x"].tolist() == [10, 11, 12, 13, 14]


def test_a_split_is_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    """Its tensors lie in the pages of a file, which all processes of the machine share."""
    columns = {"scalar": np.arange(5000), "row": np.zeros((5000, 3), np.float32)}
    split = open_split(prepare_dataset(both(**columns), tmp_path), "train")
    for name, values in columns.items():
        address = split[name].data_ptr()
        assert file_at(address).name == "train.arrow"
        assert file_at(address + values.nbytes - 1).name == "train.arrow"


def file_at(address: int) -> Path:
    """The file that this process has mapped at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= address < stop:
            return Path(path)
    raise AssertionError("no memory of this process")


class TestOrder:
    @given(seed=st.integers(0, 2**31 - 1), epoch=st.integers(0, 10**6), samples=st.integers(1, 300))
    def test_an_epoch_is_a_permutation(self, seed: int, epoch: int, samples: int) -> None:
        order = epoch_permutation(seed, epoch, samples)
        assert sorted(order.tolist()) == list(range(samples))
        assert torch.equal(order, epoch_permutation(seed, epoch, samples))

    def test_epochs_and_seeds_differ(self) -> None:
        orders = [epoch_permutation(seed, epoch, 50) for seed in range(5) for epoch in range(5)]
        assert len({tuple(order.tolist()) for order in orders}) == 25

    @given(count=st.integers(0, 1000), world=st.integers(1, 20))
    def test_shares_are_contiguous_and_even(self, count: int, world: int) -> None:
        shares = [shard_bounds(count, rank, world) for rank in range(world)]
        assert shares[0][0] == 0
        assert shares[-1][1] == count
        assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
        sizes = [stop - start for start, stop in shares]
        assert max(sizes) - min(sizes) <= 1


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """samples, global batch, world size, seed"""
    world = draw(st.integers(1, 5))
    global_batch = draw(st.integers(world, 40))
    return draw(st.integers(1, 60)), global_batch, world, draw(st.integers(0, 2**31 - 1))


def stream(
    samples: int, global_batch: int, seed: int, rank: int = 0, world: int = 1
) -> SampleStream:
    split = {"x": torch.arange(samples), "y": torch.arange(samples)[:, None] * 10}
    return SampleStream(split, seed, global_batch, rank, world)


class TestBatches:
    @settings(max_examples=60, deadline=None)
    @given(run=runs(), steps=st.lists(st.integers(0, 30), min_size=1, max_size=8))
    @example(run=(60, 16, 4, 0), steps=[3, 4, 2, 30, 0])
    @example(run=(3, 40, 5, 0), steps=[0, 1, 0])  # a batch of many epochs
    def test_any_number_of_workers_sees_the_same_global_batches(
        self, run: tuple[int, int, int, int], steps: list[int]
    ) -> None:
        """Whatever steps each of them is asked for, and in whatever order."""
        samples, global_batch, world, seed = run
        ranks = [stream(samples, global_batch, seed, rank, world) for rank in range(world)]
        for step in steps:
            shares = [rank.batch(step) for rank in ranks]
            positions, batch = stream(samples, global_batch, seed).batch(step)
            assert positions.tolist() == list(range(step * global_batch, (step + 1) * global_batch))
            assert torch.equal(torch.cat([share[0] for share in shares]), positions)
            for column in batch:
                joined = torch.cat([share[1][column] for share in shares])
                assert torch.equal(joined, batch[column])
            assert torch.equal(batch["y"][:, 0], batch["x"] * 10)

    @settings(max_examples=60, deadline=None)
    @given(run=runs(), epochs=st.integers(1, 3))
    def test_every_epoch_has_every_sample_once(
        self, run: tuple[int, int, int, int], epochs: int
    ) -> None:
        samples, global_batch, _, seed = run
        batches = stream(samples, global_batch, seed)
        steps = -(-epochs * samples // global_batch)
        seen = torch.cat([batches.batch(step)[1]["x"] for step in range(steps)])
        for epoch in range(epochs):
            order = seen[epoch * samples : (epoch + 1) * samples]
            assert torch.equal(order, epoch_permutation(seed, epoch, samples))

    def test_what_is_given_out_is_a_copy(self) -> None:
        """Augmentation in place must not reach the mapped data set."""
        split = {"x": torch.zeros(8)}
        _, batch = SampleStream(split, seed=0, global_batch=8).batch(0)
        batch["x"] += 1
        assert split["x"].sum() == 0
