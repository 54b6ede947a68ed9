"""A zygote imports modules, and knows when it must not fork."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.zygote import preload


def test_what_is_not_installed_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    preload.preload(["json", "no_such_module_at_all"])
    assert "no_such_module_at_all" in caplog.text


def test_an_open_accelerator_forbids_forks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preload, "HARMLESS_THREADS", _all_threads())
    assert preload.fork_hazard() is None
    device = tmp_path / "nvidia0"
    device.touch()
    monkeypatch.setattr(preload, "ACCELERATORS", (str(tmp_path / "nvidia"),))
    with device.open():
        assert preload.fork_hazard() == f"it has used an accelerator: {device}"
    assert preload.fork_hazard() is None


def _all_threads() -> tuple[str, ...]:
    return tuple((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())


def test_the_modules_of_commands_start_no_thread_and_touch_no_accelerator() -> None:
    """NumPy's OpenBLAS starts threads at its import."""
    code = (
        "from cluster.zygote.preload import *;"
        "preload([*COMMAND_MODULES, *LATER_MODULES]);"
        "print(fork_hazard())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n"


def test_modules_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "one.py").touch()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "__init__.py").touch()
    (tmp_path / "mlflow.db").touch()  # as in the working folder of most users
    (tmp_path / "torch").mkdir()
    (tmp_path / "three.cpython-311-x86_64-linux-gnu.so").touch()
    assert preload.top_level_modules(str(tmp_path)) == {"one", "two", "three"}
    assert preload.top_level_modules(str(tmp_path / "none")) == set()
