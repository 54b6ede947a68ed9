"""Processes that a zygote forks are those that would have been started."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.zygote.handover import connect

WORK = """
import json, logging, os, random, resource, sys, time
from pathlib import Path

def ends(arguments):
    return int(arguments[0])

def exits(arguments):
    sys.exit(arguments[0])

def kills(arguments):
    os.kill(os.getpid(), int(arguments[0]))

def warns(arguments):
    logging.warning("hot")
    logging.info("not shown")
    return 0

def raises(arguments):
    raise ValueError("no way")

def tells(arguments):
    umask = os.umask(0)
    Path(arguments[0]).write_text(json.dumps({
        "environment": dict(os.environ), "cwd": os.getcwd(), "umask": umask,
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "stdin": sys.stdin.read(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE), "random": random.random(),
        "numpy": __import__("numpy").random.random(),
        "path": sys.path, "name": Path("/proc/self/comm").read_text(),
        "open": len(os.listdir("/proc/self/fd")),
    }))
    print("told")
    return 0

def waits(arguments):
    here = Path(arguments[0])
    here.with_suffix(".pid").write_text(str(os.getpid()))
    while not here.exists():
        time.sleep(0.01)
    return 5
"""
ZYGOTE = """
import logging, socket, sys, threading
from cluster.zygote.zygote import Zygote
logging.basicConfig(filename="zygote.log", level=logging.INFO)
zygote = Zygote(socket.socket(fileno=int(sys.argv[1])))
if "thread" in sys.argv:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
later = [option.removeprefix("later=") for option in sys.argv if option.startswith("later=")]
zygote.serve(lambda: True, later, quiet_s=2)
"""
CLIENT = """
import sys
from pathlib import Path
from cluster.zygote.handover import end_as, hand_over, process_state
path, function, *arguments = sys.argv[1:]
request = {"do": "command", "function": function, "title": "x", "arguments": arguments}
request["modules"] = ["numpy"]  # whose OpenBLAS starts threads
code = hand_over(Path(path), {**process_state(), **request, "files": [0, 1, 2]}, (0, 1, 2))
if isinstance(code, str):
    sys.exit(code)
end_as(code)
"""


@dataclass
class RunningZygote:
    process: "subprocess.Popen[bytes]"
    socket: Path
    environment: dict[str, str]

    def start(self, function: str, *arguments: object, **options: Any) -> "subprocess.Popen[str]":
        """A process that hands `work.function` over to the zygote."""
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, self.socket, f"work:{function}", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **{"env": self.environment, **options},
        )

    def run(self, function: str, *arguments: object, **options: Any) -> tuple[int, str, str]:
        """The exit code of such a process, and what it has written."""
        client = self.start(function, *arguments, **options)
        out, error = client.communicate("typed", timeout=60)
        return client.returncode, out, error


@pytest.fixture
def start_zygote(tmp_path: Path) -> Iterator[Callable[..., RunningZygote]]:
    (tmp_path / "work.py").write_text(WORK)
    folder = Path(tempfile.mkdtemp(prefix="hz"))  # short, since paths of sockets are limited
    home = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": f"{home}:{tmp_path}"}
    environment.pop("OMP_NUM_THREADS", None)
    started = []

    def start(*options: str) -> RunningZygote:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "z"))
        listener.listen()
        number = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE, str(number), *options],
            env=environment,
            pass_fds=[number],
            cwd=folder,
            stdin=subprocess.DEVNULL,
        )
        listener.close()
        started.append(process)
        return RunningZygote(process, folder / "z", environment)

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_process_ends_as_its_child_does(start_zygote: Callable[..., RunningZygote]) -> None:
    zygote = start_zygote()
    assert zygote.run("ends", 0)[0] == 0
    assert zygote.run("ends", 3)[0] == 3
    assert zygote.run("exits", "a line")[::2] == (1, "a line\n")
    assert zygote.run("kills", int(signal.SIGTERM))[0] == -signal.SIGTERM
    assert zygote.run("kills", int(signal.SIGKILL))[0] == -signal.SIGKILL
    assert zygote.run("warns") == (0, "", "WARNING:root:hot\n")
    code, _, error = zygote.run("raises")
    assert code == 1
    assert error.endswith("ValueError: no way\n")


def test_what_may_be_needed_later_is_imported_between_commands(
    start_zygote: Callable[..., RunningZygote],
    tmp_path: Path,
    wait_until: Callable[..., None],
) -> None:
    """Not while a command runs, which needs the cores."""
    imported, go_on = tmp_path / "imported", tmp_path / "go_on"
    (tmp_path / "late.py").write_text(f"open({str(imported)!r}, 'w')")
    zygote = start_zygote("later=late")
    client = zygote.start("waits", go_on)
    wait_until(go_on.with_suffix(".pid").exists)
    before = imported.exists()  # the machine may have been busy for longer than the quiet time
    time.sleep(3)
    assert imported.exists() == before
    go_on.touch()
    assert client.wait(60) == 5
    wait_until(imported.exists)


def test_a_child_is_what_the_process_would_have_been(
    start_zygote: Callable[..., RunningZygote], tmp_path: Path
) -> None:
    zygote = start_zygote()

    def prepare() -> None:
        os.umask(0o027)
        os.nice(3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))

    (tmp_path / "cwd").mkdir()
    told = []
    for name in ("first", "second"):
        environment = {**zygote.environment, "NAME": name}
        del environment["HOME"]
        code, out, _ = zygote.run(
            "tells",
            tmp_path / name,
            cwd=tmp_path / "cwd",
            env=environment,
            preexec_fn=prepare,
        )
        assert (code, out) == (0, "told\n")
        told.append(json.loads((tmp_path / name).read_text()))
        assert told[-1]["environment"] == environment
        assert told[-1]["cwd"] == str(tmp_path / "cwd")
        assert told[-1]["name"] == "x\n"  # the title that it asked for
        assert told[-1]["umask"] == 0o027
        assert told[-1]["nice"] == os.getpriority(os.PRIO_PROCESS, 0) + 3
        assert told[-1]["files"] == [100, 200]
        assert told[-1]["stdin"] == "typed"
        assert told[-1]["open"] <= 6  # the standard streams, the answer, and the list itself
    assert told[0]["random"] != told[1]["random"]
    assert told[0]["numpy"] != told[1]["numpy"]


def test_folders_of_pythonpath_can_be_added(
    start_zygote: Callable[..., RunningZygote], tmp_path: Path
) -> None:
    zygote = start_zygote()
    more = tmp_path / "more"
    more.mkdir()
    environment = dict(zygote.environment)
    environment["PYTHONPATH"] += f":{more}"
    assert zygote.run("tells", tmp_path / "t", env=environment)[0] == 0
    assert str(more) in json.loads((tmp_path / "t").read_text())["path"]
    # But not one that has another version of what the zygote has imported.
    (more / "runpy.py").touch()
    said = zygote.run("ends", 0, env=environment)
    assert said == (1, "", "PYTHONPATH has another runpy\n")


def test_signals_are_passed_on(start_zygote: Callable[..., RunningZygote], tmp_path: Path) -> None:
    zygote = start_zygote()
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)):
        client = zygote.start("waits", tmp_path / "end")
        _read_pid(tmp_path)
        client.send_signal(number)
        assert client.wait(60) == code


def test_the_child_of_a_killed_process_is_killed(
    start_zygote: Callable[..., RunningZygote], tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    client = start_zygote().start("waits", tmp_path / "end")
    child = _read_pid(tmp_path)
    client.kill()
    client.wait()
    wait_until(lambda: not Path(f"/proc/{child}").exists())


def test_a_child_outlives_its_zygote(
    start_zygote: Callable[..., RunningZygote], tmp_path: Path
) -> None:
    zygote = start_zygote()
    client = zygote.start("waits", tmp_path / "end")
    _read_pid(tmp_path)
    zygote.process.kill()
    zygote.process.wait()
    (tmp_path / "end").touch()
    assert client.wait(60) == 5
    assert "does not answer" in zygote.run("ends", 0)[2]


def test_a_process_with_threads_is_not_forked(
    start_zygote: Callable[..., RunningZygote],
) -> None:
    assert start_zygote("thread").run("ends", 0)[2].startswith("it has threads: python")


def test_a_client_that_says_nothing_delays_nobody(
    start_zygote: Callable[..., RunningZygote],
) -> None:
    zygote = start_zygote()
    began_s = time.monotonic()
    with connect(zygote.socket):
        assert zygote.run("ends", 0)[0] == 0
    assert time.monotonic() - began_s < 10  # the time after which a read would be given up


def _read_pid(folder: Path) -> int:
    file = folder / "end.pid"
    while not file.exists() or not file.read_text():
        time.sleep(0.01)
    pid = int(file.read_text())
    file.unlink()
    return pid
