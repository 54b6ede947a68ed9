"""The README and the pages of docs/ are correct: their commands and code run as they stand."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.layout import CONTRACTS
from tuning.cli.parser import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands() -> list[str]:
    """Every command line in the console blocks of all pages, without comments."""
    found = [block for page in PAGES for block in blocks("console", page.read_text())]
    lines = [line for block in found for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if line]


def test_every_command_is_of_a_known_program() -> None:
    known = ("make ", "heliostat ", "ray job submit ", "python ", "git ", ".venv/bin/")
    assert [command for command in commands() if not command.startswith(known)] == []


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("heliostat ")])
def test_the_command_line_understands_every_command(command: str) -> None:
    build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    inside = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in inside if not (page.parent / link).exists()] == []


def test_the_architecture_names_functions_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"\b(?:cluster|trainers|tuning|heliostat)(?:\.\w+)+", page))
    assert len(names) > 40
    for name in names:
        assert resolves(name), name


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_the_readme_is_short_and_lists_every_room() -> None:
    assert len(README.splitlines()) <= 150
    linked = set(re.findall(r"\]\(([\w/]+)\)", README))
    rooms = {room.replace(".", "/") for room in CONTRACTS if ".workloads." not in room}
    assert rooms - linked == set()


@pytest.mark.thorough
def test_use_it(heliostat: Any) -> None:
    """The commands of 'Use it', in their order; then the model of the last one is loaded."""
    for command in blocks("console")[1].splitlines():
        arguments = shlex.split(command.partition("#")[0])[1:]
        if arguments[0] == "ui":
            continue
        if arguments[0] == "train":
            arguments += ["--name", "small-best"] if "best.yaml" in command else []
        if "digits" in arguments:
            arguments += ["--set", "train.epochs=10"]
        output = heliostat(*arguments)
        if arguments[0] == "train":
            accuracy = float(re.search(r"test/accuracy +([\d.]+)", output)[1])
            assert accuracy > 0.8, output
    line = next(block for block in blocks("python") if "load_model" in block)
    code = f"{line}\nimport torch\nprint(model(torch.zeros(3, 1, 8, 8)).shape)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=heliostat.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "torch.Size([3, 10])"


def test_your_own_model(heliostat: Any) -> None:
    workload = next(block for block in blocks("python") if "class Spirals" in block)
    assert len(workload.splitlines()) < 40
    (heliostat.folder / "spirals.py").write_text(workload)
    (heliostat.folder / "spirals.yaml").write_text(blocks("yaml")[0])
    for command in [*blocks("console")[2].splitlines(), *blocks("console")[3].splitlines()]:
        output = heliostat(*shlex.split(command)[1:])
    assert "importance" in output
    assert float(re.search(r"\d{4} +([\d.]+)", output)[1]) > 0.9


@pytest.mark.thorough
def test_a_ray_job(job_cluster: Any, tmp_path: Path) -> None:
    """`ray job submit` as in docs/clusters.md, on a shorter run."""
    page = (ROOT / "docs" / "clusters.md").read_text()
    submitting = next(block for block in blocks("console", page) if "ray job submit" in block)
    command = submitting.strip().replace("http://127.0.0.1:8265", job_cluster.url)
    before, _, after = command.partition(" -- ")
    (tmp_path / "here.txt").write_text("sent along")
    arguments = [*shlex.split(before), "--working-dir", str(tmp_path), "--", *shlex.split(after)]
    arguments += ["--set", "train.epochs=2", "--set", "scale.workers=2"]
    done = subprocess.run(
        arguments,
        env=job_cluster.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test/accuracy" in done.stdout
    assert list((job_cluster.folder / "runs").glob("digits-*/model/model.safetensors"))


@pytest.mark.thorough
def test_ui_serves_the_runs_of_this_folder(
    tmp_path: Path, free_port: int, wait_until: Callable[..., None]
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    command = [str(Path(sys.executable).with_name("heliostat")), "ui", "--port", str(free_port)]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )

    def healthy() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{free_port}/", timeout=5) as page:
                return b"MLflow" in page.read()
        except OSError:
            return False

    try:
        wait_until(healthy)
        assert (tmp_path / "mlflow.db").exists()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(600)


@pytest.mark.slow
def test_the_demo_reaches_98_percent_on_images_no_trial_saw(tmp_path: Path) -> None:
    """`make demo`, with a Ray and an MLflow store of its own, as on a fresh machine."""
    listing = subprocess.run(
        ["make", "--dry-run", "--silent", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    steps = [line for line in listing if "heliostat" in line and not line.startswith("echo")]
    assert len(steps) == 2
    gone = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in gone}
    output = ""
    for step in steps:
        program, *arguments = shlex.split(step)
        done = subprocess.run(
            [str(Path(sys.executable).with_name(Path(program).name)), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        output += done.stdout
    accuracy = float(re.search(r"test/accuracy +([\d.]+)", output)[1])
    run_id = re.search(r"MLflow run +(\w+)", output)[1]
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    tracked = client.get_run(run_id)
    assert round(tracked.data.metrics["test/accuracy"], 4) == accuracy >= 0.98
    parent = client.search_runs([tracked.info.experiment_id], "tags.`heliostat.kind` = 'trial'")
    assert len(parent) == 16
