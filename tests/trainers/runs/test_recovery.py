"""Workers that are killed while they train, in a Ray whose processes are forked or started."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cluster.session.session import Session

pytestmark = pytest.mark.thorough

STEPS, MARKED = 12, 8

MARKED_SOURCE = """
import os, time
from pathlib import Path
from typing import Any
from trainers.workloads.vision.workload import Vision


class Marked(Vision):
    class Data(Vision.Data):
        wait: str = ""
        step: int = 0

    def augment(self, batch, random):
        go_on = Path(self.data.wait)
        if self.data.wait and int(random.positions[0]) // 64 == self.data.step:
            go_on.with_suffix(".pid").write_text(str(os.getpid()))
            while not go_on.exists():
                time.sleep(0.01)
        return super().augment(batch, random)
"""


class Commands:
    """Commands of a user with sessions of its own."""

    def __init__(self, folder: Path, place: str) -> None:
        hidden = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PYTHONPATH")
        self.folder, self.place = folder, Path(place)
        self.environment = {k: v for k, v in os.environ.items() if k not in hidden}
        self.environment["RAY_TMPDIR"] = place

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("heliostat")), *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train(self, name: str, *fields: str) -> "subprocess.Popen[str]":
        every = (
            *("train.epochs=null", f"train.steps={STEPS}", "train.global_batch=64"),
            *("model.width=4", "model.blocks=[1, 1]", "checkpoint.every_steps=5", *fields),
        )
        sets = [word for field in every for word in ("--set", field)]
        return self.start("train", "marked:Marked", "--name", name, *sets)

    def status(self) -> dict[str, int]:
        (socket,) = self.place.glob("heliostat-*/s/*/ray.sock")
        return Session(socket.parent).status()

    def weights(self, name: str) -> dict[str, Any]:
        return load_file(self.folder / "runs" / name / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    place = tempfile.mkdtemp(prefix="hr")  # short, since paths of sockets are limited
    folder = tmp_path_factory.mktemp("commands")
    (folder / "marked.py").write_text(MARKED_SOURCE)
    made = Commands(folder, place)
    yield made
    made.start("session", "--end").communicate(timeout=60)
    shutil.rmtree(place, ignore_errors=True)


def _end(command: "subprocess.Popen[str]") -> None:
    output, _ = command.communicate(timeout=300)
    assert command.returncode == 0, output


@pytest.mark.parametrize("victims", [("worker_zygote",), ("pid", "worker_zygote")])
def test_a_worker_is_replaced_after_the_processes_that_fork_were_killed(
    commands: Commands, victims: tuple[str, ...]
) -> None:
    """By a new zygote's child, and without a session by a process that starts as usual.

    The weights are bit for bit those of a run in which nothing was killed.
    """
    name = "-".join(victims)
    wait = commands.folder / name
    command = commands.train(name, f"data.wait={wait}", f"data.step={MARKED}")
    deadline_s = time.monotonic() + 300
    marked = wait.with_suffix(".pid")
    while not (marked.exists() and marked.read_text()):
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    worker, status = int(marked.read_text()), commands.status()
    for victim in victims:
        os.kill(status[victim], signal.SIGKILL)
    wait.touch()
    os.kill(worker, signal.SIGKILL)
    _end(command)
    undisturbed = commands.folder / "runs" / "undisturbed"
    if not undisturbed.exists():
        _end(commands.train("undisturbed"))
    assert commands.weights(name).keys() == commands.weights("undisturbed").keys()
    for key, weight in commands.weights("undisturbed").items():
        assert commands.weights(name)[key].equal(weight), key
