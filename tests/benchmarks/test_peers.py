"""The trial of `benchmarks/peers.py` is the same as ours: the same training by other code."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.data.dataset import prepare_dataset
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Evaluations(NullReporter):
    """A reporter that keeps the validation loss of each evaluation."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_evaluation_end(self, metrics: Any, step: int, checkpoints: Any) -> None:
        self.losses[step] = metrics["val/loss"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, as in the benchmark; on a busy machine several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", ["mlp", "cnn"])
def test_by_hand_and_ours_learn_the_same(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    fused, peers = (importlib.import_module(name) for name in ("fused", "peers"))
    data = fused.case_data(case, tiny=True)
    del data["sweep"]
    data["optimizer"] = {"lr": 3e-3, "weight_decay": 0.5}
    spec, workload = resolve(data, RunSpec)
    dataset = prepare_dataset(workload, tmp_path)
    ours = Evaluations()
    train(spec, workload, dataset, tmp_path, ours)

    training, losses = peers.Training(data, dataset), {}
    for step in range(training.total):
        training.take(step)
        if step + 1 in training.evaluations:
            losses[step + 1] = training.evaluate()
    assert len(losses) == 2
    assert losses == pytest.approx(ours.losses, rel=1e-4)
    first, last = losses.values()
    assert last < first  # otherwise both could have done nothing
