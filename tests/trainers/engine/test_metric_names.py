"""The metrics of a workload's evaluations, known before training: right, or not known at all."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from trainers import table
from trainers.data.dataset import prepare_dataset
from trainers.engine import metric_names
from trainers.engine.metric_names import validation_metrics
from trainers.spec import RunSpec
from trainers.workload import Batch, Workload

SPEC = RunSpec.model_validate({"workload": "vision"})


class Plain(Workload):
    """A linear model on four numbers."""

    built_here = False

    def dataset(self) -> dict[str, pa.Table]:
        x, y = np.zeros((8, 4)), np.arange(8) % 2
        return {"train": table(x=x, y=y), "val": table(x=x[:3], y=y[:3])}

    def build(self) -> nn.Module:
        Plain.built_here = True
        return nn.Linear(4, 2)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["x"])

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(output, batch["y"], reduction="none")

    def metrics(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (output.argmax(-1) == batch["y"]).float()}


class Summed(Plain):
    """Reports something else than the means."""

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return {"error": 1 - means["accuracy"], "perplexity": 2.0 ** means["loss"]}


class Broken(Plain):
    """Its metrics raise."""

    def metrics(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        raise KeyError("label")


class Ends(Plain):
    """Ends its process."""

    def build(self) -> nn.Module:
        os._exit(3)


class Hangs(Plain):
    """Does not return."""

    def build(self) -> nn.Module:
        time.sleep(3600)
        raise AssertionError


def found(kind: type[Workload], folder: Path) -> list[str] | None:
    workload = kind(kind.Data(), kind.Model())
    return validation_metrics(SPEC, workload, prepare_dataset(workload, folder, None))


def test_means_and_summaries(tmp_path: Path) -> None:
    assert found(Plain, tmp_path) == ["val/loss", "val/accuracy"]
    assert not Plain.built_here, "the user's code ran in this process"
    assert found(Summed, tmp_path) == ["val/error", "val/perplexity"]


@pytest.mark.parametrize("kind", [Broken, Ends, Hangs])
def test_where_it_cannot_be_told(
    kind: type[Workload], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_names, "TIMEOUT_S", 0.5 if kind is Hangs else 20.0)
    assert found(kind, tmp_path) is None


def test_a_large_model_is_not_built(tmp_path: Path) -> None:
    """One of 4 TB."""

    class Huge(Plain):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 10**6), nn.Linear(10**6, 10**6), nn.Linear(10**6, 2))

    assert found(Huge, tmp_path) is None
    assert torch.empty(0).device.type == "cpu", "the default device is as before"
