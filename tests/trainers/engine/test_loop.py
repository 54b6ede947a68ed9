"""The training loop in one process: parity with plain PyTorch, exact resumption, errors."""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.base.errors import SpecError, TrainingError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.counter_rng import combine_seeds
from trainers.data.dataset import prepare_dataset
from trainers.data.sampling import epoch_permutation
from trainers.data.splits import open_split
from trainers.engine import coordination
from trainers.engine.loop import train
from trainers.engine.step import TrainStep
from trainers.modeling import build
from trainers.outcome import Outcome
from trainers.spec import RunSpec, resolve


class Recorder:
    """Keeps the reports of the loop; stops it after `stop_after` steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.rows: dict[str, dict[int, float]] = {}
        self.notes: dict[str, str] = {}
        self.ticks: list[int] = []
        self._stop_after = stop_after

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            assert step not in self.rows.setdefault(name, {}), f"{name} twice at step {step}"
            self.rows[name][step] = value

    def log_note(self, name: str, text: str) -> None:
        self.notes[name] = text

    def on_step_end(self, step: int) -> None:
        self.ticks.append(step)

    def flush(self) -> None:
        pass

    def on_evaluation_end(
        self, metrics: Mapping[str, float], step: int, checkpoints: Checkpoints
    ) -> None:
        assert metrics["val/loss"] == self.rows["val/loss"][step]

    def preemption_pending(self) -> bool:
        return False

    def should_stop(self) -> bool:
        return self._stop_after is not None and len(self.ticks) + 1 >= self._stop_after


def run(
    own_folder: Path, name: str, stop_after: int | None = None, **sections: dict[str, Any]
) -> tuple[Outcome, Recorder, dict[str, Tensor]]:
    """Train spirals with these sections of a spec; the outcome, the reports, the final weights."""
    data: dict[str, Any] = {"workload": "spirals:Spirals", "tracking": {"every_steps": 1}}
    spec, workload = resolve({**data, **sections}, RunSpec)
    folder, recorder = own_folder / name, Recorder(stop_after)
    outcome = train(spec, workload, prepare_dataset(workload, own_folder), folder, recorder)
    newest = Checkpoints(folder / "checkpoints").latest()
    assert newest is not None
    from safetensors.torch import load_file

    return outcome, recorder, load_file(newest / "state-00000.safetensors")


STEPS = {"steps": 40, "global_batch": 32}

ALONE = """
import sys
from pathlib import Path

from trainers.data.dataset import prepare_dataset
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.modeling import build
from trainers.spec import RunSpec, resolve

spec, workload = resolve({"workload": "spirals:Spirals", "train": {"steps": 3}}, RunSpec)
dataset = prepare_dataset(workload, Path())
build.dry_run_once = lambda *_: None  # imports Dynamo, after the first step
for stop in (False, True):
    reporter = NullReporter()
    reporter.should_stop = lambda: not stop
    print(train(spec, workload, dataset, Path("run"), reporter).step)
print(*sorted(sys.modules))
"""


def test_one_worker_imports_nothing_that_it_does_not_use(own_folder: Path) -> None:
    """Not up to its first step, nor in a save and a resumption."""
    _, workload = resolve({"workload": "spirals:Spirals"}, RunSpec)
    prepare_dataset(workload, own_folder)
    shown = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=own_folder, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    first, second, modules = shown.stdout.splitlines()
    assert (first, second) == ("1", "3")
    unwanted = {
        *("ray", "mlflow", "sklearn", "scipy", "sympy", "torch._dynamo"),
        *("torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    }
    assert sorted(unwanted.intersection(modules.split())) == []


def test_the_losses_are_those_of_a_plain_loop(own_folder: Path) -> None:
    """Bare PyTorch over the same samples: AdamW, warm-up and cosine, clipping, in float64."""
    train_section = {**STEPS, "precision": "fp64", "clip_norm": 0.5, "seed": 3}
    rule = {"lr": 0.01, "weight_decay": 0.1, "schedule": {"warmup": 0.25}}
    _, recorder, _ = run(
        own_folder, "ours", train=train_section, optimizer=rule, model={"dropout": 0.0}
    )

    _, workload = resolve({"workload": "spirals:Spirals", "model": {"dropout": 0.0}}, RunSpec)
    data = open_split(prepare_dataset(workload, own_folder), "train")
    torch.manual_seed(combine_seeds(3))
    network = workload.build().double()
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        foreach=False,
    )
    stream = torch.cat([epoch_permutation(3, epoch, 280) for epoch in range(5)])
    for step in range(40):
        index = stream[step * 32 : (step + 1) * 32]
        warm, progress = (step + 1) / 10, (step - 10) / 29
        share = warm if step < 10 else (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * share
        loss = F.cross_entropy(network(data["point"][index].double()), data["label"][index])
        assert recorder.rows["train/loss"][step + 1] == pytest.approx(loss.item(), rel=1e-9)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_the_same_seed_gives_the_same_bits_and_another_one_others(
    precision: str, own_folder: Path
) -> None:
    section = {**STEPS, "precision": precision}
    weights = [run(own_folder, f"{i}", train=section)[2] for i in range(2)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    other = run(own_folder, "other", train={**section, "seed": 1})[2]
    assert not all(weights[0][name].equal(other[name]) for name in other)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("stop_after", [1, 13, 39])
def test_stopped_and_resumed_ends_with_the_same_bits(
    stop_after: int, precision: str, own_folder: Path
) -> None:
    """Weights, optimizer, and the scale of fp16, which counts good steps between restarts."""
    section = {**STEPS, "precision": precision}
    _, straight, expected = run(own_folder, "straight", train=section)
    outcome, before, _ = run(own_folder, "cut", stop_after, train=section)
    assert outcome.step == stop_after
    assert not outcome.complete
    outcome, after, found = run(own_folder, "cut", train=section)
    assert outcome.complete
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    for name in ("train/loss", "val/loss", "val/accuracy", "test/accuracy"):
        assert before.rows.get(name, {}) | after.rows[name] == straight.rows[name]


def test_micro_batches_add_up_to_the_global_batch(own_folder: Path) -> None:
    """Dropout included."""
    section, model = {**STEPS, "precision": "fp64"}, {"dropout": 0.3}
    _, whole, _ = run(own_folder, "whole", train=section, model=model)
    _, parts, _ = run(own_folder, "parts", train={**section, "micro_batch": 8}, model=model)
    for step, loss in whole.rows["train/loss"].items():
        assert parts.rows["train/loss"][step] == pytest.approx(loss, rel=1e-9)


def test_a_compiled_model_gives_the_same_losses(own_folder: Path) -> None:
    """With dropout, whose masks are the same."""
    section = {"steps": 5, "global_batch": 32, "precision": "fp64"}
    model = {"dropout": 0.3}
    _, eager, _ = run(own_folder, "eager", train=section, model=model)
    _, compiled, _ = run(
        own_folder, "compiled", train={**section, "compile": "default"}, model=model
    )
    for step, loss in eager.rows["train/loss"].items():
        assert compiled.rows["train/loss"][step] == pytest.approx(loss, rel=1e-9)


def spoil(own_folder: Path, step: int) -> None:
    """Make the workload's loss infinite for the samples of one step."""
    source = (own_folder / "spirals.py").read_text()
    change = f"""
    def augment(self, batch, random):
        if {step * 32} in random.positions.tolist():
            batch["point"] = batch["point"] * float("inf")
        return batch

    def build(self):"""
    (own_folder / "spirals.py").write_text(source.replace("\n    def build(self):", change))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_gradients(own_folder: Path) -> None:
    spoil(own_folder, step=7)
    with pytest.raises(TrainingError) as caught:
        run(own_folder, "spoilt", train=STEPS)
    message = str(caught.value)
    assert message.startswith("the loss is nan at step 8 (the last finite one was 0.")
    assert "the gradients of 0.weight, 0.bias" in message


def test_a_loss_that_stays_on_the_device_is_checked_at_the_next_report(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the message still names the right step."""
    monkeypatch.setattr(TrainStep, "_stop", lambda *_: None)
    spoil(own_folder, step=7)
    with pytest.raises(TrainingError, match=r"^the loss is nan at step 8 \(the last finite one"):
        run(own_folder, "spoilt", train=STEPS, tracking={"every_steps": 20})


def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_counted(own_folder: Path) -> None:
    spoil(own_folder, step=7)
    outcome, recorder, weights = run(own_folder, "skipped", train={**STEPS, "on_nonfinite": "skip"})
    assert outcome.complete
    assert all(weight.isfinite().all() for weight in weights.values())
    counts = recorder.rows["train/skipped_steps"]
    assert sorted(counts) == list(range(8, 41))
    assert set(counts.values()) == {1.0}


def test_a_loss_of_the_wrong_shape_is_refused(own_folder: Path) -> None:
    source = (own_folder / "spirals.py").read_text()
    (own_folder / "spirals.py").write_text(source.replace('reduction="none"', 'reduction="mean"'))
    with pytest.raises(
        TrainingError, match=r"^Spirals\.loss must return one value per sample, .* \["
    ):
        run(own_folder, "wrong", train=STEPS)


@pytest.mark.parametrize(
    ("fields", "evaluations"),
    [
        ({"epochs": 3}, [10, 20, 30]),
        ({"epochs": 2.5, "evaluate_every_epochs": 0.5}, [5, 10, 15, 20, 25]),
        ({"steps": 7}, [7]),
    ],
)
def test_evaluation_steps(fields: dict[str, float], evaluations: list[int]) -> None:
    spec = RunSpec.model_validate({"workload": "x", "train": {**fields, "global_batch": 10}})
    assert sorted(spec.train.evaluation_steps(100)) == evaluations


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/*"))


def test_saves_at_an_interval_and_at_the_end(own_folder: Path) -> None:
    run(own_folder, "regular", train=STEPS, checkpoint={"every_steps": 15, "keep": 9})
    assert saved_steps(own_folder / "regular") == [15, 30, 40]


def test_the_best_saves_are_kept_beside_the_latest(own_folder: Path) -> None:
    """Best by the metric of the evaluation of the same state."""
    sections = {"train": {"steps": 80, "global_batch": 16, "evaluate_every_epochs": 0.25}}
    rule = {"keep": 1, "keep_best": 2, "metric": "val/accuracy", "mode": "max"}
    _, recorder, _ = run(own_folder, "best", **sections, checkpoint=rule)
    accuracy = recorder.rows["val/accuracy"]
    best = sorted(accuracy, key=lambda step: (-accuracy[step], step))[:2]
    assert saved_steps(own_folder / "best") == sorted({*best, 80})


def test_the_automatic_interval_follows_what_a_save_costs(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frequent failures make it save often, and the choice is logged."""
    monkeypatch.setattr(coordination, "FIRST_SAVE_S", 0.0)
    often = {"failure_every_hours": 1e-6, "keep": 99}
    _, recorder, _ = run(own_folder, "often", train=STEPS, checkpoint=often)
    rarely = {"failure_every_hours": 1e6, "keep": 99}
    run(own_folder, "rarely", train=STEPS, checkpoint=rarely)
    assert len(saved_steps(own_folder / "often")) >= len(saved_steps(own_folder / "rarely")) == 2
    assert "s: a save stops training for" in recorder.notes["checkpoint interval"]


@pytest.mark.parametrize("every_steps", [3, "auto"])
def test_the_reported_losses_do_not_depend_on_saves(
    every_steps: int | str, own_folder: Path
) -> None:
    """The window of the mean loss goes on over saves, stops and restarts."""
    sections = {"train": STEPS, "tracking": {"every_steps": 8}}
    _, straight, _ = run(own_folder, "straight", **sections)
    saves = {"every_steps": every_steps}
    _, before, _ = run(own_folder, "cut", 13, **sections, checkpoint=saves)
    _, after, _ = run(own_folder, "cut", **sections, checkpoint=saves)
    assert before.rows["train/loss"] | after.rows["train/loss"] == straight.rows["train/loss"]


def test_perf_metrics_are_reported(own_folder: Path) -> None:
    _, recorder, _ = run(own_folder, "metered", train=STEPS)
    newest = {name: list(steps.values())[-1] for name, steps in recorder.rows.items()}
    parts = ("data", "compute", "checkpoint", "other")
    shares = [newest.get(f"perf/{part}_share", 0.0) for part in parts]
    assert sum(shares) == pytest.approx(1.0)
    assert newest["perf/samples_per_s"] == pytest.approx(32 / newest["perf/step_s"])
    width = 16
    flops = 2 * (2 * width + width * width + width * 2)
    # Backward is twice the forward pass, but for the first layer, whose input needs no gradient.
    per_sample = 3 * flops - 2 * 2 * width
    speed = newest["perf/samples_per_s"] * per_sample
    assert newest["perf/model_flop_per_s"] == pytest.approx(speed)
    assert 0 < newest["perf/goodput"] < 1
    assert "perf/mfu" not in newest, "nobody knows the peak of this machine's CPU"


def test_flops_are_not_counted_again_after_a_restart(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before, _ = run(own_folder, "cut", 13, train=STEPS)
    monkeypatch.setattr(build, "dry_run_once", lambda *_: pytest.fail("counted again"))
    _, after, _ = run(own_folder, "cut", train=STEPS)
    rates = [
        rows["perf/model_flop_per_s"][step] / rows["perf/samples_per_s"][step]
        for rows in (before.rows, after.rows)
        for step in rows["perf/model_flop_per_s"]
    ]
    assert rates == pytest.approx([rates[0]] * len(rates))
    assert len(rates) > 1


def test_goodput_goes_on_over_a_wanted_stop(own_folder: Path) -> None:
    """The pause is not counted, the steps before it are."""
    run(own_folder, "cut", 30, train=STEPS)
    folder = own_folder / "cut" / "checkpoints" / "step-00000030"
    before = json.loads((folder / "manifest.json").read_text())["numbers"]
    assert before["goodput.stopped"] == 1.0
    run(own_folder, "cut", train=STEPS)
    after = json.loads((folder.with_name("step-00000040") / "manifest.json").read_text())
    for name in ("goodput.useful_s", "goodput.wall_s"):
        assert after["numbers"][name] > before[name] > 0


def test_a_precision_without_its_package_is_refused(own_folder: Path) -> None:
    if importlib.util.find_spec("torchao") is None:
        with pytest.raises(SpecError, match=r"^train\.precision: fp8 needs the package torchao"):
            run(own_folder, "fp8", train={**STEPS, "precision": "fp8"})


def test_channels_last_changes_no_result(own_folder: Path) -> None:
    losses = []
    for channels_last in (False, True):
        fields = {"steps": 6, "precision": "fp64", "channels_last": channels_last}
        data = {"workload": "vision", "model": {"width": 4}, "tracking": {"every_steps": 1}}
        spec, workload = resolve({**data, "train": fields}, RunSpec)
        recorder = Recorder()
        folder = own_folder / f"{channels_last}"
        train(spec, workload, prepare_dataset(workload, own_folder), folder, recorder)
        losses.append(list(recorder.rows["train/loss"].values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
