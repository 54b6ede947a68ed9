"""A run in this process, and the same in a plain PyTorch loop in float64, for tests to compare."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.trainers.wild import Recorder
from trainers import Batch, Spec, Workload, table
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.counter_rng import combine_seeds, seed_host
from trainers.data.dataset import prepare_dataset
from trainers.data.sampling import epoch_permutation
from trainers.data.splits import open_split
from trainers.engine.loop import train
from trainers.spec import RunSpec

SAMPLES, BATCH, STEPS = 96, 16, 18
RULE: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "schedule": {"warmup": 0.0}}


class Points(Workload):
    """Three classes of points with eight coordinates, one of them all zero, and an MLP."""

    class Data(Spec):
        zero: int = 70

    def dataset(self) -> dict[str, Any]:
        def split(count: int, seed: int) -> Any:
            x = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
            x[self.data.zero % count] = 0.0
            return table(x=x, y=np.abs(x[:, :3]).argmax(1))

        return {"train": split(SAMPLES, 0), "val": split(40, 1)}

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["x"])

    def loss(self, output: Any, batch: Batch) -> Any:
        return F.cross_entropy(output, batch["y"], reduction="none")


def workload_of(kind: type[Workload], **data: Any) -> Workload:
    return kind(kind.Data(**data), kind.Model())


def spec_of(train: Mapping[str, Any] | None = None, **sections: Any) -> RunSpec:
    usual = {"steps": STEPS, "global_batch": BATCH, "precision": "fp64"}
    data = {"workload": "any:Points", "tracking": {"every_steps": 1}, "optimizer": RULE}
    return RunSpec.model_validate({**data, **sections, "train": {**usual, **(train or {})}})


def run(
    workload: Workload, folder: Path, name: str = "run", stop_after: int = 10**9, **sections: Any
) -> tuple[Recorder, dict[str, Tensor]]:
    """Train a workload; the reports, and the tensors of the last checkpoint."""
    reporter = Recorder(stop_after)
    dataset = prepare_dataset(workload, folder)
    train(spec_of(**sections), workload, dataset, folder / name, reporter)
    return reporter, last_state(folder / name)


def last_state(folder: Path) -> dict[str, Tensor]:
    newest = Checkpoints(folder / "checkpoints").latest()
    assert newest is not None
    return load_file(newest / "state-00000.safetensors")


def order_of_samples(steps: int) -> Tensor:
    """The samples of a run with seed 0, [steps * BATCH], from the definition of their order."""
    epochs = math.ceil(steps * BATCH / SAMPLES)
    orders = [epoch_permutation(0, epoch, SAMPLES) for epoch in range(epochs)]
    return torch.cat(orders)[: steps * BATCH]


def plain_loop(
    workload: Workload,
    folder: Path,
    left_out: Callable[[float, list[Tensor]], bool] = lambda loss, gradients: False,
    prepare: Callable[[nn.Module], Any] = lambda network: None,
    clip_norm: float | None = None,
    steps: int = STEPS,
) -> tuple[list[float], nn.Module]:
    """Losses and network of a loop without fused kernels; NaN for the steps that were left out.

    AdamW as `RULE` has it: a rate that falls as a cosine, decay of matrices alone.
    """
    seed = combine_seeds(0)
    torch.manual_seed(seed)
    seed_host(seed)
    network = workload.build()
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.data = tensor.data.to(torch.cdouble if tensor.is_complex() else torch.double)
    prepare(network)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in trained if w.ndim > 1], "weight_decay": RULE["weight_decay"]},
        {"params": [w for w in trained if w.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=False)
    split = open_split(prepare_dataset(workload, folder), "train")
    losses = []
    for step, index in enumerate(order_of_samples(steps).split(BATCH)):
        rate = RULE["lr"] * (1 + math.cos(math.pi * step / (steps - 1))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {
            n: v[index].double() if v.is_floating_point() else v[index] for n, v in split.items()
        }
        kept = {name: value.clone() for name, value in network.state_dict().items()}
        loss = workload.loss(workload.forward(network, batch), batch).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in trained if weight.grad is not None]
        if left_out(loss.item(), gradients):
            network.load_state_dict(kept)
            losses.append(math.nan)
        else:
            losses.append(loss.item())
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(trained, clip_norm)
            optimizer.step()
    return losses, network


def assert_same(state: Mapping[str, Tensor], network: nn.Module) -> None:
    """Compare the tensors of a checkpoint with those of a network."""
    for name, value in network.state_dict().items():
        wanted = torch.view_as_real(value) if value.is_complex() else value
        torch.testing.assert_close(state[f"model.{name}"], wanted, rtol=1e-9, atol=1e-9, msg=name)
