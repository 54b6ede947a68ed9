"""Loading random batches from Parquet files, compared with other loaders and with memcpy.

    pip install -e '.[peers]'     # a peer that is not installed gets a row that says so
    python benchmarks/data.py [--rounds 5] [--tiny]

Whole epochs of batches of 256 samples, as tensors in memory, are timed, each with its start (a new
order, a new plan, a new pass over the file). A first epoch is not timed; in it every source is
checked: each sample comes once, in its own shape and type. There is one thread, besides the
processes that a peer starts. Files are in the page cache.

Heliostat, PyTorch's loaders and Hugging Face's shuffled data set draw from all samples. Ray Data
and Hugging Face's stream draw from a buffer of ten batches, which is less work. Only Heliostat can
continue at any batch. Two copies in order show the limit of the memory: batch by batch into new
memory, whose target stays in the cache, and the whole column into a copy of it.
"""

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from contest import Contender, compete, finish, installed, leave_out, options, parse, rows, show
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from trainers import Batch, Spec, Workload, table
from trainers.data.dataset import prepare_dataset
from trainers.data.sampling import SampleStream
from trainers.data.splits import open_split

BATCH, BUFFER = 256, 2560
AT_LEAST_S = 0.3
"""Shorter epochs are timed together, until they take this long."""

CASES = {
    "grey images, 0.8 kB": (200_000, (784,), "uint8"),
    "tokens, 4 kB": (50_000, (1024,), "int32"),
    "colour images, 49 kB": (8_000, (64, 64, 3), "float32"),
}
TINY = {"grey images, tiny": (1_000, (16,), "uint8")}

Source = Callable[[int], Iterator[Batch]]
"""The batches of an epoch, given its number."""


class Rows(Workload):
    """Samples of random numbers in one shape, each with its number. No model."""

    class Data(Spec):
        samples: int
        shape: tuple[int, ...]
        dtype: str

    data: Data

    def dataset(self) -> dict[str, pa.Table]:
        shape = (self.data.samples, *self.data.shape)
        x = np.random.default_rng(0).integers(0, 255, shape, np.uint8).astype(self.data.dtype)
        whole = table(x=x, number=np.arange(len(x)))
        return {"train": whole, "val": whole.slice(0, 1)}

    def build(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError


def heliostat(split: Batch) -> Source:
    batches, steps = SampleStream(split, 0, BATCH), len(split["number"]) // BATCH
    return lambda epoch: (
        batches.batch(step)[1] for step in range(epoch * steps, (epoch + 1) * steps)
    )


def loader(split: Batch, workers: int, whole_batches: bool) -> Source:
    """PyTorch's DataLoader: sample by sample, as most people use it, or with lists of indices."""
    data = TensorDataset(*split.values())
    more = {"num_workers": workers, "persistent_workers": workers > 0}
    if whole_batches:
        sampler = BatchSampler(RandomSampler(data), BATCH, drop_last=True)
        batches = DataLoader(data, batch_size=None, sampler=sampler, **more)
    else:
        batches = DataLoader(data, BATCH, shuffle=True, drop_last=True, **more)
    return lambda epoch: (dict(zip(split, values, strict=True)) for values in batches)


def ray_data(split: Batch, folder: Path, in_memory: bool) -> Source:
    """Ray Data on a Parquet file that it wrote itself, or on that file's samples in memory."""
    import ray
    from ray.data.extensions import ArrowTensorArray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, object_store_memory=2 * 10**9, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not folder.exists():
        x = ArrowTensorArray.from_numpy(split["x"].numpy())
        whole = pa.table({"x": x, "number": split["number"].numpy()})
        ray.data.from_arrow(whole).write_parquet(str(folder))
    data = ray.data.read_parquet(str(folder))
    if in_memory:
        data = data.materialize()
    return lambda epoch: iter(
        data.iter_torch_batches(batch_size=BATCH, drop_last=True, local_shuffle_buffer_size=BUFFER)
    )


def hugging_face(split: Batch, path: Path, stream: bool) -> Source:
    """Hugging Face's data set on lists of fixed size, its fastest form."""
    import datasets

    datasets.disable_progress_bars()
    x, number = split["x"].numpy(), split["number"].numpy()
    if not path.exists():
        lists = pa.FixedSizeListArray.from_arrays(x.reshape(-1), x[0].size)
        pq.write_table(pa.table({"x": lists, "number": number}), path)
    data = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
    data = data.with_format("torch")
    shards = data.to_iterable_dataset(num_shards=8)

    def epoch(seed: int) -> Iterator[Batch]:
        order = shards.shuffle(seed=seed, buffer_size=BUFFER) if stream else data.shuffle(seed=seed)
        for batch in order.iter(BATCH, drop_last_batch=True):
            yield {**batch, "x": batch["x"].view(-1, *x.shape[1:])}

    return epoch


def in_order(split: Batch) -> Source:
    starts = range(0, len(split["number"]) - BATCH + 1, BATCH)
    return lambda epoch: (
        {name: values[low : low + BATCH].clone() for name, values in split.items()}
        for low in starts
    )


def whole(split: Batch) -> Source:
    copies = {name: torch.empty_like(values) for name, values in split.items()}
    return lambda epoch: iter([{name: copies[name].copy_(split[name]) for name in split}])


def check(name: str, source: Source, split: Batch) -> None:
    """Check that an epoch has every sample once, as it is stored, except an incomplete batch."""
    numbers: list[Tensor] = []
    for batch in source(0):
        numbers.append(batch["number"].clone())
        x = split["x"][batch["number"]]
        same_type = x.dtype == batch["x"].dtype or name.startswith("Hugging Face")
        assert same_type, f"{name}: {batch['x'].dtype}"
        assert torch.equal(batch["x"].to(x.dtype), x), name
    seen = torch.cat(numbers)
    assert len(seen) > len(split["number"]) - BATCH, f"{name}: {len(seen)} samples"
    assert len(seen.unique()) == len(seen), f"{name}: a sample came twice"


def contender(source: Source) -> Contender:
    """A contender that measures the seconds per sample."""
    epochs = itertools.count(1)

    def run() -> float:
        samples, start = 0, time.perf_counter()
        while True:
            for batch in source(next(epochs)):
                samples += len(batch["number"])
            seconds = time.perf_counter() - start
            if seconds > AT_LEAST_S:
                return seconds / samples

    return run


def sources(split: Batch, folder: Path, tiny: bool) -> Iterator[tuple[str, Source]]:
    yield "Heliostat", heliostat(split)
    yield "memcpy, batch by batch", in_order(split)
    yield "memcpy, whole", whole(split)
    for workers in (0, 2):
        yield f"DataLoader, {workers} workers", loader(split, workers, whole_batches=False)
        yield f"DataLoader, lists, {workers} workers", loader(split, workers, whole_batches=True)
    if installed("datasets", "Hugging Face datasets"):
        path = folder / "lists.parquet"
        yield "Hugging Face datasets", hugging_face(split, path, stream=False)
        yield "Hugging Face, stream", hugging_face(split, path, stream=True)
    if tiny:
        leave_out("Ray Data", "left out of --tiny")
    else:
        yield "Ray Data", ray_data(split, folder / "ray", in_memory=False)
        yield "Ray Data, in memory", ray_data(split, folder / "ray", in_memory=True)


def main() -> None:
    args = parse(options(__doc__, rounds=5))
    torch.set_num_threads(1)
    results = []
    for case, (samples, shape, dtype) in (TINY if args.tiny else CASES).items():
        workload = Rows(Rows.Data(samples=samples, shape=shape, dtype=dtype), Rows.Model())
        datasets = Path(tempfile.gettempdir()) / "heliostat-benchmarks"
        split = open_split(prepare_dataset(workload, datasets), "train")
        with tempfile.TemporaryDirectory() as folder:
            contenders: dict[str, Contender] = {}
            for name, source in sources(split, Path(folder), args.tiny):
                check(name, source, split)
                contenders[name] = contender(source)
            measured = compete(contenders, args.rounds)
        show(case, measured, "µs/sample", 1e6)
        results += rows(case, "Heliostat", measured)
    finish("data", results)


if __name__ == "__main__":
    main()
