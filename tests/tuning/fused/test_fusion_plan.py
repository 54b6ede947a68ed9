"""Whether a sweep is fused, and into how many slots, as measured on this machine's CPU."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.base.config import write_yaml
from trainers.data.splits import open_split
from trainers.devices import Cpu
from tuning.fused import fusion_plan
from tuning.fused.fusion_plan import MEMORY_SHARE, FusionPlan, make_plan, plan_from_spec
from tuning.fused.sweep_variants import reference_variant
from tuning.programs import measurements
from tuning.programs.program import Program
from tuning.sweep import new_sweep
from tuning.trials.trial import Sweep

SPEC = """
workload: spirals:Spirals
model: {width: 32}
train: {epochs: 400, global_batch: 8}
sweep:
  parameters:
    optimizer.lr: {loguniform: [1e-4, 1e-1]}
    model.dropout: {uniform: [0.0, 0.5]}
  search: random
  scheduler: {name: none}
  trials: 40
"""


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No program has been compiled or measured before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


@pytest.fixture
def sweep_of(own_folder: Path) -> Callable[..., Sweep]:
    """Makes a sweep over the spirals, with some fields changed; nothing is run."""
    (own_folder / "s.yaml").write_text(SPEC)
    return lambda *overrides: new_sweep("s.yaml", list(overrides), None)


@pytest.mark.thorough
def test_slots_fill_the_memory_and_take_no_more(
    sweep_of: Callable[..., Sweep],
) -> None:
    sweep = sweep_of()
    samples = open_split(sweep.dataset, "train")

    def needs(slots: int) -> int:
        varied = {"dropout": [0.0, 0.5]}
        return Program(reference_variant(sweep), slots, samples, Cpu(), varied).peak_bytes()

    room_for_three = int((needs(3) + 1) / MEMORY_SHARE)
    plan, program = make_plan(sweep, engines=1, free_bytes=room_for_three)
    assert plan.slots == 3
    assert program is not None
    assert program.peak_bytes() <= MEMORY_SHARE * room_for_three
    assert re.fullmatch(
        r"fused: 3 trials as one program on one device, \S+ times as fast as alone", plan.line
    )
    nothing, _ = make_plan(sweep, engines=1, free_bytes=int(needs(1) / MEMORY_SHARE))
    assert nothing.slots == 0
    assert nothing.line == "not fused: there is no room for two trials on a device"


def test_a_model_that_keeps_the_device_busy_is_not_fused(own_folder: Path) -> None:
    spec = {
        "workload": "vision",
        "model": {"width": 64},
        "train": {"global_batch": 128, "epochs": 100},
        "sweep": {"parameters": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}},
    }
    write_yaml(spec, own_folder / "busy.yaml")
    plan, _ = make_plan(new_sweep("busy.yaml", [], None), engines=1)
    assert plan.slots == 0
    assert re.fullmatch(r"not fused: a lone trial keeps \d+% of its device busy", plan.line)


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(
    sweep_of: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with another seed, nor with other bounds of a batched value."""
    compiled: list[str] = []
    first, program = make_plan(sweep_of(), engines=1, on_compile=lambda: compiled.append("first"))
    assert program is not None
    assert compiled == ["first"]
    monkeypatch.setattr(measurements, "_fastest_s", lambda *_: pytest.fail("measured again"))
    rates = (
        "sweep.parameters={optimizer.lr: {uniform: [0.1, 0.2]}, model.dropout: {uniform: [0, 1]}}"
    )
    again = sweep_of("train.seed=7", "sweep.seed=7", rates)
    second, program = make_plan(again, engines=1, on_compile=lambda: compiled.append("second"))
    assert second == first
    assert program is None
    assert compiled == ["first"]


def test_a_program_that_compiles_too_long_is_traced_once(
    sweep_of: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion_plan, "COMPILE_PER_TRACE", 1e7)
    first, _ = make_plan(sweep_of(), engines=1)
    assert re.fullmatch(
        r"not fused: compiling takes about \d+ s, and all trials without it \d+ s", first.line
    )
    monkeypatch.setattr(fusion_plan, "Program", lambda *_: pytest.fail("traced again"))
    assert make_plan(sweep_of(), engines=1) == (first, None)


def test_one_value_that_cannot_be_fused_rules_fusing_out(
    sweep_of: Callable[..., Sweep],
) -> None:
    sweep = sweep_of(
        "sweep.parameters={train.precision: {choice: [fp32, bf16, fp16]}, optimizer.lr: "
        "{loguniform: [1e-4, 1e-1]}}"
    )
    plan, _ = make_plan(sweep, engines=1)
    assert plan.line.startswith("not fused: train.precision: fp16 ")


def test_a_spec_that_rules_fusing_out_is_not_tried(sweep_of: Callable[..., Sweep]) -> None:
    assert plan_from_spec(sweep_of("sweep.fuse=off")) == FusionPlan(0, "")
    assert plan_from_spec(sweep_of("sweep.trials=2", "train.epochs=2")) == FusionPlan(0, "")
    assert plan_from_spec(sweep_of()) is None
    assert plan_from_spec(sweep_of("sweep.trials=2", "sweep.fuse=2")) is None
    spread = "not fused: scale.workers: a trial of several workers is spread over devices"
    assert plan_from_spec(sweep_of("scale.workers=2")) == FusionPlan(0, spread)
