"""Parts that `build` puts into evaluation mode stay in it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainers.plain_loop import Points, assert_same, plain_loop, run, workload_of
from trainers.checks.modes import begin_training, evaluation_mode, held_in_evaluation


class FrozenNorm(Points):
    """A frozen part with statistics of its own, and dropout that is off."""

    def build(self) -> nn.Module:
        network = nn.Sequential(
            nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)),
            nn.Tanh(),
            nn.Linear(6, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.Linear(6, 3),
        )
        network[0][1].running_mean.fill_(5.0)
        network[0][1].running_var.fill_(4.0)
        network[0].requires_grad_(False).eval()
        return network


class KeepsNormFrozen(nn.Module):
    """The other usual way: `train` is overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.norm.running_mean.fill_(0.5)
        self.calls: list[bool] = []

    def train(self, mode: bool = True) -> "KeepsNormFrozen":
        super().train(mode)
        self.norm.eval()
        self.calls.append(mode)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(x))


class Overridden(Points):
    def build(self) -> nn.Module:
        return KeepsNormFrozen()


def test_a_frozen_part_keeps_its_statistics_and_is_told_of(tmp_path: Path) -> None:
    """Over several evaluations, each of which leaves and enters training mode."""
    workload = workload_of(FrozenNorm)
    rows, state = run(workload, tmp_path, train={"evaluate_every_epochs": 0.5})
    losses, network = plain_loop(workload, tmp_path)
    assert list(rows.rows["train/loss"].values()) == pytest.approx(losses, rel=1e-9)
    assert_same(state, network)
    assert (state["model.0.1.running_mean"] == 5.0).all()
    assert rows.notes["modes"] == "in evaluation mode, as build left it: 0"


def test_a_modules_own_train_is_called(tmp_path: Path) -> None:
    workload = workload_of(Overridden)
    rows, state = run(workload, tmp_path, train={"evaluate_every_epochs": 1})
    losses, network = plain_loop(workload, tmp_path, prepare=lambda network: network.train())
    assert list(rows.rows["train/loss"].values()) == pytest.approx(losses, rel=1e-9)
    assert_same(state, network)
    assert (state["model.norm.running_mean"] == 0.5).all()


def test_a_network_built_in_evaluation_mode_stays_in_it(tmp_path: Path) -> None:
    class Whole(FrozenNorm):
        def build(self) -> nn.Module:
            return super().build().eval()

    rows, state = run(workload_of(Whole), tmp_path)
    assert rows.notes["modes"] == "in evaluation mode, as build left it: the whole model"
    assert (state["model.3.running_mean"] == 0.0).all()


def test_evaluation_mode_restores_each_module_also_after_an_error() -> None:
    network = nn.Sequential(KeepsNormFrozen(), nn.Dropout(), nn.Sequential(nn.Dropout()).eval())
    begin_training(network)
    before = [module.training for module in network.modules()]
    assert before == [True, True, False, True, True, False, False]
    assert held_in_evaluation(network) == ["0.norm", "2"]
    try:
        with evaluation_mode(network):
            assert not any(module.training for module in network.modules())
            raise RuntimeError
    except RuntimeError:
        pass
    assert [module.training for module in network.modules()] == before
    assert network[0].calls == [True, False, True]


def test_statistics_of_a_part_of_a_batch_are_told_of(tmp_path: Path) -> None:
    whole, _ = run(workload_of(FrozenNorm), tmp_path, "whole", train={"steps": 2})
    assert "batch norm" not in whole.notes
    parts, _ = run(workload_of(FrozenNorm), tmp_path, "parts", train={"steps": 2, "micro_batch": 4})
    assert parts.notes["batch norm"].startswith("statistics of 4 samples at a time, not of the 16")
    none, _ = run(workload_of(Points), tmp_path, "none", train={"steps": 2, "micro_batch": 4})
    assert "batch norm" not in none.notes
