"""What a workload's methods must return: a line that names the method, before the first update."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.base.errors import TrainingError
from tests.trainers.plain_loop import BATCH, Points, run, workload_of
from trainers import Batch, table

LOSSES = {
    "none": (lambda loss_B: None, "None"),
    "dict": (lambda loss_B: {"loss": loss_B, "kl": 0.5}, r"a dict of 2: loss: \[16\], kl: float"),
    "tuple": (lambda loss_B: (loss_B, loss_B), "a tuple of 2"),
    "number": (lambda loss_B: loss_B.mean().item(), r"1\.\d+"),
    "scalar": (lambda loss_B: loss_B.mean(), r"shape \[\], float64"),
    "column": (lambda loss_B: loss_B[:, None], r"shape \[16, 1\], float64"),
    "short": (lambda loss_B: loss_B[1:], r"shape \[15\], float64"),
    "integer": (lambda loss_B: loss_B.round().long(), r"shape \[16\], int64"),
    "boolean": (lambda loss_B: loss_B > 1, r"shape \[16\], bool"),
    "complex": (lambda loss_B: loss_B.to(torch.cdouble), r"shape \[16\], complex128"),
    "array": (lambda loss_B: loss_B.detach().numpy(), "a ndarray"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_must_be_a_number_per_sample(case: str, tmp_path: Path) -> None:
    change, got = LOSSES[case]

    class Odd(Points):
        def loss(self, output: Any, batch: Batch) -> Any:
            return change(super().loss(output, batch))

    with pytest.raises(TrainingError) as caught:
        run(workload_of(Odd), tmp_path)
    assert_line(
        caught,
        "Odd.loss must return one value per sample, a floating-point tensor of "
        rf"shape \[{BATCH}\] \(got {got}\)",
    )


def assert_line(caught: pytest.ExceptionInfo[TrainingError], wanted: str) -> None:
    assert re.fullmatch(wanted, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("how", ["detached", "no_grad"])
def test_a_loss_must_depend_on_what_is_trained(how: str, tmp_path: Path) -> None:
    class Cut(Points):
        def loss(self, output: Any, batch: Batch) -> Any:
            if how == "detached":
                return super().loss(output.detach(), batch)
            with torch.no_grad():
                return super().loss(output, batch)

    with pytest.raises(TrainingError, match=r"^Cut\.loss must depend on the weights that are tr"):
        run(workload_of(Cut), tmp_path)


NETWORKS = {
    "nothing": (lambda: None, r"a torch\.nn\.Module \(got None\)"),
    "list": (lambda: [nn.Linear(8, 3)], r"a torch\.nn\.Module \(got a list of 1\)"),
    "class": (lambda: nn.Linear, r"a torch\.nn\.Module \(got a type\)"),
    "no parameters": (nn.Identity, r"a network with parameters to train \(Identity has none\)"),
    "frozen": (
        lambda: nn.Linear(8, 3).requires_grad_(False),
        r"a network of which something is trained \(all 2 parameters are frozen: requires_grad .*",
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_a_network_must_have_something_to_train(case: str, tmp_path: Path) -> None:
    make, line = NETWORKS[case]

    class Odd(Points):
        def build(self) -> Any:
            return make()

    with pytest.raises(TrainingError) as caught:
        run(workload_of(Odd), tmp_path)
    assert_line(caught, f"Odd.build must return {line}")


class Sparse(Points):
    def dataset(self) -> dict[str, Any]:
        words = np.random.default_rng(0).integers(0, 20, 96)
        return {split: table(t=words, y=words % 3) for split in ("train", "val")}

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(20, 3, sparse=True), nn.Linear(3, 3))

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["t"])


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"on_nonfinite": "skip"}])
def test_gradients_must_be_dense(options: dict[str, Any], tmp_path: Path) -> None:
    line = r"^Sparse\.build must make layers with dense gradients \(that of 0\.weight is sparse\)"
    with pytest.raises(TrainingError, match=line):
        run(workload_of(Sparse), tmp_path, train=options)


BATCHES = {
    "nothing": (lambda batch: None, "None"),
    "empty": (lambda batch: {}, "an empty dict"),
    "tensor": (lambda batch: batch["x"], r"shape \[16, 8\], float64"),
    "twice": (
        lambda batch: {name: torch.cat([v, v]) for name, v in batch.items()},
        r"a dict of 2: x: \[32, 8\], y: \[32\]",
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_an_augmented_batch_has_as_many_samples(case: str, tmp_path: Path) -> None:
    change, got = BATCHES[case]

    class Odd(Points):
        def augment(self, batch: Batch, random: Any) -> Any:
            return change(batch)

    with pytest.raises(TrainingError) as caught:
        run(workload_of(Odd), tmp_path)
    assert_line(
        caught,
        "Odd.augment must return the batch, a dict of columns with 16 samples each "
        rf"\(got {got}\)",
    )
