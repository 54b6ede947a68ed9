"""Python's and numpy's generators: seeded as PyTorch's is, and draws from them are noticed."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.trainers.plain_loop import BATCH, STEPS, Points, run, workload_of
from trainers import Batch, Workload
from trainers.counter_rng import combine_seeds, host_rng_state, seed_host
from trainers.modeling.dropout import NATIVE_RNG_NOTE


class NumpyWeights(Points):
    """Weights from numpy's generator, as in much research code, and a width from Python's."""

    def build(self) -> nn.Module:
        network = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
        with torch.no_grad():
            network[0].weight.copy_(torch.from_numpy(np.random.normal(size=(6, 8))))
            network[2].bias.fill_(random.random())
        return network


def noise(model: nn.Module, size: Any) -> Tensor:
    return torch.as_tensor(np.random.normal(size=size) + random.gauss(0, 1))


class NumpyNoise(Points):
    """Noise in each forward pass while training."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        x = batch["x"]
        return model(x + noise(model, x.shape).to(x.dtype) if model.training else x)


class NumpyAugmentation(Points):
    def augment(self, batch: Batch, random: Any) -> Batch:
        return {**batch, "x": batch["x"] * np.random.choice([-1.0, 1.0])}


class LateNoise(NumpyNoise):
    """Noise after some steps only."""

    def build(self) -> nn.Module:
        network = super().build()
        network.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        return network

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        if model.training:
            model.passes.add_(1)
        late = model.passes > 6
        return super().forward(model, batch) if late else Points.forward(self, model, batch)


def spoil() -> None:
    """Draw as other code of the process does."""
    random.seed()
    np.random.seed()
    torch.seed()


@pytest.mark.parametrize("kind", [NumpyWeights, NumpyNoise, NumpyAugmentation, LateNoise])
def test_two_runs_of_one_seed_are_the_same(kind: type[Workload], tmp_path: Path) -> None:
    states = []
    for name in ("a", "b"):
        spoil()
        states.append(run(workload_of(kind), tmp_path, name)[1])
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    _, a = run(workload_of(NumpyWeights), tmp_path, "a", train={"steps": 1})
    _, b = run(workload_of(NumpyWeights), tmp_path, "b", train={"steps": 1, "seed": 1})
    assert not torch.allclose(a["model.0.weight"], b["model.0.weight"], atol=0.1)


def test_the_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    """numpy's own legacy generator gives them, from the run's seed."""
    rule = {"name": "sgd", "lr": 1e-30, "momentum": 0.0}
    _, state = run(workload_of(NumpyWeights), tmp_path, train={"steps": 1}, optimizer=rule)
    seed = combine_seeds(0)
    drawn = np.random.RandomState(seed & 0xFFFFFFFF).normal(size=(6, 8)).astype(np.float32)
    assert np.array_equal(state["model.0.weight"].numpy(), drawn.astype(np.float64))
    assert state["model.2.bias"][0] == np.float32(random.Random(seed).random())


@pytest.mark.parametrize("stop_after", [1, 2, 5, 11])
@pytest.mark.parametrize("kind", [NumpyNoise, NumpyAugmentation])
def test_a_resumed_run_draws_the_same(
    kind: type[Workload], stop_after: int, tmp_path: Path
) -> None:
    """With micro-batches, each of which has draws of its own."""
    section = {"micro_batch": BATCH // 2}
    _, wanted = run(workload_of(kind), tmp_path, "straight", train=section)
    run(workload_of(kind), tmp_path, "cut", stop_after, train=section)
    spoil()
    _, found = run(workload_of(kind), tmp_path, "cut", train=section)
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_draws_are_told_of_also_late_ones(tmp_path: Path) -> None:
    for kind in (NumpyNoise, NumpyAugmentation, LateNoise):
        rows, _ = run(workload_of(kind), tmp_path, kind.__name__)
        assert rows.notes["random"] == NATIVE_RNG_NOTE
    rows, _ = run(workload_of(NumpyWeights), tmp_path, "only in build")
    assert "random" not in rows.notes


def test_a_run_that_notices_late_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    """Noise begins in step 7, noticed in step 9, the first power of two after it."""
    _, wanted = run(workload_of(LateNoise), tmp_path, "straight")
    run(workload_of(LateNoise), tmp_path, "cut", 12)
    spoil()
    _, found = run(workload_of(LateNoise), tmp_path, "cut")
    assert all(found[name].equal(wanted[name]) for name in wanted)
    assert STEPS > 12


def test_the_state_shows_every_kind_of_draw() -> None:
    for draw in (
        random.random,
        lambda: random.shuffle([1, 2, 3]),
        np.random.rand,
        lambda: np.random.permutation(3),
        lambda: np.random.randint(7),
        lambda: random.getrandbits(8),
    ):
        seed_host(3)
        before = host_rng_state()
        assert before == host_rng_state()
        draw()
        assert before != host_rng_state()
    seed_host(3)
    assert before == host_rng_state()
