"""Processes that hang: when they are ended, and what is left of them."""

import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from trainers.engine.heartbeat import stall_watchdog
from trainers.engine.stall_files import Stall, read_stalls
from trainers.runs.stalls import StallWatch, last_stall, likely_culprit

HANGS = {
    "sleeps": "time.sleep(60)",
    "locks": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "holds": "ctypes.PyDLL(None).sleep(60)  # and the interpreter with it",
}


def run(folder: Path, body: str, timeout_s: float = 0.5) -> tuple[int, float]:
    """A process that does `body` as worker 1 of 2; its exit code, and its seconds in there."""
    code = f"""
import ctypes, threading, time
from pathlib import Path
from trainers.engine.heartbeat import heartbeat, stall_watchdog
def sleeps(): {HANGS["sleeps"]}
def locks(): {HANGS["locks"]}
def holds(): {HANGS["holds"]}
print(time.time(), flush=True)
with stall_watchdog(Path({str(folder)!r}), 1, 2, {timeout_s}):
{textwrap.indent(textwrap.dedent(body), "    ")}
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return done.returncode, time.time() - float(done.stdout)


@pytest.mark.parametrize("hang", list(HANGS))
def test_what_hangs_is_ended_and_named(hang: str, tmp_path: Path) -> None:
    code, _ = run(tmp_path, f"alive(0); alive(1); alive(2); {hang}()")
    assert code == 1
    [stall] = read_stalls(tmp_path)
    assert (stall.rank, stall.step, stall.timeout_s, stall.waiting) == (1, 3, 0.5, False)
    assert str(stall) == f"worker 1 made no step for 0.5 s at step 3; its stack: {stall.path}"
    text = stall.path.read_text()
    assert f"in {hang}\n" in text
    assert re.match(r"step +3, worker 1 of 2, process \d+ on \S+, last seen at \d{4}-", text)


def test_the_start_may_take_three_times_as_long(tmp_path: Path) -> None:
    code, took_s = run(tmp_path, "time.sleep(1.0); alive(0); sleeps()")
    assert code == 1
    assert took_s > 1.0 + 1.5
    assert read_stalls(tmp_path)[0].timeout_s == 1.5
    code, _ = run(tmp_path, "sleeps()")
    assert code == 1
    assert str(read_stalls(tmp_path)[1]).startswith(
        "worker 1 made no step for 1.5 s before its first"
    )


def test_signs_of_life_within_a_step_are_enough_and_nothing_is_left(tmp_path: Path) -> None:
    body = """
    alive(0)
    alive(1)
    for _ in range(20):
        alive()  # as an evaluation does
        time.sleep(0.1)
    """
    assert run(tmp_path, body, timeout_s=1)[0] == 0
    assert not list(tmp_path.iterdir())


def test_workers_that_wait_for_one_another_end_at_the_same_time(tmp_path: Path) -> None:
    """However far apart they began: each has written its stack before the first is missed."""
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


def test_the_one_that_the_others_waited_for_is_blamed() -> None:
    path = Path("x")
    waits, hangs = Stall(0, 5, 1.0, True, path), Stall(1, 5, 1.0, False, path)
    assert likely_culprit([waits, hangs]) is hangs
    assert likely_culprit([waits]) is waits
    assert likely_culprit([]) is None


def test_a_stall_is_told_once_and_leftovers_are_removed(tmp_path: Path) -> None:
    run(tmp_path, "alive(0); alive(1); sleeps()")
    seen_before = StallWatch(tmp_path)
    watch = StallWatch(tmp_path / "other")
    run(tmp_path / "other", "alive(0); alive(1); sleeps()")
    with stall_watchdog(tmp_path / "other", 0, 2, 60):
        told = []
        while not told:
            told = [stall for stall in (watch.poll(),) if stall]
            time.sleep(0.1)
        assert [stall.rank for stall in told] == [1]
        assert watch.poll() is seen_before.poll() is None
    (tmp_path / "other" / "worker-3-1.txt").write_text(" " * 256)  # of a killed worker
    watch.remove_empty()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["worker-1-1.txt"]


def test_only_the_last_start_of_a_worker_counts(tmp_path: Path) -> None:
    run(tmp_path, "alive(0); alive(1); sleeps()")
    assert last_stall(tmp_path).step == 2
    assert last_stall(tmp_path, {1: "lost"}).step == 2
    assert last_stall(tmp_path, {0: "lost"}) is None
    with stall_watchdog(tmp_path, 1, 2, 60):  # it is started again, and then something else ends it
        assert last_stall(tmp_path) is None
