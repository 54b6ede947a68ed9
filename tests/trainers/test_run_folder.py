"""The folder of a run: one process at a time, and the versions that made it."""

import json
import shutil
from importlib.metadata import distributions
from pathlib import Path

import pytest

from cluster.base.config import write_yaml
from cluster.base.errors import SpecError
from trainers import run_folder as folders
from trainers.spec import find_spec


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    with (
        folders.locked(tmp_path),
        pytest.raises(SpecError, match="another process is working on this run"),
        folders.locked(tmp_path),
    ):
        pass


def test_the_environment_names_versions() -> None:
    packages = json.loads(json.dumps(folders.environment()))["packages"]
    assert packages["ray"] == "2.60.0"
    assert packages == {found.name: found.version for found in distributions()}


def test_the_spec_of_a_project_that_was_moved_or_copied(tmp_path: Path) -> None:
    """Its runs, and its MLflow file if there is one, are those of the present place."""
    before, now, link = tmp_path / "before", tmp_path / "now", tmp_path / "link"
    folder = before / "runs" / "mine"
    folder.mkdir(parents=True)
    uri = f"sqlite:///{before}/mlflow.db"
    data = {"storage": str(before / "runs"), "tracking": {"uri": uri, "experiment": "heliostat"}}
    write_yaml(data, folder / "spec.yaml")
    (before / "mlflow.db").touch()
    assert folders.read_spec(folder) == data
    link.symlink_to(before)
    assert folders.read_spec(link / "runs" / "mine") == data, "the same folder by another name"

    shutil.copytree(before, now)
    moved = folders.read_spec(now / "runs" / "mine")
    assert moved["storage"] == str(now / "runs")
    assert moved["tracking"] == {"uri": f"sqlite:///{now}/mlflow.db", "experiment": "heliostat"}
    (now / "mlflow.db").unlink()
    assert folders.read_spec(now / "runs" / "mine")["tracking"]["uri"] == uri
    for elsewhere in ("http://mlflow:5000", "sqlite:////data/mlflow.db"):
        tracking = {"uri": elsewhere, "experiment": "heliostat"}
        write_yaml({**data, "tracking": tracking}, now / "runs" / "mine" / "spec.yaml")
        assert folders.read_spec(now / "runs" / "mine")["tracking"]["uri"] == elsewhere

    best = now / "runs" / "mine" / "best.yaml"
    write_yaml(data, best)
    assert find_spec(str(best))[1]["storage"] == str(before / "runs"), "no run, but a user's file"
    (best.parent / folders.ENVIRONMENT).touch()
    assert find_spec(str(best))[1]["storage"] == str(now / "runs")
