"""Complex weights and buffers, and tensors more precise than the weights: kept as they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.trainers.plain_loop import (
    Points,
    assert_same,
    plain_loop,
    run,
    spec_of,
    workload_of,
)
from trainers import Batch, Workload, table
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import export_model, load_model
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_split
from trainers.precision import convert_weights


class Spectral(nn.Module):
    """A diagonal in Fourier space; a phase that is not trained; a matrix; a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(5, dtype=torch.cfloat))
        self.mix = nn.Parameter(0.3 * torch.randn(5, 5, dtype=torch.cfloat).conj())
        self.scale = nn.Parameter(torch.tensor(1.0 + 0.5j))
        self.register_buffer("phase", torch.exp(1j * torch.linspace(0, 1, 5)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) * self.weight * self.phase * self.scale
        return self.head(torch.fft.irfft(spectrum + spectrum @ self.mix, n=8))


class Fourier(Points):
    def build(self) -> nn.Module:
        return Spectral()

    def example(self) -> Tensor:
        return torch.linspace(-1, 1, 8)[None]


class Convolution(Workload):
    """y is a circular convolution of x, which a diagonal of complex numbers learns exactly."""

    def dataset(self) -> dict[str, Any]:
        kernel = np.fft.rfft(np.random.default_rng(5).normal(size=8))

        def split(count: int, seed: int) -> Any:
            x = np.random.default_rng(seed).normal(size=(count, 8))
            return table(x=x, y=np.fft.irfft(np.fft.rfft(x) * kernel, n=8))

        return {"train": split(256, 0), "val": split(64, 1)}

    def build(self) -> nn.Module:
        network = Spectral()
        network.head = nn.Identity()
        with torch.no_grad():
            network.mix.zero_()
        network.mix.requires_grad_(False)
        network.scale.requires_grad_(False)
        return network

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["x"])

    def loss(self, output: Any, batch: Batch) -> Any:
        return (output - batch["y"]).square().mean(1)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"on_nonfinite": "skip"}])
def test_complex_weights_are_those_of_a_plain_loop(options: dict[str, Any], tmp_path: Path) -> None:
    workload = workload_of(Fourier)
    rows, state = run(workload, tmp_path, train=options)
    clip = options.get("clip_norm")
    losses, network = plain_loop(workload, tmp_path, clip_norm=clip)
    assert list(rows.rows["train/loss"].values()) == pytest.approx(losses, rel=1e-9)
    assert_same(state, network)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_convolution_is_learnt_exactly(precision: str, tmp_path: Path) -> None:
    rule = {"lr": 0.1, "weight_decay": 0.0}
    section = {"steps": 400, "precision": precision}
    rows, _ = run(workload_of(Convolution), tmp_path, train=section, optimizer=rule)
    assert rows.rows["val/loss"][400] < 1e-9


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_a_resumed_run_and_an_exported_model_are_the_same(precision: str, tmp_path: Path) -> None:
    workload, section = workload_of(Fourier), {"precision": precision}
    rows, wanted = run(workload, tmp_path, "straight", train=section)
    run(workload, tmp_path, "cut", 7, train=section)
    _, found = run(workload, tmp_path, "cut", train=section)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)

    checkpoint = Checkpoints(tmp_path / "straight" / "checkpoints").latest()
    assert checkpoint is not None
    export_model(tmp_path / "model", spec_of(train=section), workload, checkpoint)
    network = load_model(tmp_path / "model")
    for name, value in network.state_dict().items():
        pairs = torch.view_as_real(value) if value.is_complex() else value
        assert pairs.equal(wanted[f"model.{name}"]), name
    split = open_split(prepare_dataset(workload, tmp_path), "val")
    x = split["x"].to(torch.float64 if precision == "fp64" else torch.float32)
    with torch.no_grad():
        loss = workload.loss(network(x), {"y": split["y"]}).mean().item()
    rel = 1e-2 if precision == "bf16" else 1e-6
    assert loss == pytest.approx(rows.rows["val/loss"][18], rel=rel)


def test_complex_weights_in_fp16(tmp_path: Path) -> None:
    """The scaler sees them as pairs of numbers too."""
    rows, state = run(workload_of(Fourier), tmp_path, train={"precision": "fp16"})
    wanted, _ = run(workload_of(Fourier), tmp_path, "fp32", train={"precision": "fp32"})
    assert rows.rows["train/loss"][18] == pytest.approx(wanted.rows["train/loss"][18], rel=1e-2)
    assert state["model.weight"].shape == (5, 2)


class Times(nn.Module):
    """Seconds of the year in float64, whose differences float32 has not; a table of half floats."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("begin", torch.tensor(1.7e9 + 0.25, dtype=torch.float64))
        self.register_buffer("spectrum", torch.tensor([1.7e9 + 0.25j], dtype=torch.complex128))
        self.register_buffer("names", torch.arange(3))
        self.register_buffer("table", torch.ones(3, dtype=torch.half))
        self.clock = nn.Parameter(torch.tensor(1.7e9 + 0.25, dtype=torch.float64))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        gap = (self.clock - self.begin + self.spectrum[0].real - 1.7e9).to(x.dtype)
        return self.last(x * gap) * self.table


class Clock(Points):
    def build(self) -> nn.Module:
        return Times()


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_what_is_more_precise_than_the_weights_keeps_its_digits(
    precision: str, tmp_path: Path
) -> None:
    rule = {"name": "sgd", "lr": 1e-30, "momentum": 0.9}
    _, state = run(
        workload_of(Clock), tmp_path, train={"precision": precision, "steps": 3}, optimizer=rule
    )
    usual = torch.float64 if precision == "fp64" else torch.float32
    assert state["model.begin"] == 1.7e9 + 0.25
    assert state["model.spectrum"].tolist() == [[1.7e9, 0.25]]
    assert state["model.clock"] == 1.7e9 + 0.25
    assert state["model.last.weight"].dtype == usual
    assert state["model.names"].dtype == torch.int64
    checkpoint = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert checkpoint is not None
    spec = spec_of(train={"precision": precision})
    export_model(tmp_path / "model", spec, workload_of(Clock), checkpoint)
    loaded = load_model(tmp_path / "model")
    assert loaded.begin == 1.7e9 + 0.25
    assert loaded.spectrum.dtype == torch.complex128
    assert loaded.spectrum[0] == 1.7e9 + 0.25j
    assert loaded.last.weight.dtype == usual


CONVERTED: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype]] = {
    "usual to fp64": (torch.float32, torch.float64, torch.float64),
    "complex to fp64": (torch.complex64, torch.float64, torch.complex128),
    "half": (torch.float16, torch.float32, torch.float32),
    "bf16 to fp64": (torch.bfloat16, torch.float64, torch.float64),
    "more precise": (torch.float64, torch.float32, torch.float64),
    "more precise complex": (torch.complex128, torch.float32, torch.complex128),
    "integer": (torch.int32, torch.float64, torch.int32),
    "boolean": (torch.bool, torch.float64, torch.bool),
    "eight bits": (torch.float8_e4m3fn, torch.float32, torch.float8_e4m3fn),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_a_buffer_beside_weights_of_float32(case: str) -> None:
    made, precision, wanted = CONVERTED[case]
    network = nn.Linear(2, 2)
    network.register_buffer("own", torch.zeros(2).to(made))
    assert convert_weights(network, precision) is network
    assert network.own.dtype == wanted
    assert network.weight.dtype == precision


def test_a_model_of_another_precision_is_converted_as_a_whole() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    network.tied = network[0].weight
    convert_weights(network, torch.float32)
    kinds = {t.dtype for t in network.state_dict().values()}
    assert kinds == {torch.float32, torch.int64}
    assert network.tied is network[0].weight
    half = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16()
    convert_weights(half, torch.float64)
    assert {t.dtype for t in half.state_dict().values()} == {torch.float64, torch.int64}


def test_a_lazy_model_is_converted() -> None:
    network = convert_weights(nn.LazyLinear(3), torch.float64)
    assert network(torch.ones(1, 2, dtype=torch.float64)).dtype == torch.float64
