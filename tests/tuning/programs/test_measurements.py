"""Measurements on disk: what their keys depend on, and many writers at once."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainers.devices import Cpu
from trainers.modeling.build import build_network
from tuning.fused.sweep_variants import reference_variant
from tuning.programs.measurements import (
    graph_key,
    keep_measurement,
    read_measurement,
    trial_key,
)
from tuning.programs.torch_internals import trace_operations
from tuning.sweep import new_sweep

SPEC = """
workload: spirals:Spirals
sweep: {parameters: {optimizer.lr: {uniform: [0.1, 0.2]}}}
"""


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


def scaled_by(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda values: values * factor


def key_of(function: Callable[..., Tensor], shape: tuple[int, ...] = (2, 3)) -> str:
    return graph_key(trace_operations(function, [torch.ones(shape)]), torch.device("cpu"))


def test_a_key_depends_on_operations_shapes_and_constants() -> None:
    two, three = torch.tensor([2.0]), torch.tensor([3.0])
    keys = [
        key_of(scaled_by(two)),
        key_of(scaled_by(three)),
        key_of(scaled_by(two), (2, 4)),
        key_of(scaled_by(two.double())),
        key_of(lambda values: values + two),
    ]
    assert len({*keys}) == len(keys)
    assert key_of(scaled_by(two.clone())) == keys[0]


def test_a_key_of_a_trial_depends_on_its_spec_and_on_its_source(own_folder: Path) -> None:
    (own_folder / "s.yaml").write_text(SPEC)

    def key(*overrides: str) -> str:
        variant = reference_variant(new_sweep("s.yaml", list(overrides), None))
        network = build_network(variant.spec.train, variant.workload)
        return trial_key(variant, network, {"dropout": [0.0, 0.5]}, Cpu())

    first = key()
    assert key("train.seed=5", "optimizer.lr=0.3", "model.dropout=0.4") == first
    assert key("model.width=7") != first
    source = own_folder / "spirals.py"
    source.write_text(source.read_text() + "\n# faster\n")
    assert key() != first


def test_a_reader_sees_whole_measurements_of_many_writers() -> None:
    assert read_measurement("step") == {}

    def write(number: int) -> None:
        for _ in range(20):
            keep_measurement("step", {"step_s": float(number), "compile_s": float(number)})

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = read_measurement("step")
        assert not found or found["step_s"] == found["compile_s"]
    assert read_measurement("step")["step_s"] in range(4)
