"""Step time of the training loop, compared with bare PyTorch, Lightning, Accelerate and Ray.

    pip install -e '.[peers]'     # a peer that is not installed gets a row that says so
    python benchmarks/loop.py [--rounds 5] [--ray] [--before FOLDER] [--tiny]

All have the same model, data, batch, optimizer (fused AdamW), learning rate schedule and seeds, and
no augmentation. Every contender logs its loss every ten steps. Only the steps after a warm-up are
timed: no start, no evaluation, no checkpoint. Each worker has one thread.

Bare PyTorch, and with `--before` the loop of an earlier commit's checkout, are compared in
processes that live at the same time and take turns of some steps (`contest.take_turns`). The peers
are compared by rounds of whole runs.
"""

import itertools
import math
import os
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bare import Bare
from contest import (
    Contender,
    compete,
    finish,
    installed,
    leave_out,
    options,
    parse,
    rows,
    show,
    take_turns,
)

sys.path.insert(0, str(Path(__file__).parent))

from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_split
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker

WARM_UP, STEPS = 10, 60
TURNS = 10
"""Turns of each contender in a round: see `loop_in_turns.STEPS_PER_TURN`."""

CASES: dict[str, dict[str, Any]] = {
    "digits CNN": {
        "workload": "vision",
        "model": {"width": 16, "augment": 0.0},
        "train": {"global_batch": 64},
    },
    "small GPT": {"workload": "models:Text", "train": {"global_batch": 8}},
}


def resolved(case: str) -> tuple[RunSpec, Any, Path]:
    data = {**CASES[case], "optimizer": {"lr": 1e-3, "weight_decay": 0.0}}
    data["train"] = {**data["train"], "steps": WARM_UP + STEPS, "evaluate_every_epochs": 1e6}
    data["checkpoint"] = {"every_steps": 10**6}
    spec, workload = resolve(data, RunSpec)
    return (
        spec,
        workload,
        prepare_dataset(workload, Path(tempfile.gettempdir()) / "heliostat-benchmarks"),
    )


class Clock(NullReporter):
    """A reporter that measures the time between the end of the warm-up and the last step."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_end(self, step: int) -> None:
        if step == WARM_UP:
            self._start = time.perf_counter()
        # The last step ends with an evaluation and a save, which must not be timed.
        if step == WARM_UP + STEPS - 1:
            self.seconds = (time.perf_counter() - self._start) / (STEPS - 1)


def heliostat(case: str, rank: int = 0, world: int = 1) -> float:
    spec, workload, dataset = resolved(case)
    folder, clock = Path(tempfile.mkdtemp()), Clock()
    train(spec, workload, dataset, folder, clock, Worker(rank, world))
    shutil.rmtree(folder, ignore_errors=True)
    return clock.seconds


def bare(case: str, rank: int = 0, world: int = 1) -> float:
    """The loop that people write by hand."""
    spec, workload, dataset = resolved(case)
    split, worker = open_split(dataset, "train"), Worker(rank, world)
    loop = Bare(workload, split, spec.train.global_batch, worker, cosine)
    for step in range(WARM_UP + STEPS - 1):
        if step == WARM_UP:
            start = time.perf_counter()
        loop.take(step)
    return (time.perf_counter() - start) / (STEPS - 1)


def cosine(step: int) -> float:
    return (1 + math.cos(math.pi * step / (WARM_UP + STEPS))) / 2


def loader(case: str) -> tuple[Any, torch.utils.data.DataLoader[Any]]:
    """The workload, and a DataLoader of its training split with enough samples for all steps."""
    spec, workload, dataset = resolved(case)
    columns = open_split(dataset, "train")
    data = torch.utils.data.TensorDataset(*columns.values())
    needed = (WARM_UP + STEPS) * spec.train.global_batch
    draw = torch.utils.data.RandomSampler(data, replacement=True, num_samples=needed)
    batches = torch.utils.data.DataLoader(data, spec.train.global_batch, sampler=draw)
    workload.columns = list(columns)
    return workload, batches


def mean_loss(workload: Any, model: Any, values: Any) -> torch.Tensor:
    """The loss of a batch as the loader gives it: a tensor for each column."""
    batch = dict(zip(workload.columns, values, strict=True))
    loss: torch.Tensor = workload.loss(workload.forward(model, batch), batch).mean()
    return loss


def accelerate(case: str) -> float:
    from accelerate import Accelerator

    workload, batches = loader(case)
    accelerator = Accelerator(cpu=True)
    network = workload.build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    model, optimizer, batches, schedule = accelerator.prepare(network, optimizer, batches, schedule)
    model.train()
    for step, values in enumerate(batches):
        if step == WARM_UP:
            start = time.perf_counter()
        if step == WARM_UP + STEPS - 1:
            return (time.perf_counter() - start) / (STEPS - 1)
        loss = mean_loss(workload, model, values)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            loss.item()
    raise AssertionError("the loader ended early")


def lightning(case: str) -> float:
    import logging

    import lightning as L

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    workload, batches = loader(case)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = workload.build()

        def training_step(self, values: Any, index: int) -> torch.Tensor:
            loss = mean_loss(workload, self.network, values)
            if index % 10 == 9:
                loss.item()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(
                self.network.parameters(), lr=1e-3, weight_decay=0.0, fused=True
            )
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Timer(L.Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            step = arguments[-1] + 1
            if step == WARM_UP:
                self.start = time.perf_counter()
            if step == WARM_UP + STEPS - 1:
                self.seconds = (time.perf_counter() - self.start) / (STEPS - 1)

    timer = Timer()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=WARM_UP + STEPS,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), batches)
    return timer.seconds


def _spawned(rank: int, contender: Any, case: str, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    seconds = contender(case, rank, 2)
    if rank == 0:
        queue.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


def two_workers(contender: Any, case: str) -> float:
    """Run the contender in two processes; returns the time that rank 0 took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_spawned, (contender, case, port, queue), nprocs=2)
    return float(queue.get())


def in_turns(
    kind: str, case: str, workers: int, checkout: Path
) -> tuple[list[str], dict[str, str]]:
    """A contender of `take_turns`, and its environment, which has a checkout's modules."""
    script = str(Path(__file__).with_name("loop_in_turns.py"))
    path = os.pathsep.join([str(checkout), str(checkout / "benchmarks")])
    return [sys.executable, script, kind, case, str(workers)], {"PYTHONPATH": path}


def ray_tutorial(workers: int, case: str) -> float:
    """The loop of Ray's tutorial on PyTorch."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    folder = tempfile.mkdtemp()
    trainer = TorchTrainer(
        _tutorial,
        train_loop_config={"case": case, "path": str(Path(__file__).parent)},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(storage_path=folder),
    )
    seconds = trainer.fit().return_value
    shutil.rmtree(folder, ignore_errors=True)
    return float(seconds)


def _tutorial(config: dict[str, Any]) -> float:
    sys.path.insert(0, config["path"])
    import ray.train
    from loop import loader as load
    from loop import mean_loss
    from ray.train.torch import prepare_data_loader, prepare_model

    torch.set_num_threads(1)
    workload, batches = load(config["case"])
    world = ray.train.get_context().get_world_size()
    batches = torch.utils.data.DataLoader(
        batches.dataset, batches.batch_size // world, shuffle=True
    )
    batches = prepare_data_loader(batches)
    model = prepare_model(workload.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    step = 0
    while True:
        for values in batches:
            if step == WARM_UP:
                start = time.perf_counter()
            if step == WARM_UP + STEPS - 1:
                return (time.perf_counter() - start) / (STEPS - 1)
            loss = mean_loss(workload, model, values)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 10 == 9:
                loss.item()
            step += 1


def compare_in_turns(
    cases: Iterable[str], before: Path | None, turns: int, rounds: int
) -> list[dict[str, Any]]:
    """Rows against bare PyTorch, and against an earlier checkout if one is given."""
    results, here = [], Path(__file__).parents[1]
    for case, workers in itertools.product(cases, (1, 2)):
        contenders = {
            "Heliostat": in_turns("heliostat", case, workers, here),
            "bare PyTorch": in_turns("bare", case, workers, here),
        }
        if before is not None:
            contenders["before"] = in_turns("heliostat", case, workers, before.resolve())
        measured = take_turns(contenders, turns, rounds)
        title = f"{case}, {workers} worker{'s' * (workers > 1)}"
        show(title, measured, "ms/step", 1e3)
        results += rows(title, "Heliostat", measured)
    return results


def compare_peers(cases: Iterable[str], with_ray: bool, rounds: int) -> list[dict[str, Any]]:
    """Rows against the peers that are installed, by rounds of whole runs."""
    results = []
    peers = {"lightning": lightning, "accelerate": accelerate}
    there = {name.capitalize(): peer for name, peer in peers.items() if installed(name)}
    if not with_ray:
        leave_out("Ray Train tutorial", "needs --ray")
    for case in cases:
        alone: dict[str, Contender] = {name: partial(peer, case) for name, peer in there.items()}
        both: dict[str, Contender] = {}
        if with_ray:
            alone["Ray Train tutorial"] = partial(ray_tutorial, 1, case)
            both["Ray Train tutorial"] = partial(ray_tutorial, 2, case)
        for title, ours, contenders in (
            (f"{case}, 1 worker", partial(heliostat, case), alone),
            (f"{case}, 2 workers", partial(two_workers, heliostat, case), both),
        ):
            if contenders:
                measured = compete({"Heliostat": ours, **contenders}, rounds)
                show(title, measured, "ms/step", 1e3)
                results += rows(title, "Heliostat", measured)
    return results


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--ray", action="store_true", help="also Ray's tutorial, a minute a round")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="an earlier checkout")
    args = parse(parser)
    cases = CASES
    if args.tiny:
        cases = {"digits CNN": CASES["digits CNN"]}
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results = compare_in_turns(cases, args.before, 1 if args.tiny else TURNS, args.rounds)
    results += compare_peers(cases, args.ray, args.rounds)
    finish("loop", results)


if __name__ == "__main__":
    main()
