"""Training gives the same losses and weights in every parallel mode."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.base.errors import SpecError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.state import load_model_weights
from trainers.counter_rng import combine_seeds
from trainers.data.dataset import prepare_dataset
from trainers.modeling.strategy import choose_strategy, state_bytes
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker

pytestmark = pytest.mark.thorough

TOWER_SOURCE = '''
"""A residual network in blocks, whose layers can be split; and how a worker of several runs it."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from trainers import Spec, Workload, table
from trainers.engine.loop import train
from trainers.worker import Worker
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(self.dropout(torch.tanh(self.up(self.norm(x)))))


PASSES = []


class Net(nn.Module):
    def __init__(self, width, dropout, aside):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(2))
        self.aside = aside
        if aside:
            self.expert = nn.Linear(width, width)
        self.last = nn.Linear(width, 1, bias=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen.fill_(1)
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        if self.training:
            PASSES.append(x)
        if self.aside == "routed":  # by the sample: some batches have none, some workers' parts
            chosen = x.sum(1) > 1.3
            if chosen.any():
                x = x.masked_scatter(chosen[:, None], x[chosen] + self.expert(x[chosen]))
        if self.aside.startswith("pass") and len(PASSES) != int(self.aside[-1]):
            x = x + self.expert(x)
        return self.last(x).squeeze(-1)


class Tower(Workload):
    class Model(Spec):
        width: int = 6
        dropout: float = 0.0
        aside: str = ""

    def dataset(self):
        random = np.random.default_rng(0)
        x = random.standard_normal((90, 3)).astype(np.float32)
        y = np.sin(x.sum(1)).astype(np.float32)
        return {"train": table(x=x[:80], y=y[:80]), "val": table(x=x[80:], y=y[80:])}

    def build(self):
        return Net(self.model.width, self.model.dropout, self.model.aside)

    def forward(self, model, batch):
        return model(batch["x"])

    def loss(self, output, batch):
        return (output - batch["y"]).square()

    def tensor_plan(self, model):
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        return {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


class Losses(NullReporter):
    def __init__(self, stop_after):
        self.rows, self.notes, self.done, self.stop_after = {}, {}, 0, stop_after

    def log_metrics(self, metrics, step):
        self.rows.setdefault(step, {}).update(metrics)

    def log_note(self, name, text):
        self.notes[name] = text

    def on_step_end(self, step):
        self.done = step

    def should_stop(self):
        return self.stop_after is not None and self.done + 1 >= self.stop_after


def work(rank, world, meeting, data, dataset, folder, stop_after, answers):
    torch.set_num_threads(1)
    if world > 1:
        place = f"file://{meeting}"
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    spec, workload = resolve(data, RunSpec)
    reporter = Losses(stop_after)
    try:
        this = Worker(rank, world, local_world_size=world)
        train(spec, workload, dataset, folder, reporter, this)
        answers.put((rank, reporter.rows, reporter.notes, None))
    except Exception as error:
        answers.put((rank, {}, {}, f"{type(error).__name__}: {error}"))
    if world > 1:
        dist.destroy_process_group()
'''

STEPS = 12
TOWER: dict[str, Any] = {
    "workload": "tower:Tower",
    "optimizer": {"lr": 0.01},
    "train": {"steps": STEPS, "global_batch": 16, "precision": "fp64", "clip_norm": 0.3},
    "checkpoint": {"every_steps": 5},
    "tracking": {"every_steps": 1},
}


@dataclass
class Trained:
    rows: dict[int, dict[str, float]]
    notes: dict[str, str]
    folder: Path
    error: str | None
    model: dict[str, Any]

    def column(self, name: str) -> list[float]:
        return [row[name] for _, row in sorted(self.rows.items()) if name in row]

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of the latest checkpoint, read by one process."""
        _, workload = resolve({**TOWER, "model": self.model}, RunSpec)
        network = workload.build().double()
        newest = Checkpoints(self.folder / "checkpoints").latest()
        assert newest is not None
        load_model_weights(newest, network)
        return network.state_dict()


Runner = Callable[..., Trained]


@pytest.fixture(scope="module")
def train(modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """Trains the tower in `workers` processes, in a new folder or an earlier one."""
    (modules / "tower.py").write_text(TOWER_SOURCE)
    import tower

    root = tmp_path_factory.mktemp("towers")
    dataset = prepare_dataset(resolve(TOWER, RunSpec)[1], root)
    context = multiprocessing.get_context("forkserver")
    # And what each of them would import by itself, for 3 s of CPU time.
    torch_modules = ["_dynamo", "distributed.checkpoint", "distributed.fsdp"]
    context.set_forkserver_preload(["tower", *(f"torch.{name}" for name in torch_modules)])

    def runner(
        workers: int | tuple[int, int] = 1,
        folder: Path | None = None,
        stop_after: int | None = None,
        train: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        **scale: Any,
    ) -> Trained:
        folder = folder or root / os.urandom(4).hex()
        data = {**TOWER, "train": {**TOWER["train"], **(train or {})}, "model": model or {}}
        data["optimizer"] = optimizer or TOWER["optimizer"]
        data["scale"] = {"workers": workers, **scale}
        answers = context.Queue()
        meeting = root / os.urandom(4).hex()
        world = workers if isinstance(workers, int) else workers[1]
        processes = [
            context.Process(
                target=tower.work,
                args=(rank, world, meeting, data, dataset, folder, stop_after, answers),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        _, rows, notes, error = min(answers.get(timeout=600) for _ in processes)
        for process in processes:
            process.join()
        return Trained(rows, notes, folder, error, model or {})

    return runner


@pytest.fixture(scope="module")
def alone(train: Runner) -> Trained:
    return train()


SPREAD: dict[str, dict[str, Any]] = {
    "ddp": {"workers": 2, "parallel": "ddp"},
    "fsdp": {"workers": 2, "parallel": "fsdp"},
    "fsdp, shares of different size": {"workers": (3, 3), "parallel": "fsdp"},
    "hsdp": {"workers": 4, "parallel": "hsdp", "group": 2},
    "tensor": {"workers": 2, "parallel": "tensor", "group": 2},
    "tensor and fsdp": {"workers": 4, "parallel": "tensor", "group": 2},
}


def assert_close(found: Trained, wanted: Trained) -> None:
    assert found.error is None
    for name in ("train/loss", "val/loss"):
        assert found.column(name) == pytest.approx(wanted.column(name), rel=1e-9), name
    for name, tensor in wanted.weights().items():
        torch.testing.assert_close(found.weights()[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", SPREAD)
def test_losses_and_weights_are_those_of_one_worker(
    train: Runner, alone: Trained, mode: str
) -> None:
    found = train(**SPREAD[mode])
    assert len(found.column("train/loss")) == STEPS
    assert_close(found, alone)
    assert found.notes["parallel"].startswith(f"{SPREAD[mode]['parallel']}: ")


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "fsdp, shares of different size"])
def test_micro_batches_do_not_change_losses_and_weights(
    train: Runner, alone: Trained, mode: str
) -> None:
    assert_close(train(**SPREAD[mode], train={"micro_batch": 4}), alone)


def joined(first: Trained, second: Trained) -> dict[int, dict[str, float]]:
    """The metrics of a run and of its resume, which may report an evaluation again."""
    steps = sorted({*first.rows, *second.rows})
    return {step: first.rows.get(step, {}) | second.rows.get(step, {}) for step in steps}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp", None),
        (None, "fsdp"),
        ("ddp", None),
        ("hsdp", "ddp"),
        ("tensor and fsdp", "fsdp, shares of different size"),
    ],
)
def test_a_run_goes_on_with_other_workers_in_another_mode(
    train: Runner, alone: Trained, before: str | None, after: str | None
) -> None:
    first = train(**SPREAD.get(before or "", {}), stop_after=7)
    second = train(**SPREAD.get(after or "", {}), folder=first.folder)
    second.rows = joined(first, second)
    assert_close(second, alone)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_run_goes_on_with_the_same_workers_bit_by_bit(train: Runner, mode: str) -> None:
    straight = train(**SPREAD[mode])
    first = train(**SPREAD[mode], stop_after=7)
    second = train(**SPREAD[mode], folder=first.folder)
    weights = second.weights()
    assert all(weights[name].equal(tensor) for name, tensor in straight.weights().items())


SGD = {"name": "sgd", "lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("mode", SPREAD)
def test_sgd_is_that_of_one_worker(train: Runner, mode: str, momentum: float) -> None:
    rule = {**SGD, "momentum": momentum}
    assert_close(train(**SPREAD[mode], optimizer=rule), train(optimizer=rule))


@pytest.mark.parametrize(
    ("before", "after"), [("fsdp", None), ("tensor and fsdp", "fsdp, shares of different size")]
)
def test_a_run_with_momentum_goes_on_with_other_workers(
    train: Runner, before: str, after: str | None
) -> None:
    first = train(**SPREAD[before], optimizer=SGD, stop_after=7)
    second = train(**SPREAD.get(after or "", {}), optimizer=SGD, folder=first.folder)
    second.rows = joined(first, second)
    assert_close(second, train(optimizer=SGD))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sharded_in_half_precision(train: Runner, precision: str) -> None:
    """Rounding differs, so the losses do; but the model learns."""
    found = train(**SPREAD["fsdp"], train={"precision": precision, "steps": 60})
    assert found.error is None
    losses = found.column("train/loss")
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("aside", ["idle", "routed"])
@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "fsdp, shares of different size"])
def test_parameters_that_the_loss_does_not_always_use(
    train: Runner, aside: str, micro_batch: int | None, mode: str
) -> None:
    """Parameters that no batch uses, or some only, are updated as in a plain loop."""
    section = {"micro_batch": micro_batch}
    one = train(model={"aside": aside})
    found = train(**SPREAD[mode], train=section, model={"aside": aside})
    assert_close(found, one)
    _, workload = resolve({**TOWER, "model": one.model}, RunSpec)
    torch.manual_seed(combine_seeds(0))
    initial = workload.build().double().state_dict()["expert.weight"]
    assert one.weights()["expert.weight"].equal(initial) == (aside == "idle")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_parameters_that_are_not_used_for_another_reason(train: Runner, mode: str) -> None:
    """In the second step they are not, by a counter in Python."""
    one = train(model={"aside": "pass 2"})
    assert_close(train(**SPREAD[mode], model={"aside": "pass 2"}), one)


@pytest.mark.parametrize("mode", ["tensor", "tensor and fsdp"])
def test_dropout_between_split_layers_is_that_of_one_worker(train: Runner, mode: str) -> None:
    assert_close(train(**SPREAD[mode], model={"dropout": 0.3}), train(model={"dropout": 0.3}))


class TestChoice:
    def choice(self, memory: float, workers: int = 4, local: int = 2, **scale: Any) -> Any:
        """The strategy for a worker with `memory` times the bytes of the model's state."""
        spec, workload = resolve({**TOWER, "scale": {"workers": workers, **scale}}, RunSpec)
        network = workload.build()
        available = int(memory * state_bytes(spec.optimizer, network))
        worker = Worker(0, workers, local_world_size=local)
        return choose_strategy(spec, workload, network, worker, available)

    @pytest.fixture(autouse=True)
    def _tower(self, train: Runner) -> None:
        """Make the workload importable."""

    @pytest.mark.parametrize(
        ("memory", "workers", "local", "mode"),
        [
            (0.1, 1, 1, "single"),
            (2.1, 4, 2, "ddp"),
            (1.9, 4, 2, "hsdp"),
            (1.9, 4, 4, "fsdp"),
            (0.9, 4, 2, "fsdp"),
        ],
    )
    def test_auto_goes_by_memory(self, memory: float, workers: int, local: int, mode: str) -> None:
        layout = self.choice(memory, workers, local)
        assert layout.mode == mode
        assert "weights, gradients and optimizer take" in layout.reason or workers == 1

    def test_the_reason_names_the_traffic_of_sharded_fp16(self) -> None:
        def reason(precision: str, parallel: str) -> str:
            scale = {"workers": 4, "parallel": parallel}
            data = {**TOWER, "train": {"precision": precision}, "scale": scale}
            spec, workload = resolve(data, RunSpec)
            worker = Worker(0, 4, local_world_size=2)
            return choose_strategy(spec, workload, workload.build(), worker, None).reason

        told = "fp16 gathers weights in fp32, at twice the traffic of bf16"
        assert told in reason("fp16", "fsdp")
        assert told in reason("fp16", "hsdp")
        assert told not in reason("fp16", "ddp")
        assert told not in reason("bf16", "fsdp")

    def test_groups_must_fit(self) -> None:
        with pytest.raises(SpecError, match=r"^scale.group: 4 workers cannot be put into groups"):
            self.choice(9, parallel="hsdp", group=3)

    def test_a_workload_without_a_plan_is_not_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import tower

        monkeypatch.setattr(tower.Tower, "tensor_plan", lambda *_: {})
        with pytest.raises(SpecError, match=r"^scale.parallel: tensor needs a workload that def"):
            self.choice(9, parallel="tensor", group=2)


def test_the_state_is_weights_gradients_and_moments() -> None:
    spec = RunSpec.model_validate({"workload": "x"})
    assert state_bytes(spec.optimizer, nn.Linear(10, 5)) == 55 * 4 * 4
    plain = RunSpec.model_validate({"workload": "x", "optimizer": {"name": "sgd", "momentum": 0}})
    assert state_bytes(plain.optimizer, nn.Linear(10, 5)) == 55 * 4 * 2
