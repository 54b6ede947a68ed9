"""A checkpoint is complete or absent, and training goes on from it bit by bit."""

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cluster.base.config import validate
from cluster.base.errors import CheckpointError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.state import load_checkpoint, load_model_weights
from trainers.modeling.optimizer import build_optimizer
from trainers.spec import CheckpointSpec, OptimizerSpec

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "weight_decay": 0.1},
    "sgd": {"name": "sgd", "weight_decay": 0.1},
    "plain": {"name": "sgd", "momentum": 0.0},
}


class Net(nn.Module):
    """A network with buffers, a shared, a frozen and an idle weight, and a scalar."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.encode = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.idle = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.encode(x)).relu()
        x = self.second(self.first(self.frozen(x)).tanh())
        return x * self.temperature


class Strided(nn.Module):
    """Weights that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.conv = nn.Conv2d(3, 2, 2).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x @ self.turned).reshape(-1, 3, 2, 1).expand(-1, 3, 2, 2))


def make(
    optimizer: str = "adamw", seed: int = 0, network: Callable[[], nn.Module] = Net, **fields: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = network()
    spec = validate(OptimizerSpec, {"lr": 0.05, **OPTIMIZERS[optimizer], **fields})
    return model, build_optimizer(spec, model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Train steps [first, last), each on a batch of its own."""
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def two(folder: Path) -> Path:
    """A folder with checkpoints of steps 1 and 2."""
    saved(folder, 1, 2)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def saved(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    model, optimizer = make()
    checkpoints = Checkpoints(folder, CheckpointSpec(keep=keep))
    for step in steps:
        train(model, optimizer, step - 1, step)
        checkpoints.save(step, model, optimizer)
    checkpoints.wait()
    return checkpoints


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    checkpoints = Checkpoints(folder, CheckpointSpec(keep=9))
    checkpoints.save(step, model, optimizer)
    return after_wait(checkpoints)


def after_wait(checkpoints: Checkpoints) -> Path:
    """The latest checkpoint, once the save under way has ended."""
    checkpoints.wait()
    path = checkpoints.latest()
    assert path is not None
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> str | None:
    path = Checkpoints(folder, CheckpointSpec(keep=9)).latest()
    return path.name if path else None


def test_an_error_waits_for_the_save_under_way(folder: Path) -> None:
    """Else a worker that trains again in the same process would write beside it."""
    model, optimizer = make()
    with contextlib.suppress(KeyError), Checkpoints(folder) as checkpoints:
        checkpoints.save(1, model, optimizer, before_commit=lambda: time.sleep(0.3))
        assert newest(folder) is None
        raise KeyError
    assert names(folder) == ["step-00000001"]


def test_each_thread_that_waits_for_a_save_waits_for_its_end(folder: Path) -> None:
    """As a trial's last call and the start of its next instance do."""
    model, optimizer = make()
    checkpoints, go_on, seen = Checkpoints(folder), threading.Event(), list[list[str]]()

    def wait() -> None:
        checkpoints.wait()
        seen.append(names(folder))

    checkpoints.save(1, model, optimizer, before_commit=lambda: assert_set(go_on))
    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    go_on.set()
    for thread in waiting:
        thread.join(30)
    assert seen == [["step-00000001"]] * 3


def assert_set(event: threading.Event) -> None:
    assert event.wait(30)


class TestContinuation:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize(
        "network",
        [Net, lambda: Net().double(), Strided],
        ids=["float32", "float64", "strided"],
    )
    def test_training_goes_on_bit_by_bit(
        self, folder: Path, optimizer: str, network: Callable[[], nn.Module]
    ) -> None:
        straight, first = make(optimizer, network=network)
        train(straight, first, 0, 3)
        checkpoints = Checkpoints(folder, CheckpointSpec(keep=1))
        checkpoints.save(3, straight, first)
        train(straight, first, 3, 7)  # while that is being written

        resumed, second = make(optimizer, seed=1, network=network)
        path = after_wait(checkpoints)
        assert load_checkpoint(path, resumed, second) == (3, {})
        train(resumed, second, 3, 7)
        assert_same(state(resumed), state(straight))

    def test_a_shared_weight_stays_shared(self, two: Path) -> None:
        model, optimizer = make(seed=1)
        load_checkpoint(two / "step-00000002", model, optimizer)
        assert model.second.weight is model.first.weight

    def test_a_loaded_state_can_be_saved_again_at_once(self, tmp_path: Path) -> None:
        straight, first = make()
        train(straight, first, 0, 3)
        path = save(tmp_path / "a", 3, straight, first)
        middle, second = make(seed=1)
        load_checkpoint(path, middle, second)
        path = save(tmp_path / "b", 3, middle, second)
        resumed, third = make(seed=2)
        load_checkpoint(path, resumed, third)
        for model, optimizer in ((straight, first), (resumed, third)):
            train(model, optimizer, 3, 6)
        assert_same(state(resumed), state(straight))

    def test_the_state_before_the_first_step_can_be_saved(self, folder: Path) -> None:
        straight, first = make()
        path = save(folder, 0, straight, first)
        resumed, second = make(seed=1)
        assert load_checkpoint(path, resumed, second) == (0, {})
        for model, optimizer in ((straight, first), (resumed, second)):
            train(model, optimizer, 0, 3)
        assert_same(state(resumed), state(straight))

    def test_learning_rate_and_decay_are_those_of_the_new_optimizer(self, folder: Path) -> None:
        model, optimizer = make(lr=0.5, weight_decay=0.3, betas=[0.5, 0.6])
        train(model, optimizer, 0, 2)
        path = save(folder, 2, model, optimizer)
        other, new = make(seed=1, lr=0.25, weight_decay=0.2, betas=[0.7, 0.8])
        load_checkpoint(path, other, new)
        rules = [(g["lr"], g["betas"], g["weight_decay"]) for g in new.param_groups]
        assert rules == [(0.25, (0.7, 0.8), 0.2), (0.25, (0.7, 0.8), 0.0)]
        # And what the rule is applied to is the checkpoint's.
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = 0.25, (0.7, 0.8)
            group["weight_decay"] = 0.2 if group["weight_decay"] else 0.0
        train(model, optimizer, 2, 4)
        train(other, new, 2, 4)
        assert_same(state(other), state(model))

    def test_a_run_may_go_on_in_higher_precision(self, two: Path) -> None:
        """The moments are kept, in the dtype of the weights."""
        path = two / "step-00000002"
        single, first = make()
        double, second = make(network=lambda: Net().double())
        load_checkpoint(path, single, first)
        load_checkpoint(path, double, second)
        for kept, wide in zip(first.state.values(), second.state.values(), strict=True):
            assert kept.keys() == wide.keys()
            for part, value in kept.items():
                assert torch.equal(wide[part], value.to(wide[part].dtype))
        train(double, second, 2, 4)
        assert all(tensor.isfinite().all() for tensor in double.state_dict().values())

    def test_the_weights_can_be_loaded_without_the_optimizer(self, folder: Path) -> None:
        model, optimizer = make()
        train(model, optimizer, 0, 2)
        other, _ = make(seed=1)
        load_model_weights(save(folder, 2, model, optimizer), other)
        assert_same(state(other), state(model))


class TestSave:
    def test_only_the_latest_are_kept(self, folder: Path) -> None:
        saved(folder, 1, 2, 3, 10, 200, keep=2)
        assert names(folder) == ["step-00000010", "step-00000200"]

    def test_a_checkpoint_that_is_there_is_not_written_again(self, two: Path) -> None:
        before = (two / "step-00000002" / "state-00000.safetensors").stat()
        saved(two, 2)
        assert (two / "step-00000002" / "state-00000.safetensors").stat() == before

    def test_a_damaged_checkpoint_is_replaced_by_the_next_save_of_its_step(self, two: Path) -> None:
        """A run that went on from an older one comes to the same step again."""
        (two / "step-00000002" / "state-00000.safetensors").write_bytes(b"damaged")
        model, optimizer = make(seed=5)
        path = save(two, 2, model, optimizer)
        assert newest(two) == path.name == "step-00000002"
        other, _ = make(seed=1)
        load_model_weights(path, other)
        assert_same(state(other), state(model))

    def test_the_saved_state_is_that_at_the_call(self, folder: Path) -> None:
        model, optimizer = make()
        wanted = state(model)
        checkpoints = Checkpoints(folder, CheckpointSpec(keep=1))
        checkpoints.save(1, model, optimizer)
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        path = after_wait(checkpoints)
        load_model_weights(path, model)
        assert_same(state(model), wanted)

    def test_before_commit_comes_before_the_name(self, folder: Path) -> None:
        seen: list[tuple[list[str], bool]] = []
        here = threading.get_ident()

        def before_commit() -> None:
            seen.append((names(folder), threading.get_ident() == here))

        checkpoints = Checkpoints(folder, CheckpointSpec(keep=1))
        checkpoints.save(1, *make(), before_commit=before_commit)
        checkpoints.wait()
        assert seen == [([".step-00000001"], False)]
        assert names(folder) == ["step-00000001"]

    def test_save_returns_before_it_is_written(self, folder: Path) -> None:
        release = threading.Event()
        checkpoints = Checkpoints(folder, CheckpointSpec(keep=1))
        checkpoints.save(1, *make(), before_commit=lambda: None if release.wait(20) else 1 / 0)
        assert newest(folder) is None
        release.set()
        checkpoints.wait()
        assert newest(folder) == "step-00000001"

    @pytest.mark.parametrize("call", ["wait", "save"])
    def test_an_error_of_the_writing_thread_surfaces_at_the_next_call(
        self, two: Path, call: str
    ) -> None:
        def before_commit() -> None:
            raise OSError("no space left")

        checkpoints = Checkpoints(two, CheckpointSpec(keep=9))
        checkpoints.save(3, *make(), before_commit=before_commit)
        with pytest.raises(
            CheckpointError, match="step-00000003: cannot be written: no space left"
        ):
            checkpoints.save(4, *make()) if call == "save" else checkpoints.wait()
        # What was half written is gone, and those before are as they were.
        assert newest(two) == "step-00000002"
        assert names(two) == ["step-00000001", "step-00000002"]
        saved(two, 3)
        assert names(two) == ["step-00000001", "step-00000002", "step-00000003"]

    def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(self, small_disk: Path) -> None:
        saved(small_disk, 1)
        free = os.statvfs(small_disk)
        (small_disk / "others").write_bytes(bytes(free.f_bavail * free.f_frsize))
        with pytest.raises(CheckpointError, match=r"step-00000002: the disk is full; the check"):
            saved(small_disk, 2)
        assert newest(small_disk) == "step-00000001"
        assert names(small_disk) == ["others", "step-00000001"]
        (small_disk / "others").unlink()
        saved(small_disk, 2)
        assert newest(small_disk) == "step-00000002"

    def test_nothing_in_it_is_a_pickle(self, two: Path) -> None:
        files = [path for path in two.rglob("*") if path.is_file()]
        assert {path.name for path in files} == {"state-00000.safetensors", "manifest.json"}
        for path in files:
            assert not path.read_bytes().startswith((b"\x80", b"PK"))


def truncate(path: Path) -> None:
    content = (path / "state-00000.safetensors").read_bytes()
    (path / "state-00000.safetensors").write_bytes(content[:-1])


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def manifest_with(text: str) -> Callable[[Path], object]:
    return lambda path: (path / "manifest.json").write_text(text)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "longer": lambda path: (path / "state-00000.safetensors").open("ab").write(b"\0"),
    "emptied": lambda path: (path / "state-00000.safetensors").write_bytes(b""),
    "a flipped bit": lambda path: flip(path / "state-00000.safetensors", 8_001),
    "no state": lambda path: (path / "state-00000.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "an empty folder": lambda path: [file.unlink() for file in path.iterdir()],
    "empty manifest": manifest_with(""),
    "half a manifest": manifest_with('{"step": 2, "fil'),
    "manifest of nothing": manifest_with("{}"),
    "manifest without files": manifest_with('{"step": 2, "files": {}}'),
    "manifest is a list": manifest_with("[]"),
    "manifest is null": manifest_with("null"),
    "files is a list": manifest_with('{"step": 2, "files": []}'),
    "file is a number": manifest_with('{"step": 2, "files": {"state-00000.safetensors": 3}}'),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
        self, two: Path, caplog: pytest.LogCaptureFixture, damage: str
    ) -> None:
        path = two / "step-00000002"
        DAMAGE[damage](path)
        assert newest(two) == "step-00000001"
        [report] = caplog.messages
        assert report.startswith(f"{path}: ")
        assert report.endswith("; passed over")
        assert "\n" not in report
        with pytest.raises(CheckpointError, match="step-00000002"):
            load_checkpoint(path, *make())

    def test_no_latest_checkpoint_if_none_is_intact(self, two: Path, tmp_path: Path) -> None:
        for path in two.iterdir():
            truncate(path)
        assert newest(two) is None
        assert newest(tmp_path / "never made") is None

    def test_other_files_beside_them_do_not_matter(self, two: Path) -> None:
        (two / ".step-00000003").mkdir()
        (two / "step-00000004").write_text("a file")
        (two / "notes.txt").touch()
        assert newest(two) == "step-00000002"

    def test_no_flipped_bit_of_the_manifest_changes_the_step(self, two: Path) -> None:
        """Each flipped bit is noticed or harmless."""
        path = two / "step-00000002" / "manifest.json"
        content = path.read_bytes()
        for bit in range(len(content) * 8):
            flip(path, bit)
            if newest(two) == "step-00000002":
                assert json.loads(path.read_text())["step"] == 2, path.read_text()
            path.write_bytes(content)

    @settings(
        max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(data=st.data())
    def test_every_flipped_bit_of_the_state_is_noticed(
        self, two: Path, data: st.DataObject
    ) -> None:
        path = two / "step-00000002" / "state-00000.safetensors"
        content = path.read_bytes()
        flip(path, data.draw(st.integers(0, len(content) * 8 - 1)))
        assert newest(two) == "step-00000001"
        path.write_bytes(content)


class Deeper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


class Shallower(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.idle


class TestMisfit:
    @pytest.mark.parametrize(
        ("network", "says"),
        [
            (lambda: Net(width=8), r"encode\.weight is \[6, 4\], not \[8, 4\]"),
            (Deeper, r"more\.weight is missing, not \[2, 2\]"),
            (Shallower, r"idle\.(weight|bias)"),
        ],
        ids=["another shape", "a layer more", "a layer less"],
    )
    def test_a_tensor_that_does_not_fit_is_named(
        self, two: Path, network: Callable[[], nn.Module], says: str
    ) -> None:
        path = two / "step-00000002"
        model, optimizer = make(network=network)
        before = state(model)
        for use in (
            lambda: load_checkpoint(path, model, optimizer),
            lambda: load_model_weights(path, model),
        ):
            with pytest.raises(CheckpointError, match=rf"{path}: does not fit the model: .*{says}"):
                use()
            assert_same(state(model), before)

    @pytest.mark.parametrize(("old", "new"), [("adamw", "sgd"), ("sgd", "adamw")])
    def test_the_state_of_another_optimizer_does_not_fit(
        self, folder: Path, old: str, new: str
    ) -> None:
        model, optimizer = make(old)
        train(model, optimizer, 0, 2)
        path = save(folder, 2, model, optimizer)
        with pytest.raises(CheckpointError, match=rf"{path}: does not fit the optimizer: "):
            load_checkpoint(path, *make(new))
