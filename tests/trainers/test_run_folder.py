"""The folder of a run: one process at a time, and the versions that made it."""

import json
from importlib.metadata import distributions
from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from trainers import run_folder as folders


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
