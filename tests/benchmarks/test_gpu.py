"""The benchmark for GPUs runs without Ray and MLflow, and names a package that is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.thorough

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
HIDDEN = ("ray", "mlflow", "optuna", "rich", "sklearn", "PIL")


def run(*options: str, hidden: tuple[str, ...] = HIDDEN) -> subprocess.CompletedProcess[str]:
    """Run the script in a Python that cannot import the hidden modules."""
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({hidden!r}))\n"
        f"sys.argv = {[str(SCRIPT), *options]!r}\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def test_tiny_sizes_on_a_cpu() -> None:
    done = run("--tiny", "--rounds", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "gpu"
    compared = [(row["case"], row["against"]) for row in result["rows"]]
    mfu = [("GPT, tiny, MFU", "Heliostat"), ("GPT, tiny, MFU", "bare PyTorch")]
    assert compared == [*mfu, ("GPT, tiny", "bare PyTorch")]
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in result["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert [row["against"] for row in result["rows"]] == ["bare PyTorch"]
    assert result["rows"][0]["not_run"].startswith("no GPU here")


def test_what_is_missing_is_named() -> None:
    done = run("--tiny", hidden=("pydantic",))
    assert done.returncode == 1
    assert done.stderr == "benchmarks/gpu.py: needs pydantic, which is not installed here\n"
