"""The command runs our own packages alone: other packages have the same names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from heliostat.main import PACKAGES, find_shadowed_package

HOME = Path(__file__).parents[2]


@pytest.mark.parametrize("where", ["empty", "home", "neighbours"])
def test_our_own_packages_pass(tmp_path: Path, where: str) -> None:
    """In an empty folder, in our checkout itself, beside files whose names are only similar."""
    (tmp_path / "cluster.yaml").touch()
    (tmp_path / "tuning_notes").mkdir()
    (tmp_path / "heliostat" / "cluster").mkdir(parents=True)  # a checkout
    (tmp_path / "empty").mkdir()
    folders = {"empty": tmp_path / "empty", "home": HOME, "neighbours": tmp_path}
    assert find_shadowed_package(folders[where]) is None


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("form", ["{}.py", "{}/__init__.py", "{}/notes.txt"])
def test_a_file_or_folder_that_would_hide_ours_is_named(
    tmp_path: Path, package: str, form: str
) -> None:
    path = tmp_path / form.format(package)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    line = find_shadowed_package(tmp_path)
    if path == tmp_path / "heliostat" / "notes.txt":
        assert line is None
        return
    hider = path if package == "heliostat" else tmp_path / form.format(package).partition("/")[0]
    assert line == f"{hider}: hides Heliostat's own package {package!r}; rename it"


# The console script `heliostat` is these two lines; but the finder of an editable installation
# gives our `cluster.cli.jobs` to another `cluster`, which an ordinary installation does not.
SCRIPT = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
from heliostat.main import main
sys.exit(main())
"""


@pytest.mark.parametrize("package", ["cluster", "trainers"])
@pytest.mark.parametrize("files", [["__init__.py"], ["__init__.py", "cli.py", "errors.py"], ["x"]])
def test_another_distribution_of_our_name_is_one_line(
    tmp_path: Path, package: str, files: list[str]
) -> None:
    """A package with or without modules like ours, and a folder without __init__."""
    foreign = tmp_path / "site" / package
    foreign.mkdir(parents=True)
    for name in files:
        (foreign / name).touch()
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--help"],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": f"{foreign.parent}{os.pathsep}{HOME}"},
        capture_output=True,
        text=True,
    )
    if files == ["x"]:  # a regular package on a later path wins over such a folder
        assert done.returncode == 0, done.stderr
        assert "usage: heliostat" in done.stdout
        return
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"package {package!r}" in done.stderr
    assert str(foreign) in done.stderr
