"""An exported model gives the outputs that the trained one gave, wherever it is loaded."""

import importlib
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cluster.base.config import read_yaml
from cluster.base.errors import CheckpointError
from tests.trainers.checkpoints.test_state import ExtraState, LateBuffers, Lazy, Spectral, Views
from tests.trainers.engine.test_evaluate import Cached
from tests.trainers.wild import Base, fit, spec_of, split
from trainers.checkpoints.buffers import is_expanded
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import export_model, load_model
from trainers.modeling.optimizer import build_optimizer
from trainers.precision import weights_dtype
from trainers.spec import OptimizerSpec, RunSpec, resolve
from trainers.workload import Batch

Exported = tuple[Path, nn.Module]
"""The folder of an exported model, and the network that was exported."""


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., Exported]:
    """Exports the workload `name` with random weights, as after a run, to the folder `to`."""

    def export_to(to: str, name: str, precision: str = "fp32", **sections: Any) -> Exported:
        data = {"workload": name, "train": {"precision": precision}, **sections}
        spec, workload = resolve(data, RunSpec)
        torch.manual_seed(len(to))
        network = workload.build().to(weights_dtype(spec.train))
        with torch.no_grad():
            for weight in network.parameters():
                weight += 0.1 * torch.randn_like(weight)
        checkpoints = Checkpoints(Path(tempfile.mkdtemp(dir=tmp_path)))
        checkpoints.save(7, network, build_optimizer(spec.optimizer, network))
        checkpoints.wait()
        checkpoint = checkpoints.latest()
        assert checkpoint is not None
        folder = tmp_path / "exported" / to
        export_model(folder, spec, workload, checkpoint)
        return folder, network.eval()

    return export_to


def forget_spirals() -> None:
    """As in a new process."""
    sys.modules.pop("spirals", None)
    importlib.invalidate_caches()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_the_shipped_network(export: Callable[..., Exported], precision: str) -> None:
    folder, network = export("vision", "vision", precision, model={"width": 8, "dropout": 0.5})
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    loaded = load_model(folder)
    assert not loaded.training
    assert torch.equal(loaded(images), network(images))
    dtype = torch.float64 if precision == "fp64" else torch.float32
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "spec.yaml",
        "signature.json",
        "example.safetensors",
    }
    example = load_file(folder / "example.safetensors")
    assert torch.equal(loaded(example["input"]), example["output"])
    assert json.loads((folder / "signature.json").read_text()) == {
        "input": {"dtype": "uint8", "shape": [-1, 1, 8, 8]},
        "output": {"dtype": str(dtype).removeprefix("torch."), "shape": [-1, 10]},
    }


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_users_own_network(
    own_folder: Path, export: Callable[..., Exported], precision: str
) -> None:
    folder, network = export("own", "spirals:Spirals", precision, model={"width": 8})
    points = torch.randn(5, 2, dtype=next(network.parameters()).dtype)
    loaded = load_model(folder)
    assert torch.equal(loaded(points), network(points))
    assert read_yaml(folder / "spec.yaml") == {
        "workload": "spirals:Spirals",
        "data": {"points": 400, "noise": 0.05},
        "model": {"width": 8, "dropout": 0.1},
        "train": {"seed": 0, "precision": precision, "channels_last": False},
    }
    source = (own_folder / "spirals.py").read_bytes()
    assert [path.name for path in (folder / "code").iterdir()] == ["spirals.py"]
    assert (folder / "code" / "spirals.py").read_bytes() == source
    dtype = "float64" if precision == "fp64" else "float32"
    assert json.loads((folder / "signature.json").read_text()) == {
        "input": {"dtype": dtype, "shape": [-1, 2]},
        "output": {"dtype": dtype, "shape": [-1, 2]},
    }


def in_packages(folder: Path) -> list[str]:
    """Spirals in a package's module, in a package itself, and in a package of a package."""
    source = (folder / "spirals.py").read_text()
    for package in ("alpha", "beta", "gamma/inner"):
        (folder / package).mkdir(parents=True)
    (folder / "alpha" / "width.py").write_text("WIDTH = 5\n")
    relative = source.replace("import torch\n", "import torch\nfrom .width import WIDTH\n", 1)
    (folder / "alpha" / "__init__.py").touch()
    (folder / "alpha" / "spirals.py").write_text(
        relative.replace("width: int = 16", "width: int = WIDTH")
    )
    (folder / "beta" / "__init__.py").write_text(source)
    (folder / "gamma" / "__init__.py").touch()
    (folder / "gamma" / "inner" / "__init__.py").write_text(source)
    importlib.invalidate_caches()
    return ["alpha.spirals:Spirals", "beta:Spirals", "gamma.inner:Spirals"]


LOAD = """
import importlib.util, json, sys, torch
from trainers import load_model
points = torch.tensor([[0.5, -0.25], [1.0, 2.0]])
found = {}
for name in sys.argv[1:]:
    assert importlib.util.find_spec(name.partition(".")[0]) is None
    try:
        found[name] = load_model(f"../exported/{name}")(points).tolist()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def test_an_exported_model_needs_nothing_but_its_folder(
    own_folder: Path, tmp_path: Path, export: Callable[..., Exported]
) -> None:
    """In another process, from another folder, after the user's own is gone."""
    points = torch.tensor([[0.5, -0.25], [1.0, 2.0]])
    wanted = {}
    for name in ("spirals:Spirals", *in_packages(own_folder)):
        module = name.partition(":")[0]
        _, network = export(module, name)
        wanted[module] = network(points).tolist()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    own_folder.rename(tmp_path / "gone")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *wanted],
        cwd=elsewhere,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


def changed(own_folder: Path) -> None:
    """The user tries another activation. The weights have the shapes that they had."""
    path = own_folder / "spirals.py"
    path.write_text(path.read_text().replace("nn.ReLU()", "nn.Sigmoid()"))
    forget_spirals()


def test_later_changes_of_the_users_code_do_not_matter(
    own_folder: Path, export: Callable[..., Exported]
) -> None:
    folder, network = export("own", "spirals:Spirals")
    changed(own_folder)
    points = torch.randn(5, 2)
    assert torch.equal(load_model(folder)(points), network(points))


def test_two_versions_of_a_users_code_in_one_process(
    own_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    export: Callable[..., Exported],
) -> None:
    exported = [export("first", "spirals:Spirals")]
    changed(own_folder)
    exported.append(export("second", "spirals:Spirals"))
    forget_spirals()
    monkeypatch.chdir(tmp_path)
    sys.path.remove(str(own_folder))
    points = torch.randn(5, 2)
    for folder, network in exported:
        assert torch.equal(load_model(folder)(points), network(points)), folder.name


def test_a_second_export_replaces_the_first(
    own_folder: Path, export: Callable[..., Exported]
) -> None:
    folder, _ = export("own", "spirals:Spirals", model={"width": 4})
    (folder / "stale").touch()
    again, network = export("own", "spirals:Spirals", model={"width": 6})
    assert again == folder
    assert [path.name for path in folder.parent.iterdir()] == ["own"]
    assert not (folder / "stale").exists()
    points = torch.randn(5, 2)
    assert torch.equal(load_model(folder)(points), network(points))


def test_nothing_in_it_is_a_pickle(own_folder: Path, export: Callable[..., Exported]) -> None:
    folder, _ = export("own", "spirals:Spirals")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 5
    for path in files:
        assert path.suffix in (".safetensors", ".yaml", ".json", ".py")
        assert not zipfile.is_zipfile(path)
        with pytest.raises(Exception, match=r"."):
            pickle.loads(path.read_bytes())


@pytest.mark.parametrize("name", ["state.safetensors", "optimizer.pt", "plain"])
def test_pickled_code_is_refused(
    own_folder: Path, export: Callable[..., Exported], tmp_path: Path, name: str
) -> None:
    """Under any name, at export and at load."""
    folder, network = export("own", "spirals:Spirals")
    if name == "plain":
        (folder / name).write_bytes(pickle.dumps(network.state_dict()))
    else:
        torch.save(network.state_dict(), folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}: holds pickled code"):
        load_model(folder)
    spec, workload = resolve({"workload": "spirals:Spirals"}, RunSpec)
    with pytest.raises(CheckpointError, match=rf"{name}: holds pickled code"):
        export_model(tmp_path / "again", spec, workload, folder)


def test_missing_weights_are_named(own_folder: Path, export: Callable[..., Exported]) -> None:
    folder, _ = export("own", "spirals:Spirals")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"^{folder}: no model\.safetensors in it$"):
        load_model(folder)


def test_a_folder_with_several_models_is_refused(
    own_folder: Path, export: Callable[..., Exported]
) -> None:
    """Which one to load would be a guess, unless one is the run's own or the only one."""
    folder, network = export("runs/first/model", "spirals:Spirals")
    points = torch.randn(5, 2)
    assert torch.equal(load_model(folder.parents[1])(points), network(points))
    (folder.parents[1] / ".half" / "model").mkdir(parents=True)
    (folder.parents[1] / ".half" / "model" / "model.safetensors").touch()
    assert torch.equal(load_model(folder.parents[1])(points), network(points))
    second, other = export("runs/second/model", "spirals:Spirals", model={"width": 4})
    with pytest.raises(CheckpointError) as caught:
        load_model(folder.parents[1])
    assert str(caught.value) == (
        f"{folder.parents[1]}: holds 2 models, name one: first/model, second/model"
    )
    export("runs/second/trials/0001/model", "spirals:Spirals")
    assert torch.equal(load_model(second.parent)(points), other(points))


def test_the_loader_that_earlier_releases_registered_is_there(
    own_folder: Path, export: Callable[..., Exported]
) -> None:
    folder, network = export("own", "spirals:Spirals")
    points = torch.randn(5, 2)
    loader = importlib.import_module("trainers.export")
    assert (
        loader._load_pyfunc(str(folder)).predict(points.numpy()) == network(points).detach().numpy()
    ).all()


class Features(nn.Module):
    """Random numbers that are not in the state_dict."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        values = torch.randn(8, 16)
        self.register_buffer("b", values, persistent=False)
        self.plain = values.double()
        self.order = torch.randperm(16)
        self.kind, self.head = kind, nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = self.plain if self.kind == "attribute" else self.b
        return self.head(torch.cos(x @ b.to(x.dtype))[:, self.order])


class RandomFeatures(Base):
    def build(self) -> nn.Module:
        return Features(self.model.kind)


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_what_is_not_in_the_state_dict_is_built_from_the_runs_seed(
    tmp_path: Path, kind: str
) -> None:
    """The loaded model is the one that was evaluated, wherever and whenever it is loaded."""
    found = fit(tmp_path, RandomFeatures, model={"kind": kind}, train={"seed": 5})
    export_model(tmp_path / "model", found.spec, found.workload, found.checkpoint)
    assert read_yaml(tmp_path / "model" / "spec.yaml")["train"]["seed"] == 5
    val = split(found.workload, "val")
    torch.manual_seed(1)
    states = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    for model in (load_model(tmp_path), load_model(tmp_path / "model")):
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model(val["x"]), val["y"])
        assert loss.item() == pytest.approx(found.last("val/loss"), rel=1e-12)
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert states[0].equal(after[0])
    assert states[1:] == after[1:], "loading a model draws nothing from the user's generators"
    example = load_file(tmp_path / "model" / "example.safetensors")
    assert load_model(tmp_path)(example["input"]).equal(example["output"])


@pytest.mark.parametrize("workload", [ExtraState, LateBuffers, Lazy])
def test_all_state_is_exported(tmp_path: Path, workload: type[Base]) -> None:
    found = fit(tmp_path, workload)
    export_model(tmp_path / "model", found.spec, found.workload, found.checkpoint)
    val = split(found.workload, "val")
    with torch.no_grad():
        loss = nn.functional.cross_entropy(load_model(tmp_path)(val["x"]), val["y"])
    assert loss.item() == pytest.approx(found.last("val/loss"), rel=1e-12)


class Viewed(Base):
    def build(self) -> nn.Module:
        return Views()


class Waves(Base):
    def build(self) -> nn.Module:
        return Spectral().to(torch.complex128)


@pytest.mark.parametrize("workload", [Viewed, Waves])
def test_views_and_complex_numbers_are_exported_exactly(
    tmp_path: Path, workload: type[Base]
) -> None:
    spec, instance = resolve(spec_of(workload), RunSpec)
    network = instance.build()
    with torch.no_grad():
        for value in {id(v): v for v in network.state_dict().values()}.values():
            if not is_expanded(value):
                value.mul_(1.5)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, network, build_optimizer(OptimizerSpec(name="sgd"), network))
    checkpoints.wait()
    latest = checkpoints.latest()
    assert latest is not None
    export_model(tmp_path / "model", spec, instance, latest)
    wanted, found = network.state_dict(), load_model(tmp_path).state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].equal(value.to(found[name].dtype)), name
        assert found[name].is_complex() == value.is_complex()


def test_a_table_may_be_made_by_the_loaded_model_and_trained_with(tmp_path: Path) -> None:
    """MLflow's flavour does not compute in inference mode, which would spoil it."""
    found = fit(tmp_path, Cached)
    export_model(tmp_path / "model", found.spec, found.workload, found.checkpoint)
    model = importlib.import_module("trainers.checkpoints.export")._load_pyfunc(
        str(tmp_path / "model")
    )
    model.predict(np.ones((9, 8)))
    model.network(torch.ones(2, 8, dtype=torch.float64)).sum().backward()


class Tied(Base):
    def build(self) -> nn.Module:
        network = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8))
        network[2].weight = network[0].weight
        return network

    def loss(self, output: Any, batch: Batch) -> torch.Tensor:
        return super().loss(output[:, :3], batch)


def test_tied_weights_are_exported(tmp_path: Path) -> None:
    found = fit(tmp_path, Tied)
    export_model(tmp_path / "model", found.spec, found.workload, found.checkpoint)
    loaded = load_model(tmp_path)
    assert loaded[0].weight is loaded[2].weight
    val = split(found.workload, "val")
    with torch.no_grad():
        loss = nn.functional.cross_entropy(loaded(val["x"])[:, :3], val["y"])
    assert loss.item() == pytest.approx(found.last("val/loss"), rel=1e-12)


def test_random_numbers_of_a_modules_import_are_those_of_the_run(
    own_folder: Path, export: Callable[..., Exported]
) -> None:
    """They are drawn anew in each process that imports the module."""
    path = own_folder / "spirals.py"
    drawn = "B = torch.randn(2, 2)\nC = np.random.rand()\n\n\nclass Spirals"
    source = path.read_text().replace("class Spirals", drawn, 1)
    source = source.replace(
        "return nn.Sequential(*first",
        "first[0].bias.data.fill_(C)\n        return nn.Sequential(Turn(B), *first",
    )
    source += """

class Turn(nn.Module):
    def __init__(self, b):
        super().__init__()
        self.b = b

    def forward(self, x):
        return x @ self.b
"""
    path.write_text(source)
    torch.manual_seed(1)
    folder, network = export("own", "spirals:Spirals")
    forget_spirals()
    torch.manual_seed(2)
    points = torch.randn(5, 2)
    assert load_model(folder)(points).equal(network(points))
