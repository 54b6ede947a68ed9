"""Workers that are killed while they train, in a Ray whose processes are forked or started."""

import os
import signal
import subprocess
import time
from typing import Any

import pytest
from safetensors.torch import load_file

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


@pytest.fixture(scope="module")
def commands(user_with_sessions: Any) -> Any:
    (user_with_sessions.folder / "marked.py").write_text(MARKED_SOURCE)
    return user_with_sessions


def train(commands: Any, name: str, *fields: str) -> "subprocess.Popen[str]":
    every = (
        *("train.epochs=null", f"train.steps={STEPS}", "train.global_batch=64"),
        *("model.width=4", "model.blocks=[1, 1]", "checkpoint.every_steps=5", *fields),
    )
    sets = [word for field in every for word in ("--set", field)]
    command: subprocess.Popen[str] = commands.start("train", "marked:Marked", "--name", name, *sets)
    return command


def weights(commands: Any, name: str) -> dict[str, Any]:
    return load_file(commands.folder / "runs" / name / "model" / "model.safetensors")


def _end(command: "subprocess.Popen[str]") -> None:
    output, _ = command.communicate(timeout=300)
    assert command.returncode == 0, output


@pytest.mark.parametrize("victims", [("worker_zygote",), ("pid", "worker_zygote")])
def test_a_worker_is_replaced_after_the_processes_that_fork_were_killed(
    commands: Any, victims: tuple[str, ...]
) -> None:
    """By a new zygote's child, and without a session by a process that starts as usual.

    The weights are bit for bit those of a run in which nothing was killed.
    """
    name = "-".join(victims)
    wait = commands.folder / name
    command = train(commands, name, f"data.wait={wait}", f"data.step={MARKED}")
    deadline_s = time.monotonic() + 300
    marked = wait.with_suffix(".pid")
    while not (marked.exists() and marked.read_text()):
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    worker, status = int(marked.read_text()), commands.session().status()
    for victim in victims:
        os.kill(status[victim], signal.SIGKILL)
    wait.touch()
    os.kill(worker, signal.SIGKILL)
    _end(command)
    undisturbed = commands.folder / "runs" / "undisturbed"
    if not undisturbed.exists():
        _end(train(commands, "undisturbed"))
    assert weights(commands, name).keys() == weights(commands, "undisturbed").keys()
    for key, weight in weights(commands, "undisturbed").items():
        assert weights(commands, name)[key].equal(weight), key
