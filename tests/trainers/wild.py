"""Small workloads of users, and a way to train them in one process or in several."""

import multiprocessing
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import Spec, Workload, table
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.data.dataset import prepare_dataset
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.outcome import Outcome
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker
from trainers.workload import Batch


class Base(Workload):
    """Three classes of points in eight dimensions; the validation split comes class by class."""

    class Data(Spec):
        train: int = 96
        val: int = 50

    class Model(Spec):
        kind: str = ""

    def dataset(self) -> dict[str, pa.Table]:
        def split(count: int, seed: int) -> pa.Table:
            random = np.random.default_rng(seed)
            x = random.standard_normal((count, 8))
            y = (x[:, :3] + 0.3 * random.standard_normal((count, 3))).argmax(1)
            order = np.argsort(y, kind="stable") if seed else np.arange(count)
            return table(x=x[order].astype(np.float32), y=y[order])

        return {"train": split(self.data.train, 0), "val": split(self.data.val, 1)}

    @property
    def evaluation_batch(self) -> int:
        return 8

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["x"])

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch["y"], reduction="none")

    def metrics(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(1) == batch["y"]).float()}

    def example(self) -> Tensor:
        return torch.linspace(-1, 1, 8)[None]


class Recorder(NullReporter):
    """Keeps the reports of the loop; stops it after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rows: dict[str, dict[int, float]] = {}
        self.notes: dict[str, str] = {}
        self._done, self._stop_after = 0, stop_after

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.rows.setdefault(name, {})[step] = value

    def log_note(self, name: str, text: str) -> None:
        self.notes[name] = text

    def on_step_end(self, step: int) -> None:
        self._done = step

    def should_stop(self) -> bool:
        return self._stop_after is not None and self._done + 1 >= self._stop_after


@dataclass
class Trained:
    """A run, and what it reported."""

    spec: RunSpec
    workload: Workload
    folder: Path
    rows: dict[str, dict[int, float]]
    notes: dict[str, str]
    error: BaseException | str | None = None
    outcome: Outcome | None = None
    others: list["Trained"] = field(default_factory=list)

    @property
    def checkpoint(self) -> Path:
        found = Checkpoints(self.folder / "checkpoints").latest()
        assert found is not None
        return found

    def last(self, name: str) -> float:
        return [*self.rows[name].values()][-1]


def spec_of(workload: type[Workload], **sections: Any) -> dict[str, Any]:
    """The spec of a short run in float64, evaluated after each epoch of 4 steps."""
    return {
        "workload": f"{workload.__module__}:{workload.__qualname__}",
        "optimizer": {"lr": 0.02},
        "tracking": {"every_steps": 1},
        **sections,
        "train": {"steps": 8, "global_batch": 24, "precision": "fp64", **sections.get("train", {})},
    }


def fit(
    folder: Path, workload: type[Workload], stop_after: int | None = None, **sections: Any
) -> Trained:
    """Train in this process, in `folder`, where a run may have been begun."""
    spec, instance = resolve(spec_of(workload, **sections), RunSpec)
    recorder = Recorder(stop_after)
    found = Trained(spec, instance, folder, recorder.rows, recorder.notes)
    found.outcome = train(spec, instance, prepare_dataset(instance, folder), folder, recorder)
    return found


def fit_together(
    folder: Path,
    workload: type[Workload],
    workers: int = 2,
    stop_after: int | None = None,
    **sections: Any,
) -> Trained:
    """Train in `workers` processes; what rank 0 has reported, with the others' errors."""
    scale = {"workers": workers, **sections.pop("scale", {})}
    data = spec_of(workload, **sections, scale=scale)
    spec, instance = resolve(data, RunSpec)
    dataset = prepare_dataset(instance, folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo", "torch.distributed.fsdp"])
    answers, meeting = context.Queue(), folder / os.urandom(4).hex()
    arguments = (workers, meeting, data, dataset, folder, stop_after, answers)
    processes = [context.Process(target=_work, args=(r, *arguments)) for r in range(workers)]
    for process in processes:
        process.start()
    told = sorted((answers.get(timeout=300) for _ in processes), key=lambda answer: answer[0])
    for process in processes:
        process.join()
    ranks = [Trained(spec, instance, folder, rows, notes, error) for _, rows, notes, error in told]
    return Trained(**{**vars(ranks[0]), "others": ranks[1:]})


def _work(
    rank: int,
    world: int,
    meeting: Path,
    data: dict[str, Any],
    dataset: Path,
    folder: Path,
    stop_after: int | None,
    answers: Any,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    spec, workload = resolve(data, RunSpec)
    recorder, error = Recorder(stop_after), None
    try:
        this = Worker(rank, world, local_world_size=world)
        train(spec, workload, dataset, folder, recorder, this)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    answers.put((rank, recorder.rows, recorder.notes, error))
    dist.destroy_process_group()


def split(workload: Workload, name: str) -> Batch:
    """A split in float64, as numpy has it, without Heliostat's files."""
    columns = workload.dataset()[name]
    from trainers.data.tables import column_tensor

    found = {f.name: column_tensor(f, columns.column(f.name)).clone() for f in columns.schema}
    return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}
