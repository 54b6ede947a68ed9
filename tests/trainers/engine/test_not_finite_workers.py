"""Two workers skip the same steps as a plain loop, whichever of them sees what is not finite."""

import math
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.trainers.plain_loop import Points, plain_loop, spec_of, workload_of
from tests.trainers.wild import Recorder
from trainers import Batch
from trainers.data.dataset import prepare_dataset
from trainers.engine.loop import train
from trainers.modeling.weight_update import WeightUpdate
from trainers.worker import Worker

pytestmark = pytest.mark.thorough


class Net(nn.Module):
    def __init__(self, rooted: bool) -> None:
        super().__init__()
        self.rooted, self.first, self.last = rooted, nn.Linear(8, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        output = self.last(hidden)
        return output + 0.01 * hidden.square().sum(1, True).sqrt() if self.rooted else output


class Rooted(Points):
    """A NaN gradient under a finite loss, for one sample."""

    def build(self) -> nn.Module:
        return Net(rooted=True)


class Constant(Points):
    """A NaN loss with finite gradients, for one sample, so on one worker."""

    def build(self) -> nn.Module:
        return Net(rooted=False)

    def loss(self, output: Any, batch: Batch) -> Any:
        zero = batch["x"].abs().sum(1) == 0
        return super().loss(output, batch) + torch.where(zero, math.nan, 0.0)


CASES: dict[str, tuple[type[Points], str, dict[str, Any], bool]] = {
    "replicas": (Constant, "ddp", {}, False),
    "shards, as on a device": (Rooted, "fsdp", {}, True),
    "clipped shards, as on a device": (Rooted, "fsdp", {"clip_norm": 0.5}, True),
}


def work(rank: int, folder: Path, dataset: Path, case: str, answers: Any) -> None:
    kind, mode, options, on_device = CASES[case]
    if on_device:
        made = WeightUpdate.__init__

        def init(self: WeightUpdate, *args: Any) -> None:
            made(self, *args)
            self.on_host = False

        WeightUpdate.__init__ = init  # type: ignore[method-assign]
    torch.set_num_threads(1)
    store = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    section = {"on_nonfinite": "skip", **options}
    scale = {"workers": 2, "parallel": mode}
    spec = spec_of(train=section, scale=scale, tracking={"every_steps": 6})
    rows = Recorder()
    train(spec, workload_of(kind), dataset, folder / "run", rows, Worker(rank, 2))
    answers.put(rows.rows)
    answers.close()
    answers.join_thread()
    os._exit(0)  # gloo's threads may wait for the other worker


@pytest.mark.parametrize("case", CASES)
def test_both_leave_out_the_same_steps(case: str, tmp_path: Path) -> None:
    kind, _, options, _ = CASES[case]
    workload, context = workload_of(kind), multiprocessing.get_context("spawn")
    dataset, answers = prepare_dataset(workload, tmp_path), context.Queue()
    workers = [
        context.Process(target=work, args=(rank, tmp_path, dataset, case, answers))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()

    def left_out(loss: float, gradients: list[Tensor]) -> bool:
        return not math.isfinite(loss) or not all(bool(g.isfinite().all()) for g in gradients)

    losses, _ = plain_loop(workload, tmp_path, left_out, clip_norm=options.get("clip_norm"))
    means = {end: float(np.nanmean(losses[end - 6 : end])) for end in (6, 12, 18)}
    for rows in found:
        assert rows["train/loss"] == pytest.approx(means, rel=1e-9)
        assert rows["train/skipped_steps"] == {6: 1, 12: 2, 18: 3}
