"""What is reported of a model: its metrics by name, of one model, whatever users return."""

import decimal
import fractions
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.base.errors import SpecError, TrainingError
from tests.trainers.wild import Base, Trained, fit, fit_together, split
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.state import load_model_weights
from trainers.engine.metrics import checked_metrics, checked_summary
from trainers.workload import Batch


class ShareOrder(Base):
    """The same names in every batch, in an order that depends on the batch."""

    def metrics(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        first = batch["y"].unique().tolist()
        order = [*first, *(c for c in range(3) if c not in first)]
        return {f"share_{c}": (batch["y"] == c).float() for c in order}


class Recall(Base):
    """Names that depend on the batch."""

    def metrics(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        right = (output.argmax(1) == batch["y"]).float()
        return {f"recall_{c}": right * (batch["y"] == c) for c in batch["y"].unique().tolist()}


class Norm(Base):
    """Each worker has running means of its own share."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


class Mask(nn.Module):
    """A buffer that appears in the first forward pass, and grows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or len(self.mask) < len(x):
            self.register_buffer("mask", torch.linspace(0.5, 1, len(x), dtype=x.dtype))
        self.mask[0] += 0.125
        return self.linear(x) * self.mask[: len(x), None]


class Late(Base):
    def build(self) -> nn.Module:
        return Mask()


class InPlace(Base):
    """Changes its batch."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        batch["x"] -= batch["x"].mean(0)
        batch["x"].div_(2)
        return model(batch["x"])


class Table(nn.Module):
    """A table that grows with the longest batch, made in an evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cached = nn.Linear(8, 3), None

    def forward(self, x: Tensor) -> Tensor:
        if self.cached is None or len(self.cached) < len(x):
            self.cached = torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)[:, None]
        return self.linear(x) * self.cached[: len(x)]


class Cached(Base):
    """Batches of evaluations are larger than those of steps."""

    @property
    def evaluation_batch(self) -> int:
        return 512

    def build(self) -> nn.Module:
        return Table()


class Summarised(Base):
    def summary(self, means: dict[str, float]) -> dict[str, Any]:
        return {
            "loss": np.float32(means["loss"]),
            "narrow": np.float32(means["accuracy"]),
            "half": np.float16(0.5),
            "whole": np.int64(3),
            "array": np.array(0.25),
            "tensor": torch.tensor(0.75),
            "exact": fractions.Fraction(1, 8),
            "decimal": decimal.Decimal("0.5"),
            "true": np.bool_(True),
            "nan": np.float32("nan"),
        }


class Broken(Base):
    """A mistake that only an evaluation shows."""

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return {"loss": means["loss"], "ratio": means["loss"] / 0}


class Worst(Base):
    """A score by evaluation: NaN, 0.9, 0.5, 0.4, 0.6."""

    scores = (float("nan"), 0.9, 0.5, 0.4, 0.6)

    @property
    def evaluation_batch(self) -> int:
        return 512

    def build(self) -> nn.Module:
        network = super().build()
        network.register_buffer("evaluations", torch.tensor(0))
        return network

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        if not model.training:
            model.evaluations += 1
            batch["number"] = model.evaluations
        return model(batch["x"])

    def metrics(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        return {"f1": torch.full((len(output),), self.scores[int(batch["number"]) - 1])}


def val_loss(found: Trained) -> float:
    """The validation loss of the saved model, in a plain loop over whole batches of a worker."""
    network = found.workload.build().double()
    load_model_weights(found.checkpoint, network)
    val = split(found.workload, "val")
    with torch.no_grad():
        loss_B = F.cross_entropy(network.eval()(val["x"]), val["y"], reduction="none")
    return loss_B.mean().item()


def test_metrics_keep_their_names_in_any_order(tmp_path: Path) -> None:
    found = fit(tmp_path, ShareOrder)
    y = split(found.workload, "val")["y"].numpy()
    for c in range(3):
        assert found.last(f"val/share_{c}") == pytest.approx((y == c).mean(), rel=1e-12)


def test_metrics_keep_their_names_on_several_workers(tmp_path: Path) -> None:
    found = fit_together(tmp_path, ShareOrder, workers=2)
    assert found.error is None
    y = split(found.workload, "val")["y"].numpy()
    for c in range(3):
        assert found.last(f"val/share_{c}") == pytest.approx((y == c).mean(), rel=1e-12)


def test_a_name_that_some_batches_lack_is_refused(tmp_path: Path) -> None:
    """Its mean would be over the wrong samples. The state is saved before."""
    with pytest.raises(TrainingError) as caught:
        fit(tmp_path, Recall)
    assert str(caught.value).startswith(
        "the workload's metrics must have the same names in every batch; some batches lack "
        "'recall_1' (give a value, such as 0,"
    )
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoints" / "step-00000004").exists()


class OnePerWorker(Base):
    """One batch per worker, of one class: their names differ."""

    @property
    def evaluation_batch(self) -> int:
        return 512

    def metrics(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        return {"early" if batch["y"][0] == 0 else "late": torch.ones(len(output))}


def test_names_that_differ_between_workers_are_refused_by_all(tmp_path: Path) -> None:
    found = fit_together(tmp_path, OnePerWorker)
    for each in (found, *found.others):
        assert str(each.error).startswith(
            "TrainingError: the workload's metrics must have the same names in every batch; some "
            "batches lack 'early', 'late'"
        )
    assert (tmp_path / "checkpoints" / "step-00000004").exists()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_what_is_reported_is_the_saved_model(tmp_path: Path, mode: str) -> None:
    """The running means are those of rank 0, on all workers."""
    found = fit_together(tmp_path, Norm, scale={"parallel": mode})
    assert found.error is None
    assert found.last("val/loss") == pytest.approx(val_loss(found), rel=1e-12)


@pytest.mark.parametrize("workers", [(2, 2), (3, 3)])
def test_buffers_that_appear_late_are_those_of_the_first_worker(
    tmp_path: Path, workers: tuple[int, int]
) -> None:
    found = fit_together(tmp_path, Late, workers[0], scale={"parallel": "fsdp"})
    assert found.error is None
    mask = Checkpoints(tmp_path / "checkpoints")
    assert mask.latest() is not None
    network = found.workload.build().double()
    load_model_weights(found.checkpoint, network)
    assert len(network.mask) >= 8


def test_a_batch_is_the_workloads_own(tmp_path: Path) -> None:
    """It may be changed in place; the split is not: this is its second evaluation."""
    first = fit(tmp_path / "a", InPlace)
    network = first.workload.build().double()
    load_model_weights(first.checkpoint, network)
    val, losses = split(first.workload, "val"), []
    for turn in range(7):  # batches of at most 8
        part = slice(50 * turn // 7, 50 * (turn + 1) // 7)
        x = (val["x"][part] - val["x"][part].mean(0)) / 2
        losses.append(F.cross_entropy(network(x), val["y"][part], reduction="none"))
    assert first.last("val/loss") == pytest.approx(torch.cat(losses).mean().item(), rel=1e-12)


def test_a_table_made_in_an_evaluation_can_be_trained_with(tmp_path: Path) -> None:
    found = fit(tmp_path, Cached)
    assert found.outcome is not None
    assert found.outcome.complete


def test_numbers_are_numbers(tmp_path: Path) -> None:
    found = fit(tmp_path, Summarised)
    names = ("half", "whole", "array", "tensor", "exact", "decimal", "true")
    values = [found.last(f"val/{name}") for name in names]
    assert values == [0.5, 3.0, 0.25, 0.75, 0.125, 0.5, 1.0]
    assert found.last("val/loss") == pytest.approx(val_loss(found), rel=1e-12)
    manifest = json.loads((found.checkpoint / "manifest.json").read_text())
    assert manifest["metrics"]["val/whole"] == 3.0
    assert all(type(value) is float for value in manifest["metrics"].values())


def test_a_mistake_in_a_metric_costs_no_checkpoint(tmp_path: Path) -> None:
    """Neither at the last step: a corrected workload goes on from there."""
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Broken, train={"steps": 3, "global_batch": 24})
    assert (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").exists()


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 4)])
def test_nan_is_the_worst_in_either_mode(tmp_path: Path, mode: str, best: int) -> None:
    """Evaluations after 1, 2, 3 and 4 epochs of a step each have the scores of `Worst`."""
    rule = {"keep": 1, "keep_best": 1, "metric": "val/f1", "mode": mode}
    fit(tmp_path, Worst, train={"steps": 5, "global_batch": 96}, checkpoint=rule, data={"val": 5})
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {f"step-0000000{best}", "step-00000005"}


@pytest.mark.parametrize("metric", ["val/acuracy", "acuracy", "test/accuracy"])
def test_an_unknown_metric_is_refused_at_the_first_evaluation(tmp_path: Path, metric: str) -> None:
    rule = {"keep": 1, "keep_best": 1, "metric": metric}
    with pytest.raises(SpecError) as caught:
        fit(tmp_path, Base, checkpoint=rule)
    assert str(caught.value) == (
        f"checkpoint.metric: the evaluation has no {metric!r}; did you mean 'val/accuracy'?"
    )
    assert (tmp_path / "checkpoints" / "step-00000004").exists()
    found = fit(tmp_path, Base, checkpoint={**rule, "metric": "val/accuracy"})
    assert found.outcome is not None
    assert found.outcome.complete


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "must return a dict of tensors by name, each with one value per sample (got None)"),
        (
            0.5,
            "must return a dict of tensors by name, each with one value per sample (got a float)",
        ),
        (ONES, "(got a tensor of float32, shape [3])"),
        ([ONES], "(got a list)"),
        ({"a": 0.5}, "shape [3], for each name ('a' has a float)"),
        ({"a": {"b": ONES}}, "('a' has a dict)"),
        ({"a": None}, "('a' has None)"),
        ({"a": torch.tensor(0.5)}, "('a' has the shape [])"),
        ({"a": torch.ones(4)}, "('a' has the shape [4])"),
        ({"a": torch.ones(3, 1)}, "('a' has the shape [3, 1])"),
        ({"a": ONES.to(torch.complex64)}, "('a' has a tensor of complex64, shape [3])"),
        ({"loss": ONES}, "must not have the name 'loss', which is that of the loss itself"),
        ({3: ONES}, "must have names of text (got 3)"),
        ({" ": ONES}, "must have names of text (got ' ')"),
        ({"top@1": ONES, "top#1": ONES}, "has the names 'top@1' and 'top#1', which are the same"),
        ({"a//b": ONES, "a/b": ONES}, "has the names 'a//b' and 'a/b', which are the same"),
        ({"x/../loss": ONES}, "has the names 'loss' and 'x/../loss', which are the same in MLflow"),
        ({"a" * 250: ONES, "a" * 251: ONES}, "which are the same in MLflow"),
    ],
)
def test_metrics_of_another_form_are_refused_in_a_line(found: Any, says: str) -> None:
    with pytest.raises(TrainingError) as caught:
        checked_metrics(found, 3)
    assert str(caught.value).startswith("the workload's metrics ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metrics_of_any_real_dtype_are_taken() -> None:
    found = {"a": ONES.bool(), "b": ONES.half(), "c": ONES.long(), "top@1": ONES}
    assert checked_metrics(found, 3) == found


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "must return a dict of numbers by name (got None)"),
        ({"a": "0.5"}, "must return one real number for each name ('a' is a str)"),
        ({"a": [0.5]}, "('a' is a list)"),
        ({"a": np.ones(2)}, "('a' is a ndarray)"),
        ({"a": torch.ones(2)}, "('a' is a tensor of float32, shape [2])"),
        ({"a": 1j}, "('a' is a complex)"),
        ({"a": None}, "('a' is None)"),
        ({"loss": 4.0}, "must leave 'loss' as it is, 2 (got 4)"),
        ({"a": 10**400}, "('a' is a int)"),
    ],
)
def test_summaries_of_another_form_are_refused_in_a_line(found: Any, says: str) -> None:
    with pytest.raises(TrainingError) as caught:
        checked_summary(found, 2.0)
    assert str(caught.value).startswith("the workload's summary ")
    assert says in str(caught.value)


def test_a_summary_may_leave_the_loss_out_or_round_it() -> None:
    assert checked_summary({"a": 1}, 2.0) == {"a": 1.0}
    assert checked_summary({"loss": np.float16(1 / 3)}, 1 / 3) == {"loss": 1 / 3}
    assert np.isnan(checked_summary({"loss": float("nan")}, float("nan"))["loss"])
