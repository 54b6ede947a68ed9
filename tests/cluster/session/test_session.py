"""Commands in a session: warm, and each as if it were the only one."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.session.session import Session
from cluster.session.session_key import sessions_folder
from cluster.session.session_memory import descendants
from cluster.zygote.handover import connect

pytestmark = pytest.mark.thorough

WATCHED = """
import os, time
from pathlib import Path

import torch
from trainers import Spec, Workload, table

CONSTANT = 1.0


class Watched(Workload):
    class Data(Spec):
        wait: str = ""

    def dataset(self):
        x = torch.arange(64.0)[:, None].numpy()
        return {name: table(x=x) for name in ("train", "val", "test")}

    def build(self):
        return torch.nn.Linear(1, 1)

    def forward(self, model, batch):
        return model(batch["x"])

    def loss(self, output, batch):
        if self.data.wait:
            Path(self.data.wait + ".reached").touch()
            while not Path(self.data.wait).exists():
                time.sleep(0.01)
        return output[:, 0] ** 2

    def metrics(self, output, batch):
        seen = float(os.environ.get("SEEN", "0"))
        ones = torch.ones(len(output))
        return {"constant": CONSTANT * ones, "seen": seen * ones}

    def example(self):
        return torch.zeros(1, 1)
"""


@dataclass
class User:
    """A user of `watched.py`."""

    commands: Any

    @property
    def folder(self) -> Path:
        return Path(self.commands.folder)

    def session(self) -> Session:
        session: Session = self.commands.session()
        return session

    def run(self, *arguments: str, **variables: str) -> str:
        environment = {**self.commands.environment, **variables}
        return str(replace(self.commands, environment=environment)(*arguments))

    def train(self, *fields: str, **variables: str) -> str:
        return self.run("train", "watched:Watched", *_sets(*fields), **variables)

    def start_waiting(self, name: str) -> "subprocess.Popen[str]":
        """A run that waits in its first step until `name` exists in the folder."""
        fields = _sets(f"data.wait={self.folder / name}")
        command: subprocess.Popen[str] = self.commands.start("train", "watched:Watched", *fields)
        deadline_s = time.monotonic() + 300
        while not (self.folder / f"{name}.reached").exists():
            assert command.poll() is None, command.communicate()[0]
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        return command


def _sets(*fields: str) -> list[str]:
    every = ("train.epochs=null", "train.steps=2", "train.global_batch=64", *fields)
    return [word for field in every for word in ("--set", field)]


def _shown(output: str, metric: str) -> float:
    found = re.search(rf"val/{metric} +([\d.]+)", output)
    assert found, output
    return float(found[1])


@pytest.fixture(scope="module")
def user(user_with_sessions: Any) -> User:
    (user_with_sessions.folder / "watched.py").write_text(WATCHED)
    return User(user_with_sessions)


def test_the_second_command_finds_the_first_ones_ray(user: User) -> None:
    user.train()
    first = user.session().status()
    assert not first["in_use"]
    assert 0 < first["ends_in_s"] <= 600
    user.train()
    second = user.session().status()
    assert (second["pid"], second["ray"]) == (first["pid"], first["ray"])
    assert "as usual" not in (user.session().folder / "log").read_text()  # all were forked
    shown = user.run("session")
    assert re.search(r"session \w+: idle, ends in \d+ s; [\d,]+ MB; Ray at 127.0.0.1:\d+", shown)


def test_a_command_has_its_own_environment_and_the_modules_of_now(user: User) -> None:
    """Also in its workers; the umask and the variables of an earlier command are not seen.

    The workers use the folder itself: what git ignores is there, however large it is.
    """
    output = user.train(SEEN="3")
    assert (_shown(output, "constant"), _shown(output, "seen")) == (1.0, 3.0)
    module = user.folder / "watched.py"
    module.write_text(WATCHED.replace("CONSTANT = 1.0", "from _made import CONSTANT"))
    (user.folder / "_made.py").write_text("CONSTANT = 2.5")
    (user.folder / ".gitignore").write_text("_made.py\n")
    with (user.folder / "large.bin").open("wb") as large:
        large.truncate(600 << 20)
    output = user.train()
    assert (_shown(output, "constant"), _shown(output, "seen")) == (2.5, 0.0)
    module.write_text(WATCHED)
    (user.folder / "large.bin").unlink()


@pytest.mark.parametrize("victim", ["worker_zygote", "pid"])
def test_a_run_survives_the_death_of_the_processes_that_forked_it(
    user: User, victim: str, tmp_path: Path
) -> None:
    command = user.start_waiting(victim)
    session = user.session()
    status = session.status()
    os.kill(status[victim], signal.SIGKILL)
    (user.folder / victim).touch()
    output, _ = command.communicate(timeout=300)
    assert command.returncode == 0, output
    user.train()
    after = user.session().status()
    assert (after["pid"] == status["pid"]) == (victim == "worker_zygote")


def test_another_ray_is_started_when_the_warm_one_was_killed(user: User) -> None:
    user.train()
    before = user.session().status()
    os.kill(before["ray_pid"], signal.SIGKILL)
    user.train()
    after = user.session().status()
    assert after["pid"] == before["pid"]
    assert after["ray_pid"] != before["ray_pid"]


def test_a_killed_command_leaves_nothing_to_the_next(
    user: User, wait_until: Callable[..., None]
) -> None:
    command = user.start_waiting("killed")
    command.kill()
    command.wait()
    output = user.train()
    assert _shown(output, "seen") == 0.0
    wait_until(lambda: not user.session().status()["in_use"])


def test_two_commands_at_once_share_the_ray(user: User) -> None:
    waiting = user.start_waiting("together")
    user.train()
    assert waiting.poll() is None
    (user.folder / "together").touch()
    assert waiting.wait(300) == 0


def test_the_end_of_a_session_leaves_no_process(user: User) -> None:
    user.train()
    session = user.session()
    running = descendants(session.status()["pid"])
    assert len(running) > 5
    waiting = user.start_waiting("busy")
    assert not session.end()
    (user.folder / "busy").touch()
    assert waiting.wait(300) == 0
    running += descendants(session.status()["pid"])
    assert session.end()
    time.sleep(0.2)
    assert [pid for pid in running if _is_alive(pid)] == []
    assert not session.folder.exists()
    assert user.run("session") == "no session runs on this machine\n"


def test_a_session_that_is_not_kept_warm_ends_with_its_command(
    user: User, wait_until: Callable[..., None]
) -> None:
    user.train("session.keep_warm_s=0")
    wait_until(lambda: user.run("session") == "no session runs on this machine\n")


def test_a_folder_that_others_can_enter_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    place = sessions_folder()
    assert place is not None
    assert place.parent.stat().st_mode & 0o777 == 0o700
    place.parent.chmod(0o755)
    assert sessions_folder() is None
    place.parent.chmod(0o700)
    if os.getuid() == 0:
        os.chown(place.parent, 65534, 65534)
        assert sessions_folder() is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_cannot_reach_a_session(user: User) -> None:
    user.train()
    path = user.session().folder / "worker.sock"
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            connect(path)
        except PermissionError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_session_takes_less_than_a_gigabyte(user: User) -> None:
    user.train()
    shown = user.run("session")
    found = re.search(r"([\d,]+) MB", shown)
    assert found, shown
    assert int(found[1].replace(",", "")) < 1000
