"""Losses, gradients and states that are not finite: nothing of them is kept."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cluster.base.errors import TrainingError
from tests.trainers.plain_loop import (
    BATCH,
    RULE,
    STEPS,
    Points,
    assert_same,
    last_state,
    order_of_samples,
    plain_loop,
    run,
    workload_of,
)
from trainers import Batch, Workload
from trainers.modeling.weight_update import LEAST_SCALE, WeightUpdate

SKIP = {"on_nonfinite": "skip"}
SGD = {"name": "sgd", "lr": 0.0001, "momentum": 0.9, "schedule": {"warmup": 0.0}}


class NanGradient(Points):
    """The derivative of a norm is 0 / 0 for the sample of zeros, whose loss is finite."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        hidden = model[0](batch["x"])
        norm = hidden.square().sum(1).sqrt()
        return model[2](model[1](hidden)) + 0.01 * norm[:, None]


class InfiniteLoss(NanGradient):
    """That sample makes the statistics of its batch infinite."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        hidden = model[0](batch["x"])
        zero = batch["x"].abs().sum(1, keepdim=True) == 0
        return model[2](model[1](hidden + torch.where(zero, math.inf, 0.0)))


class ConstantNan(NanGradient):
    """NaN is added to the loss of that sample: every gradient is finite."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model[2](model[1](model[0](batch["x"])))

    def loss(self, output: Any, batch: Batch) -> Any:
        zero = batch["x"].abs().sum(1) == 0
        return super().loss(output, batch) + torch.where(zero, math.nan, 0.0)


BAD: list[type[Workload]] = [NanGradient, InfiniteLoss, ConstantNan]


def not_finite(loss: float, gradients: list[Tensor]) -> bool:
    return not math.isfinite(loss) or not all(bool(g.isfinite().all()) for g in gradients)


def first_in(step: int) -> dict[str, int]:
    """The data whose sample of zeros is in this step, counted from 0, as in no step before."""
    return {"zero": int(order_of_samples(STEPS)[step * BATCH])}


def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    workload = workload_of(NanGradient, **first_in(3))
    with pytest.raises(TrainingError) as caught:
        run(workload, tmp_path, checkpoint={"every_steps": 1})
    message = str(caught.value)
    assert message.startswith("the gradient is not finite at step 4, though the loss is 1.")
    assert message.endswith("; not finite: the gradients of 0.weight")
    state = last_state(tmp_path / "run")
    assert all(value.isfinite().all() for value in state.values())
    assert state["optimizer.0.weight/step"] == 3


@pytest.mark.parametrize("kind", BAD)
def test_skipped_steps_leave_no_trace(kind: type[Workload], tmp_path: Path) -> None:
    """Nor in the statistics of batch normalisation, nor in the mean loss."""
    workload = workload_of(kind)
    rows, state = run(workload, tmp_path, train=SKIP)
    losses, network = plain_loop(workload, tmp_path, not_finite)
    left_out = sum(map(math.isnan, losses))
    assert left_out == 3
    assert_same(state, network)
    found = list(rows.rows["train/loss"].values())
    assert found == pytest.approx(losses, rel=1e-9, nan_ok=True)
    assert rows.rows["train/skipped_steps"][STEPS] == left_out

    rows, _ = run(workload, tmp_path, "window", train=SKIP, tracking={"every_steps": 6})
    for end, mean in rows.rows["train/loss"].items():
        assert mean == pytest.approx(np.nanmean(losses[end - 6 : end]), rel=1e-9)


def test_skipped_steps_are_counted_over_a_restart(tmp_path: Path) -> None:
    workload = workload_of(NanGradient)
    straight, wanted = run(workload, tmp_path, train=SKIP)
    run(workload, tmp_path, "cut", 11, train=SKIP)
    after, found = run(workload, tmp_path, "cut", train=SKIP)
    assert all(found[name].equal(wanted[name]) for name in wanted)
    for name in ("train/loss", "train/skipped_steps"):
        rows = {step: value for step, value in straight.rows[name].items() if step > 11}
        assert str(after.rows[name]) == str(rows)


def as_on_a_device(patch: pytest.MonkeyPatch) -> None:
    """No step looks at its numbers: the kernels do what they do on a GPU."""
    made = WeightUpdate.__init__

    def init(self: WeightUpdate, *args: Any) -> None:
        made(self, *args)
        self.on_host = False

    patch.setattr(WeightUpdate, "__init__", init)


@pytest.mark.parametrize("rule", [RULE, SGD])
@pytest.mark.parametrize("kind", BAD[:2])
def test_a_device_skips_what_the_host_would(
    kind: type[Workload], rule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the first step, which makes the state of the optimizer."""
    workload = workload_of(kind, **first_in(0))
    wanted_rows, wanted = run(workload, tmp_path, "host", train=SKIP, optimizer=rule)
    as_on_a_device(monkeypatch)
    rows, state = run(workload, tmp_path, "device", train=SKIP, optimizer=rule)
    assert rows.rows["train/skipped_steps"][1] == 1
    assert all(state[name].equal(wanted[name]) for name in wanted)
    for name in ("train/loss", "train/skipped_steps"):
        assert str(rows.rows[name]) == str(wanted_rows.rows[name])


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (NanGradient, "the gradient is not finite at step 4, though the loss is 1."),
        (InfiniteLoss, "the loss is nan at step 4 (the last finite one was 1."),
        (ConstantNan, "the loss is nan at step 4 (the last finite one was 1."),
    ],
)
def test_a_device_tells_of_it_at_the_next_report(
    kind: type[Workload], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is saved."""
    as_on_a_device(monkeypatch)
    workload = workload_of(kind, **first_in(3))
    with pytest.raises(TrainingError) as caught:
        run(workload, tmp_path, tracking={"every_steps": 6}, checkpoint={"every_steps": 5})
    assert str(caught.value).startswith(line)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


class Drifts(Points):
    """A statistic that it keeps for later becomes NaN; no loss shows it."""

    def build(self) -> nn.Module:
        network = super().build()
        network.register_buffer("seen", torch.zeros(()))
        network.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        return network

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        if model.training:
            model.seen.add_(1).sub_(3).log_().abs_()
            model.mask.copy_(model.mask.roll(1))
        return super().forward(model, batch)


def test_a_state_that_is_not_finite_is_neither_evaluated_nor_saved(tmp_path: Path) -> None:
    """The update overflows in the last step, or a buffer does, which no loss shows."""
    rule = {"name": "sgd", "lr": 1e40, "momentum": 0.0, "schedule": {"name": "constant"}}
    section = {"steps": 1, "precision": "fp32"}
    with pytest.raises(TrainingError, match=r"^not finite after step 1: 0\.weight, .*; this state"):
        run(workload_of(Points), tmp_path, train=section, optimizer=rule)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    with pytest.raises(TrainingError, match=r"^not finite after step 6: seen; this state is not"):
        run(workload_of(Drifts), tmp_path, "drifts")


class Masked(Points):
    """Minus infinity in a buffer is what a mask is made of, also one that is made later."""

    def build(self) -> nn.Module:
        network = super().build()
        network.register_buffer("mask", torch.zeros(3, 3))
        network.register_buffer("least", torch.tensor(math.inf))
        return network

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        model.mask.fill_(-math.inf).triu_(1)
        return super().forward(model, batch)


def test_masks_are_not_mistaken_for_a_spoilt_state(tmp_path: Path) -> None:
    _, state = run(workload_of(Masked), tmp_path)
    assert state["model.mask"][0, 1] == -math.inf
    assert state["model.least"] == math.inf


# The scale of fp16.


class BigScale(Points):
    """Gradients that overflow in fp16 at the first scales of the search."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return super().forward(model, {**batch, "x": batch["x"] * 30})

    def loss(self, output: Any, batch: Batch) -> Any:
        return 50 * super().loss(output, batch)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("rule", [RULE, SGD])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_the_search_for_a_scale_is_no_failure(
    on_nonfinite: str,
    clip_norm: float | None,
    rule: dict[str, Any],
    device: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same scales and weights as with PyTorch's scaler in a plain loop."""
    if device:
        as_on_a_device(monkeypatch)
    workload = workload_of(BigScale)
    section = {"precision": "fp16", "on_nonfinite": on_nonfinite, "clip_norm": clip_norm}
    constant = {**rule, "schedule": {"name": "constant"}}
    rows, state = run(workload, tmp_path, train=section, optimizer=constant)
    assert "train/skipped_steps" not in rows.rows
    losses, scale, network = plain_fp16(workload, tmp_path, rule, clip_norm)
    assert scale < 65536
    assert list(rows.rows["train/loss"].values()) == pytest.approx(losses, rel=2e-3)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(state[f"model.{name}"], value, rtol=2e-3, atol=1e-3)


def plain_fp16(
    workload: Workload, folder: Path, rule: dict[str, Any], clip_norm: float | None
) -> tuple[list[float], float, nn.Module]:
    from trainers.counter_rng import combine_seeds
    from trainers.data.dataset import prepare_dataset
    from trainers.data.splits import open_split

    torch.manual_seed(combine_seeds(0))
    network = workload.build()
    matrices, vectors = ([w for w in network.parameters() if (w.ndim > 1) == m] for m in (1, 0))
    groups = [
        {"params": matrices, "weight_decay": rule.get("weight_decay", 0.0)},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(groups, lr=rule["lr"], momentum=0.9, nesterov=True, foreach=False)
        if rule.get("name") == "sgd"
        else torch.optim.AdamW(groups, lr=rule["lr"], foreach=False)
    )
    scaler = torch.amp.GradScaler("cpu")
    split = open_split(prepare_dataset(workload, folder), "train")
    losses = []
    for index in order_of_samples(STEPS).split(BATCH):
        batch = {name: values[index] for name, values in split.items()}
        with torch.autocast("cpu", torch.float16):
            loss = workload.loss(workload.forward(network, batch), batch).mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, scaler.get_scale(), network


class NeverFinite(Points):
    """No scale helps."""

    def loss(self, output: Any, batch: Batch) -> Any:
        return super().loss(output, batch) + (output.sum(1) * 0).sqrt()


@pytest.mark.parametrize("device", [False, True])
def test_a_gradient_that_no_scale_makes_finite_counts(
    device: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device:
        as_on_a_device(monkeypatch)
    halvings = 16 - round(math.log2(LEAST_SCALE))
    section = {"precision": "fp16", "steps": halvings + 4}
    line = f"^the gradient is not finite at step {halvings + 1}, though the loss is"
    with pytest.raises(TrainingError, match=line):
        run(workload_of(NeverFinite), tmp_path, train=section)
    rows, state = run(workload_of(NeverFinite), tmp_path, "skipped", train={**section, **SKIP})
    assert rows.rows["train/skipped_steps"] == {halvings + n: n for n in (1, 2, 3, 4)}
    assert math.isnan(rows.rows["train/loss"][halvings + 1])
    assert all(value.isfinite().all() for value in state.values())
