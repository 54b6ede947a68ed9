"""Processes that hang: when they are ended, and which stacks they leave."""

import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from trainers.engine.stall_files import read_stalls

HANGS = {
    "sleeps": "time.sleep(60)",
    "locks": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "holds": "ctypes.PyDLL(None).sleep(60)  # and the interpreter with it",
}


def run_watched(
    folder: Path, body: str, timeout_s: float = 0.5, before: str = ""
) -> tuple[int, float]:
    """Run `body` as worker 1 of 2 in a process, and `before` before it is watched.

    Returns its exit code, and the seconds that it took.
    """
    code = f"""
import ctypes, threading, time
from pathlib import Path
from trainers.engine.heartbeat import heartbeat, stall_watchdog
def sleeps(): {HANGS["sleeps"]}
def locks(): {HANGS["locks"]}
def holds(): {HANGS["holds"]}
{before}
print(time.time(), flush=True)
with stall_watchdog(Path({str(folder)!r}), 1, 2, {timeout_s}):
{textwrap.indent(textwrap.dedent(body), "    ")}
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return done.returncode, time.time() - float(done.stdout)


@pytest.mark.parametrize("hang", list(HANGS))
def test_a_process_that_hangs_is_ended_with_its_stack(hang: str, tmp_path: Path) -> None:
    code, _ = run_watched(tmp_path, f"heartbeat(0); heartbeat(1); heartbeat(2); {hang}()")
    assert code == 1
    [stall] = read_stalls(tmp_path)
    assert (stall.rank, stall.step, stall.timeout_s, stall.waiting) == (1, 3, 0.5, False)
    assert str(stall) == f"worker 1 made no step for 0.5 s at step 3; its stack: {stall.path}"
    text = stall.path.read_text()
    assert f"in {hang}\n" in text
    assert re.match(r"step +3, worker 1 of 2, process \d+ on \S+, last seen at \d{4}-", text)


def test_the_first_step_may_take_three_times_as_long(tmp_path: Path) -> None:
    code, took_s = run_watched(tmp_path, "time.sleep(1.0); heartbeat(0); sleeps()")
    assert code == 1
    assert took_s > 1.0 + 1.5
    assert read_stalls(tmp_path)[0].timeout_s == 1.5
    code, _ = run_watched(tmp_path, "sleeps()")
    assert code == 1
    assert str(read_stalls(tmp_path)[1]).startswith(
        "worker 1 made no step for 1.5 s before its first"
    )


def test_heartbeats_within_a_step_are_enough_and_no_file_is_left(tmp_path: Path) -> None:
    body = """
    heartbeat(0)
    heartbeat(1)
    for _ in range(20):
        heartbeat()  # as an evaluation does
        time.sleep(0.1)
    """
    assert run_watched(tmp_path, body, timeout_s=1)[0] == 0
    assert not list(tmp_path.iterdir())


def test_workers_that_wait_for_one_another_end_at_the_same_time(tmp_path: Path) -> None:
    """However far apart they began: each has written its stack before the first one is missed."""
    code = f"""
import sys, time
from pathlib import Path
from trainers.engine.heartbeat import heartbeat, stall_watchdog
with stall_watchdog(Path({str(tmp_path)!r}), int(sys.argv[1]), 2, 2.0):
    time.sleep(0.15 * int(sys.argv[1]))
    for step in range(100):
        heartbeat(step)
        if (Path({str(tmp_path)!r}) / "both").exists():
            time.sleep(60)
        time.sleep(0.05)
"""
    both = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in (0, 1)]
    while len(list(tmp_path.glob("worker-*"))) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    (tmp_path / "both").touch()
    assert [process.wait(30) for process in both] == [1, 1]
    ends = [stall.path.stat().st_mtime for stall in read_stalls(tmp_path)]
    assert len(ends) == 2
    assert abs(ends[0] - ends[1]) < 0.25


def test_the_time_of_day_may_be_set_back(tmp_path: Path) -> None:
    """As when a virtual machine resumes, or at the first answer of a time server."""
    body = """
    heartbeat(0)
    heartbeat(1)
    true_time = time.time
    time.time = lambda: true_time() - 3600
    for step in range(2, 22):
        heartbeat(step)
        time.sleep(0.1)
    """
    assert run_watched(tmp_path, body, timeout_s=0.5)[0] == 0


def test_a_jump_ahead_ends_nobody_and_hides_no_stall(tmp_path: Path) -> None:
    body = """
    true_time = time.time
    heartbeat(0)
    heartbeat(1)
    time.time = lambda: true_time() + 3600
    heartbeat(2)
    time.sleep(0.3)
    heartbeat(3)
    (Path({folder!r}) / "alive").touch()
    sleeps()
    """
    code, _ = run_watched(tmp_path, body.format(folder=str(tmp_path)), timeout_s=0.5)
    assert (code, (tmp_path / "alive").exists()) == (1, True)
    assert read_stalls(tmp_path)[0].step == 4


SLOW_STORE = """
import torch
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.spec import CheckpointSpec
from trainers.stores import {store}
def slowly(self, *arguments, quick={store}.{method}):
    time.sleep(4)
    return quick(self, *arguments)
{store}.{method} = slowly
network = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(network.parameters())
folder = Path({folder!r})
checkpoints = Checkpoints(folder / "run" / "checkpoints", CheckpointSpec(uri={uri!r}))
"""
SAVES = """
heartbeat(0)
heartbeat(1)
checkpoints.save(1, network, optimizer)
heartbeat(2)
checkpoints.{waits}
heartbeat(3)
(folder / "done").touch()
"""


@pytest.mark.parametrize(
    ("store", "method", "waits"),
    [
        ("LocalStore", "commit", "wait()"),
        ("RemoteStore", "upload", "save(2, network, optimizer)"),
        *[
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("LocalStore", "commit", "save(2, network, optimizer)"),
                ("RemoteStore", "upload", "wait()"),
            )
        ],
    ],
)
def test_waiting_for_a_save_is_a_sign_of_life(
    store: str, method: str, waits: str, tmp_path: Path
) -> None:
    """Of a worker that makes no step for twice as long as it may."""
    uri = f"file://{tmp_path}/bucket" if store == "RemoteStore" else None
    before = SLOW_STORE.format(store=store, method=method, uri=uri, folder=str(tmp_path))
    body = SAVES.format(waits=waits)
    assert run_watched(tmp_path / "stalls", body, 2.0, before)[0] == 0
    assert (tmp_path / "done").exists()


def test_a_worker_that_hangs_after_a_save_is_ended(tmp_path: Path) -> None:
    """Also where another thread still shows signs of life."""
    before = SLOW_STORE.format(store="LocalStore", method="commit", uri=None, folder=str(tmp_path))
    body = SAVES.format(waits="wait()")
    body += """
def beats():
    while True:
        heartbeat()
        time.sleep(0.05)
threading.Thread(target=beats, daemon=True).start()
sleeps()
"""
    code, _ = run_watched(tmp_path / "stalls", body, 2.0, before)
    assert (code, (tmp_path / "done").exists()) == (1, True)
    assert [stall.step for stall in read_stalls(tmp_path / "stalls")] == [4]


def test_waiting_for_another_workers_upload_is_a_sign_of_life(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.engine.heartbeat import heartbeat, stall_watchdog
from trainers.spec import CheckpointSpec
from trainers.stores import RemoteStore
from trainers.worker import Worker
folder, rank = Path({str(tmp_path)!r}), int(sys.argv[1])
def slowly(self, *arguments, quick=RemoteStore.upload):
    time.sleep(4)
    return quick(self, *arguments)
RemoteStore.upload = slowly
dist.init_process_group("gloo", f"file://{{folder}}/group", rank=rank, world_size=2)
network = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(network.parameters())
spec = CheckpointSpec(uri=f"file://{{folder}}/bucket")
checkpoints = Checkpoints(folder / "run" / "checkpoints", spec, Worker(rank, 2))
checkpoints.save(1, network, optimizer)  # imports what a save needs
checkpoints.wait()
with stall_watchdog(folder / "stalls", rank, 2, 3.0):
    heartbeat(0)
    heartbeat(1)
    checkpoints.save(2, network, optimizer)
    checkpoints.wait()
    heartbeat(2)
"""
    both = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in (0, 1)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert read_stalls(tmp_path / "stalls") == []
    saved = sorted(path.name for path in (tmp_path / "bucket").glob("*/step-*"))
    assert saved == ["step-00000001", "step-00000002"]
