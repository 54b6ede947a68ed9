"""State in plain attributes comes back with checkpoints and exports; caches are left out."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.trainers.wild import Base, Trained, fit, fit_together, split
from trainers.checkpoints.attributes import Attributes
from trainers.checkpoints.export import export_model, load_model
from trainers.checkpoints.state import load_model_weights
from trainers.modeling.build import build_network
from trainers.workload import Batch


class Shared(nn.Module):
    """A block that keeps its averages in a dict that another block has too."""

    def __init__(self, shared: dict[str, Tensor]) -> None:
        super().__init__()
        self.linear, self.shared = nn.Linear(8, 8), shared

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.shared["mean"] = 0.9 * self.shared["mean"].to(x) + 0.1 * x.detach().mean(0)
        return torch.tanh(self.linear(x - self.shared["mean"].to(x)))


class Stateful(nn.Module):
    """Numbers, tensors, arrays, lists and dicts that steps change and that the output needs."""

    def __init__(self) -> None:
        super().__init__()
        shared = {"mean": torch.zeros(8, dtype=torch.float64)}
        self.blocks = nn.Sequential(Shared(shared), Shared(shared))
        self.last = nn.Linear(8, 3)
        self.calls, self.phase, self.best = 0, "warm", None
        self.scale: Any = 1.0
        self.sums = torch.zeros(8, dtype=torch.float64)
        self.counts, self.array = [0, 0], np.zeros(2)
        self.register_buffer("hidden", torch.zeros(8), persistent=False)
        self.views = [self.last.weight]  # not a state of its own

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.counts[self.calls % 2] += 1
            self.array += [0.5, self.calls]
            mean = x.detach().mean()
            self.scale = 0.9 * self.scale + 0.1 * mean.abs()  # a number becomes a tensor
            self.best = max(self.best or 0.0, float(mean))
            self.late = self.calls * 3
            self.sums.add_(x.detach().sum(0))
            self.hidden = 0.5 * self.hidden + x.detach().mean(0)
            if self.calls == 3:
                self.phase = "hot"
        factor = 1 + 0.1 / (1 + self.calls) + 0.01 * self.counts[0] + float(self.array[1]) / 99
        x = x * factor + self.hidden + 0.01 * self.sums.to(x) + (self.best or 0)
        x = x * self.scale + getattr(self, "late", 0) / 50
        return self.last(self.blocks(x)) * (0.5 if self.phase == "hot" else 1)


class StatefulModel(Base):
    def build(self) -> nn.Module:
        return nn.Sequential(OrderedDict(inner=Stateful()))


class Evaluated(nn.Module):
    """A counter of all passes, also those of evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) / self.calls


class EvaluatedModel(Base):
    def build(self) -> nn.Module:
        return Evaluated()


class StatefulWorkload(Base):
    """The loss is warmed up by a counter of the workload's own."""

    losses = 0

    def augment(self, batch: Batch, random: Any) -> Batch:
        self.losses += 1
        return batch

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return super().loss(output, batch) * self.losses / 8


class Cached(nn.Module):
    """Tables as large as the batches so far, by length and in one, beside a counter."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.linear, self.counts = nn.Linear(8, 3), counts
        self.length, self.calls = 4, 0
        self.tables: dict[int, Tensor] = {}
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.length:
            self.length = len(x)
            self.table = torch.arange(float(len(x)))
        if len(x) not in self.tables:
            self.tables[len(x)] = torch.ones(len(x), 1)
        assert len(self.table) >= len(x)
        if self.counts and self.training:
            self.calls += 1
        rows = self.table[: len(x), None].to(x)
        return self.linear(x) * self.tables[len(x)].to(x) / (1 + self.calls) + 0 * rows


class CachedModel(Base):
    def build(self) -> nn.Module:
        return Cached(counts=False)


class CountingCache(Base):
    def build(self) -> nn.Module:
        return Cached(counts=True)


class Memory(nn.Module):
    """A list that grows in each step, and an average that the first step makes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.history = nn.Linear(8, 3), list[float]()
        self.mean: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.history.append(float(x.detach().mean()))
            mean = x.detach().mean(0)
            self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return self.linear(x) + sum(self.history)


class MemoryModel(Base):
    def build(self) -> nn.Module:
        return Memory()


def extra(trained: Trained) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((trained.checkpoint / "manifest.json").read_text())["extra"]
    return found


@pytest.mark.parametrize(
    ("workload", "stop_after"),
    [
        (StatefulModel, 1),
        (StatefulModel, 5),
        (StatefulWorkload, 5),
        (EvaluatedModel, 4),
        (EvaluatedModel, 6),
        (CachedModel, 1),
        (CountingCache, 2),  # after one step a counter may be the length of the table
    ],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, workload: type[Base], stop_after: int
) -> None:
    straight = fit(tmp_path / "a", workload)
    before = fit(tmp_path / "b", workload, stop_after=stop_after)
    found = fit(tmp_path / "b", workload)
    losses = {**before.rows["train/loss"], **found.rows["train/loss"]}
    assert losses == straight.rows["train/loss"]
    assert found.last("val/loss") == straight.last("val/loss")
    contents = [load_file(t.checkpoint / "state-00000.safetensors") for t in (found, straight)]
    assert contents[0].keys() == contents[1].keys()
    assert all(contents[0][name].equal(contents[1][name]) for name in contents[0])
    assert extra(found) == extra(straight)


def test_the_values_are_those_of_all_steps(tmp_path: Path) -> None:
    fit(tmp_path, StatefulModel, stop_after=3)
    trained = fit(tmp_path, StatefulModel)
    network = build_network(trained.spec.train, trained.workload)
    load_model_weights(trained.checkpoint, network)
    inner = network.inner
    assert (inner.calls, inner.counts, inner.phase, inner.late) == (8, [4, 4], "hot", 24)
    assert inner.array.tolist() == [4.0, 36.0]
    # Two epochs of all samples.
    total = 2 * split(trained.workload, "train")["x"].sum(0)
    torch.testing.assert_close(inner.sums, total)
    assert inner.blocks[0].shared is inner.blocks[1].shared
    assert inner.views[0] is inner.last.weight
    names = {name.rpartition(":")[2] for name in extra(trained)}
    state = {"calls", "phase", "best", "scale", "sums", "counts", "array", "hidden", "late"}
    assert names == {*state, "shared"}


@pytest.mark.parametrize("workload", [StatefulModel, CountingCache])
def test_an_exported_model_has_them(tmp_path: Path, workload: type[Base]) -> None:
    trained = fit(tmp_path, workload)
    network = build_network(trained.spec.train, trained.workload)
    load_model_weights(trained.checkpoint, network)
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8)
    wanted = network.eval()(x)
    assert not torch.equal(wanted, build_network(trained.spec.train, trained.workload).eval()(x))
    export_model(tmp_path / "model", trained.spec, trained.workload, trained.checkpoint)
    assert torch.equal(load_model(tmp_path / "model")(x), wanted)


def test_several_workers_begin_again_with_those_of_the_first(tmp_path: Path) -> None:
    scale = {"parallel": "fsdp"}
    fit_together(tmp_path / "a", CountingCache, stop_after=5, scale=scale)
    found = fit_together(tmp_path / "a", CountingCache, scale=scale)
    straight = fit_together(tmp_path / "b", CountingCache, scale=scale)
    assert found.error is straight.error is None
    assert found.last("val/loss") == straight.last("val/loss")
    assert extra(found) == {"attribute/:calls": 8}


def test_a_cache_is_not_saved(tmp_path: Path) -> None:
    assert extra(fit(tmp_path / "a", CachedModel)) == {}
    found = fit(tmp_path / "b", CountingCache)
    assert extra(found) == {"attribute/:calls": 8}
    assert "state" not in found.notes


def test_what_may_be_no_cache_is_named_once(tmp_path: Path) -> None:
    note = fit(tmp_path, MemoryModel).notes["state"]
    assert note.startswith("steps change history, mean, which checkpoints do not hold;")
    assert "register_buffer" in note
    assert extra(fit(tmp_path, MemoryModel)) == {}


def test_modules_of_libraries_have_none() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    attributes = Attributes(model)
    model[1].in_features = 5
    assert attributes.changed(model) == {}


def test_a_large_table_that_moves_is_the_same() -> None:
    class Tabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.arange(400_000.0)

    model = Tabled()
    attributes = Attributes(model)
    model.table = model.table.clone()
    assert attributes.changed(model) == {}
    model.table[7] = 0
    assert [*attributes.changed(model)] == [":table"]
