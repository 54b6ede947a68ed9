"""Every benchmark runs: its `--tiny` form ends with one line of JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECONDS = ("checkpoint", "data", "gpu", "loop", "report")
"""Benchmarks that start neither Ray nor MLflow, or use made-up numbers."""
MINUTES = ("answers", "forecast", "fused", "many", "recovery", "search", "start", "track")
ON_A_RACK = ("clusters",)
PARTS = (
    *("answer_", "bare", "browser", "contest", "guide"),
    *("loop_in_turns", "models", "peers", "search_", "tutorial"),
)
"""Beginnings of modules that benchmarks share, and of programs that they start."""


def run_tiny(name: str, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--tiny", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    not_run = [row for row in result["rows"] if "not_run" in row]
    assert len(result["rows"]) > len(not_run), "nothing was measured"
    assert all(row["against"] and row["not_run"] for row in not_run)


@pytest.mark.parametrize("name", SECONDS)
def test_in_seconds(name: str) -> None:
    run_tiny(name)


@pytest.mark.slow
def test_known_answers() -> None:
    run_tiny("answers", "vision", "hedging")


@pytest.mark.slow
@pytest.mark.parametrize("name", MINUTES)
def test_with_real_runs(name: str) -> None:
    run_tiny(name)


@pytest.mark.cluster
@pytest.mark.parametrize("name", ON_A_RACK)
def test_on_hosts(name: str) -> None:
    run_tiny(name)


def test_no_benchmark_is_left_out() -> None:
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    shared = {name for name in names if name.startswith(PARTS)}
    assert names - shared - {"answers"} == {*SECONDS, *MINUTES, *ON_A_RACK} - {"answers"}
