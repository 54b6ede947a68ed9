"""What runs in a plain loop runs on several workers: the same losses and weights in float64."""

import multiprocessing
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.trainers.modeling import users_models
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.state import load_model_weights
from trainers.counter_rng import combine_seeds
from trainers.data.dataset import prepare_dataset
from trainers.data.sampling import epoch_permutation
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve
from trainers.worker import Worker

pytestmark = pytest.mark.slow  # tests/trainers/conformance has most of it

STEPS, BATCH = 7, 12
MODELS = [model.__name__ for model in users_models.MODELS]
# Name -> workers, and sections of the spec.
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one, recomputed": (1, {"train": {"activation_checkpointing": True}}),
    "ddp": (2, {"scale": {"parallel": "ddp"}}),
    "ddp, micro-batches": (2, {"scale": {"parallel": "ddp"}, "train": {"micro_batch": 2}}),
    "fsdp": (2, {"scale": {"parallel": "fsdp"}}),
    "fsdp, micro-batches": (2, {"scale": {"parallel": "fsdp"}, "train": {"micro_batch": 2}}),
    "fsdp, recomputed": (
        2,
        {"scale": {"parallel": "fsdp"}, "train": {"activation_checkpointing": True}},
    ),
    "hsdp": (4, {"scale": {"parallel": "hsdp", "group": 2}}),
}
BLOCKS = {"NestedLists", "Twice", "Repeated", "Skipping", "Tied", "Dataclasses"}
COUNTING = {"Alternating", "Skipping", "Scalars"}
"""They count forward passes, which are more with micro-batches."""
SLOTS = [
    (model, way)
    for way, (workers, _) in WAYS.items()
    for model in MODELS
    if ("recomputed" not in way or model in BLOCKS)
    and ("micro" not in way or model not in COUNTING)
    and (workers < 4 or model in {"Methods", "Routed", "Tied", "Idle"})
]


def spec_of(model: str, way: str = "one") -> tuple[RunSpec, Any]:
    workers, sections = WAYS[way]
    fields = {"steps": STEPS, "global_batch": BATCH, "precision": "fp64"}
    data = {
        "workload": f"{users_models.__name__}:{model}",
        "optimizer": {"lr": 0.03, "weight_decay": 0.1, "schedule": {"name": "constant"}},
        "tracking": {"every_steps": 1},
        "train": {**fields, **sections.get("train", {})},
        "scale": {"workers": workers, **sections.get("scale", {})},
    }
    return resolve(data, RunSpec)


class Losses(NullReporter):
    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}

    def log_metrics(self, metrics: Any, step: int) -> None:
        for name, value in metrics.items():
            self.columns.setdefault(name, []).append(value)


Result = dict[str, list[float]] | str


def work(rank: int, world: int, root: Path, slots: list[tuple[str, str]], answers: Any) -> None:
    torch.set_num_threads(1)
    if world > 1:
        place = f"file://{root}/meeting-{world}"
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    for model, way in slots:
        spec, workload = spec_of(model, way)
        losses = Losses()
        result: Result = losses.columns
        worker = Worker(rank, world, local_world_size=world)
        users_models.TABLES.clear()
        try:
            folder = root / f"{model} {way}"
            train(spec, workload, prepare_dataset(workload, root), folder, losses, worker)
        except Exception:
            result = traceback.format_exc()
        if rank == 0:
            answers.put(((model, way), result))
    if world > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By model and way: the losses, or a traceback; and the folder of the runs."""
    root = tmp_path_factory.mktemp("users-models")
    prepare_dataset(spec_of("Base")[1], root)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [users_models.__name__, "torch._dynamo", "torch.distributed.fsdp"]
    )
    answers = context.Queue()
    found: dict[tuple[str, str], Result] = {}
    for world in (1, 2, 4):
        slots = [slot for slot in SLOTS if WAYS[slot[1]][0] == world]
        processes = [
            context.Process(target=work, args=(rank, world, root, slots, answers))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        found.update(answers.get(timeout=300) for _ in slots)
        for process in processes:
            process.join()
    return found, root


def plain_loop(model: str) -> tuple[list[float], float, dict[str, Tensor]]:
    """Losses by step, the loss on the validation split, and the weights after the last step."""
    _, workload = spec_of(model)
    users_models.TABLES.clear()
    torch.manual_seed(combine_seeds(0))
    network = workload.build().double()
    columns = workload.columns()

    def batch_of(split: str, index: Any) -> dict[str, Tensor]:
        found = {name: torch.tensor(values[index]) for name, values in columns[split].items()}
        return {k: v.double() if v.is_floating_point() else v for k, v in found.items()}

    weights = dict.fromkeys(network.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.1},
            {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.03,
        betas=tuple(spec_of(model)[0].optimizer.betas),
    )
    per_epoch = users_models.SAMPLES // BATCH
    order = [epoch_permutation(0, epoch, users_models.SAMPLES) for epoch in range(STEPS)]
    losses = []
    for step in range(STEPS):
        epoch, part = divmod(step, per_epoch)
        index = order[epoch][part * BATCH : (part + 1) * BATCH].numpy()
        batch = batch_of("train", index)
        loss = workload.loss(workload.forward(network, batch), batch).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        batch = batch_of("val", slice(None))
        final = workload.loss(workload.forward(network, batch), batch).mean().item()
    return losses, final, {name: weight.detach() for name, weight in network.named_parameters()}


@pytest.mark.parametrize(("model", "way"), SLOTS)
def test_losses_and_weights_are_those_of_a_plain_loop(model: str, way: str, results: Any) -> None:
    found, root = results[0][model, way], results[1]
    if model in users_models.REFUSED_BY_SHARDS and ("fsdp" in way or way == "hsdp"):
        assert isinstance(found, str)
        assert f"TrainingError: {users_models.REFUSED_BY_SHARDS[model]}" in found
        return
    assert not isinstance(found, str), found
    losses, final, weights = plain_loop(model)
    assert found["train/loss"] == pytest.approx(losses, rel=1e-9)
    assert found["val/loss"][-1] == pytest.approx(final, rel=1e-9)
    newest = Checkpoints(root / f"{model} {way}" / "checkpoints").latest()
    assert newest is not None
    network = spec_of(model)[1].build().double()
    if model == "LateBuffer":  # its checkpoint has a buffer that a new network lacks
        return
    load_model_weights(newest, network)
    for name, weight in network.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-9, atol=1e-12)
