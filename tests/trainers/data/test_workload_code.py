"""A workload's code: its own modules, what they import, and the versions of packages."""

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest

from trainers.data.dataset import dataset_name
from trainers.data.workload_code import workload_code
from trainers.workload import Workload, load_workload

SOURCE = """
import json

import numpy
import maker.points
from aside import SCALE
from trainers import Workload


class Mine(Workload):
    def dataset(self):
        import PIL.Image
        from maker import shapes

    forward = loss = build = dataset
"""


@pytest.fixture
def own(own_folder: Path) -> Path:
    (own_folder / "mine.py").write_text(SOURCE)
    (own_folder / "aside.py").write_text("import yaml\nSCALE = 2\n")
    package = own_folder / "maker"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "points.py").write_text("from . import deep\nfrom .deep import POINTS\n")
    (package / "deep.py").write_text("POINTS = 3\n")
    (package / "shapes.py").write_text("import no_such_package\n")
    (package / "not_imported.py").write_text("import pandas\n")
    return own_folder


def mine() -> type[Workload]:
    sys.modules.pop("mine", None)
    return load_workload("mine:Mine")


def test_the_modules_of_the_user_and_the_packages_that_they_import(own: Path) -> None:
    code = workload_code(mine())
    files = {str(path.relative_to(own)) for path in code.files}
    assert files == {
        *("mine.py", "aside.py"),
        *(f"maker/{name}.py" for name in ("__init__", "points", "deep", "shapes")),
    }
    assert code.versions == {
        "numpy": importlib.metadata.version("numpy"),
        "yaml": importlib.metadata.version("pyyaml"),
        "PIL": importlib.metadata.version("pillow"),
    }


@pytest.mark.parametrize("changed", ["aside.py", "maker/deep.py", "maker/shapes.py"])
def test_a_module_that_makes_the_data_is_part_of_its_identity(own: Path, changed: str) -> None:
    def name() -> str:
        workload = mine()
        return dataset_name(workload(workload.Data(), workload.Model()), own)

    before = name()
    (own / "maker" / "not_imported.py").write_text("# changed\n")
    assert name() == before
    with (own / changed).open("a") as file:
        file.write("# changed\n")
    assert name() != before


def test_another_version_of_a_package_makes_another_data_set(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = mine()
    instance = workload(workload.Data(), workload.Model())
    before = dataset_name(instance, own)
    installed = importlib.metadata.version

    def upgraded(name: str) -> Any:
        return "9.9" if name == "numpy" else installed(name)

    monkeypatch.setattr(importlib.metadata, "version", upgraded)
    assert dataset_name(instance, own) != before


def test_a_build_for_another_device_is_the_same_version(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0+cpu")
    assert set(workload_code(mine()).versions.values()) == {"2.0"}


def test_a_shipped_workload_names_its_packages_itself() -> None:
    assert workload_code(load_workload("dynamics")).versions == {}
