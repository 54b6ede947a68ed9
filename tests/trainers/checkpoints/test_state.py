"""All of a model's state is saved and loaded, exactly, or refused before the first step."""

import json
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.base.errors import CheckpointError, TrainingError
from tests.trainers.wild import Base, Trained, fit, fit_together, split
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.plain_values import from_plain, to_plain
from trainers.checkpoints.state import check_model_state, load_model_weights
from trainers.counter_rng import combine_seeds
from trainers.data.sampling import epoch_permutation
from trainers.modeling.optimizer import build_optimizer
from trainers.spec import CheckpointSpec, OptimizerSpec


class Counting(nn.Module):
    """A state that is not of tensors alone, and that the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.sums = nn.Linear(8, 3), 0, {"x": torch.zeros(8)}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.sums["x"] = 0.9 * self.sums["x"] + 0.1 * x.detach().sum(0)
        return self.linear(x + self.sums["x"].to(x)) / (1 + 0.1 * self.calls)

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "sums": self.sums, 3: (1.5, None, "text")}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state[3] == (1.5, None, "text")
        self.calls, self.sums = state["calls"], state["sums"]


class ExtraState(Base):
    def build(self) -> nn.Module:
        return nn.Sequential(OrderedDict(extra=Counting()))


class Growing(nn.Module):
    """Buffers that appear, grow, change their kind and disappear in forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.register_buffer("mask", None)
        self.register_buffer("history", torch.zeros(1))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("once", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if self.mask is None:
                self.register_buffer("mask", torch.linspace(0.5, 1, 3, dtype=x.dtype))
            if not hasattr(self, "late"):
                self.register_buffer("late", torch.zeros(8, dtype=x.dtype))
            self.late = 0.5 * self.late + x.detach().mean(0)
            self.history = torch.cat([self.history, x.detach().mean()[None]])
            self.count = self.count + 0.5
            self.once = None
        mask = 1 if self.mask is None else self.mask
        return self.linear(x + getattr(self, "late", 0)) * mask + self.history.sum() + self.count


class LateBuffers(Base):
    def build(self) -> nn.Module:
        return Growing()


class Views(nn.Module):
    """Buffers that are views: of one memory, lazily conjugate or negative, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        whole = torch.linspace(0.1, 0.8, 8)
        self.register_buffer("whole", whole)
        self.register_buffer("front", whole[:4])
        self.register_buffer("middle", whole[2:6])
        values = torch.complex(torch.linspace(0, 1, 5), torch.linspace(1, 2, 5))
        self.register_buffer("conjugate", values.conj())
        self.register_buffer("negative", values.conj().imag)
        self.register_buffer("expanded", torch.full((1,), 0.25).expand(8))
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.whole + self.expanded)


class Spectral(nn.Module):
    """A complex weight and a complex buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(5, 2, dtype=torch.cfloat))
        self.register_buffer("phase", torch.exp(1j * torch.linspace(0, 3, 5)))

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :5] * self.weight[:, 0] * self.phase).abs()


def state(model: nn.Module) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in model.state_dict().items()
    }


def saved(folder: Path, step: int, network: nn.Module) -> Path:
    checkpoints = Checkpoints(folder, CheckpointSpec(keep=9))
    checkpoints.save(step, network, build_optimizer(OptimizerSpec(name="sgd"), network))
    checkpoints.wait()
    found = checkpoints.latest()
    assert found is not None
    return found


@pytest.mark.parametrize("workload", [ExtraState, LateBuffers])
@pytest.mark.parametrize("stop_after", [1, 5])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, workload: type[Base], stop_after: int
) -> None:
    straight = fit(tmp_path / "a", workload)
    fit(tmp_path / "b", workload, stop_after=stop_after)
    found = fit(tmp_path / "b", workload)
    assert found.last("train/loss") == straight.last("train/loss")
    assert found.last("val/loss") == straight.last("val/loss")
    contents = [
        load_file(each.checkpoint / "state-00000.safetensors") for each in (found, straight)
    ]
    assert contents[0].keys() == contents[1].keys()
    assert all(contents[0][name].equal(contents[1][name]) for name in contents[0])
    manifests = [
        json.loads((each.checkpoint / "manifest.json").read_text()) for each in (found, straight)
    ]
    assert manifests[0]["extra"] == manifests[1]["extra"]


@pytest.mark.parametrize("workload", [ExtraState, LateBuffers])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_state_of_several_workers_is_that_of_the_first(
    tmp_path: Path, workload: type[Base], mode: str
) -> None:
    found = fit_together(tmp_path, workload, stop_after=5, scale={"parallel": mode})
    assert found.error is None
    again = fit_together(tmp_path, workload, scale={"parallel": mode})
    assert again.error is None
    alone = fit(tmp_path / "one", workload, stop_after=5)
    assert json.loads((alone.checkpoint / "manifest.json").read_text())["step"] == 5


def test_views_are_saved_as_their_values(tmp_path: Path) -> None:
    network, other = Views(), Views()
    with torch.no_grad():
        for name in ("whole", "expanded"):
            getattr(network, name)[:1].mul_(3)
        network.whole.mul_(1.5)
        network.conjugate.mul_(2 + 1j)
        network.negative.mul_(3)
    wanted = state(network)
    load_model_weights(saved(tmp_path, 1, network), other)
    for name, value in other.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    with torch.no_grad():
        other.whole.zero_()
    assert other.front.eq(0).all(), "is a view no more"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_keep_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    network, other = Spectral().to(dtype), Spectral().to(dtype)
    wanted = state(network)
    load_model_weights(saved(tmp_path, 1, network), other)
    for name, value in other.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, wanted[name]), name


def test_real_numbers_are_not_loaded_as_complex_ones(tmp_path: Path) -> None:
    network, real = Spectral(), Spectral()
    real.weight = nn.Parameter(torch.ones(5, 2))
    path = saved(tmp_path, 1, real)
    with pytest.raises(
        CheckpointError, match="does not fit the model: weight is real, not complex"
    ):
        load_model_weights(path, network)


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    network = nn.Linear(2, 1)
    checkpoints = Checkpoints(tmp_path, CheckpointSpec(keep=2))
    optimizer = build_optimizer(OptimizerSpec(), network)
    (tmp_path / "step-notes").mkdir()
    for step in (99_999_998, 99_999_999, 100_000_000, 1_000_000_000):
        checkpoints.save(step, network, optimizer)
        checkpoints.wait()
        latest = checkpoints.latest()
        assert latest is not None
        assert int(latest.name.removeprefix("step-")) == step
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-100000000", "step-1000000000", "step-notes"]
    assert checkpoints.resume(network, optimizer)[0] == 1_000_000_000


VALUES: dict[str, Any] = {
    "numbers": [None, True, 3, -(2**70), 0.1, float("inf"), "text", b"\x00\xff", 1 - 2j],
    "nested": {"a": [1, (2, [3])], 4: {5: "b"}, (1, 2): "pair", None: 0},
    "kinds": [
        {1, 2},
        frozenset({"x"}),
        OrderedDict(b=1, a=2),
        deque([1, 2], 5),
        torch.Size([2, 3]),
    ],
    "torch": [torch.float64, torch.device("cpu"), torch.tensor(1.5), torch.arange(4)[::2]],
    "numpy": [np.float32(0.1), np.int64(7), np.bool_(True), np.arange(6).reshape(2, 3)],
    "complex": [torch.tensor([1 + 2j, 3 - 1j]).conj(), np.complex64(1 + 2j)],
}


@pytest.mark.parametrize("kind", VALUES)
def test_plain_values_are_what_they_were(kind: str) -> None:
    tensors: dict[str, Tensor] = {}
    plain = json.loads(json.dumps(to_plain(VALUES[kind], "extra/x", tensors)))
    found = from_plain(plain, tensors, torch.device("cpu"))
    assert same(found, VALUES[kind])


def same(found: Any, wanted: Any) -> bool:
    """Whether two values are equal in type and content, at any depth."""
    if type(found) is not type(wanted):
        return False
    if isinstance(found, Tensor | np.ndarray):
        return found.dtype == wanted.dtype and bool((found == wanted).all())
    if isinstance(found, dict):
        keys = zip(found, wanted, strict=True)
        return all(same(a, b) and same(found[a], wanted[b]) for a, b in keys)
    if isinstance(found, list | tuple | deque):
        pairs = zip(found, wanted, strict=True)
        return getattr(found, "maxlen", None) == getattr(wanted, "maxlen", None) and all(
            same(a, b) for a, b in pairs
        )
    return bool(found == wanted)


class Opaque(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.linear, self.value = nn.Linear(8, 3), value

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def get_extra_state(self) -> Any:
        return {"inner": [self.value]}

    def set_extra_state(self, state: Any) -> None:
        self.value = state["inner"][0]


class OneWay(nn.Linear):
    def get_extra_state(self) -> Any:
        return 1


class Refused(Base):
    """Models whose state cannot be saved."""

    def build(self) -> nn.Module:
        kind = self.model.kind
        if kind == "object":
            return nn.Sequential(Opaque(object()))
        if kind == "one way":
            return OneWay(8, 3)
        network = nn.Linear(8, 3)
        sparse = torch.eye(3).to_sparse() if kind == "sparse" else torch.empty(2, device="meta")
        network.register_buffer("adjacency", sparse)
        return network


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("object", "0: get_extra_state returns a object, at ['inner'][0]; a checkpoint holds"),
        ("one way", "the model: OneWay must have set_extra_state"),
        ("sparse", "adjacency: the model's state holds a tensor of sparse_coo, which a checkpoint"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_first_step(
    tmp_path: Path, kind: str, says: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        fit(tmp_path, Refused, model={"kind": kind})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lazy_module_without_a_shape_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"^weight: the lazy module has no shape yet"):
        check_model_state(nn.LazyLinear(3))


def test_the_weights_of_a_run_shape_a_lazy_module(tmp_path: Path) -> None:
    network = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    network(torch.randn(3, 6))
    other = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    load_model_weights(saved(tmp_path, 1, network), other)
    x = torch.randn(5, 6)
    assert other.eval()(x).equal(network.eval()(x))


class Lazy(Base):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3))


def test_lazy_modules_train_as_in_a_plain_loop_and_go_on(tmp_path: Path) -> None:
    found = fit(tmp_path / "a", Lazy)
    torch.manual_seed(combine_seeds(0))
    network = found.workload.build().double()
    data = split(found.workload, "train")
    index = epoch_permutation(0, 0, 96)[:24]
    loss = found.workload.loss(network(data["x"][index]), {"y": data["y"][index]}).mean()
    assert found.rows["train/loss"][1] == pytest.approx(loss.item(), rel=1e-9)
    fit(tmp_path / "b", Lazy, stop_after=5)
    again = fit(tmp_path / "b", Lazy)
    states = [load_file(each.checkpoint / "state-00000.safetensors") for each in (found, again)]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_lazy_modules_on_several_workers(tmp_path: Path, mode: str) -> None:
    found = fit_together(tmp_path, Lazy, scale={"parallel": mode})
    assert found.error is None


class Freezable(Base):
    def build(self) -> nn.Module:
        network = super().build()
        network[0].requires_grad_(self.model.kind != "frozen")
        return network


def imported(folder: Path, donor: Trained) -> None:
    Checkpoints(folder / "checkpoints").import_from(donor.checkpoint)


@pytest.mark.parametrize(
    ("before", "now", "optimizer", "taken"),
    [
        ("", "", "adamw", "and its optimizer's state"),
        ("", "frozen", "adamw", "and its optimizer's state"),
        (
            "frozen",
            "",
            "adamw",
            "and its optimizer's state but for 0.weight, 0.bias, which begin anew",
        ),
        ("", "frozen", "sgd", "and nothing of its optimizer, which is AdamW, not SGD"),
    ],
)
def test_a_run_begins_from_another_ones_weights(
    tmp_path: Path, before: str, now: str, optimizer: str, taken: str
) -> None:
    """As in a plain loop that loads the weights, and the moments of what both train."""
    donor = fit(tmp_path / "donor", Freezable, model={"kind": before})
    imported(tmp_path / "run", donor)
    rule = {"name": optimizer, "lr": 0.02, "schedule": {"name": "constant", "warmup": 0}}
    found = fit(
        tmp_path / "run", Freezable, model={"kind": now}, optimizer=rule, train={"steps": 9}
    )
    assert found.notes["from"] == f"the weights of donor, step 8, {taken}"

    network = Freezable(donor.workload.data, found.workload.model).build().double()
    load_model_weights(donor.checkpoint, network)
    moments = load_file(donor.checkpoint / "state-00000.safetensors")
    matrices = [p for p in network.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in network.parameters() if p.requires_grad and p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0}]
    plain: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=0.02)
        if optimizer == "adamw"
        else torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    )
    for name, weight in network.named_parameters():
        key = f"optimizer.{name}/"
        if weight.requires_grad and optimizer == "adamw" and f"{key}step" in moments:
            plain.state[weight] = {k: moments[key + k] for k in ("step", "exp_avg", "exp_avg_sq")}
    data = split(found.workload, "train")
    index = epoch_permutation(0, 2, 96)[:24]
    loss = found.workload.loss(network(data["x"][index]), {"y": data["y"][index]}).mean()
    assert found.rows["train/loss"][9] == pytest.approx(loss.item(), rel=1e-9)
    loss.backward()
    plain.step()
    after = load_file(found.checkpoint / "state-00000.safetensors")
    for name, weight in network.named_parameters():
        torch.testing.assert_close(after[f"model.{name}"], weight.detach(), rtol=1e-9, atol=1e-12)


def test_a_run_that_goes_on_by_itself_says_nothing_and_must_fit(tmp_path: Path) -> None:
    first = fit(tmp_path, Freezable, stop_after=3)
    assert "from" not in first.notes
    with pytest.raises(CheckpointError, match=r"does not fit the optimizer: 0.\w+ is unknown"):
        fit(tmp_path, Freezable, model={"kind": "frozen"})


def test_a_buffer_of_another_model_is_not_taken(tmp_path: Path) -> None:
    """A mask of another length is part of what the user has changed."""

    def build(length: int) -> nn.Module:
        network = nn.Linear(2, 1)
        network.register_buffer("mask", torch.ones(length))
        return network

    path = saved(tmp_path / "donor" / "checkpoints", 3, build(4))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.import_from(path)
    network = build(6)
    with pytest.raises(CheckpointError, match=r"does not fit the model: mask is \[4\], not \[6\]"):
        checkpoints.resume(network, build_optimizer(OptimizerSpec(), network))
    assert network.mask.equal(torch.ones(6))
