"""Stalls as the driver sees them: which worker caused one, and which are new."""

import subprocess
import sys
import time
from pathlib import Path

from trainers.engine.heartbeat import stall_watchdog
from trainers.engine.stall_files import Stall
from trainers.runs.stalls import StallWatch, last_stall, likely_culprit

HANGS = """
import sys, time
from pathlib import Path
from trainers.engine.heartbeat import heartbeat, stall_watchdog
with stall_watchdog(Path(sys.argv[1]), 1, 2, 0.5):
    heartbeat(0)
    heartbeat(1)
    time.sleep(60)
"""


def hang(folder: Path) -> None:
    """Worker 1 of 2 hangs in its second step, and is ended by its watchdog."""
    assert subprocess.run([sys.executable, "-c", HANGS, str(folder)]).returncode == 1


def test_the_worker_that_the_others_waited_for_is_the_culprit() -> None:
    path = Path("x")
    waits, hangs = Stall(0, 5, 1.0, True, path), Stall(1, 5, 1.0, False, path)
    assert likely_culprit([waits, hangs]) is hangs
    assert likely_culprit([waits]) is waits
    assert likely_culprit([]) is None


def test_a_stall_is_reported_once_and_files_of_other_workers_are_removed(tmp_path: Path) -> None:
    hang(tmp_path)
    seen_before = StallWatch(tmp_path)
    watch = StallWatch(tmp_path / "other")
    hang(tmp_path / "other")
    with stall_watchdog(tmp_path / "other", 0, 2, 60):
        reported = []
        while not reported:
            reported = [stall for stall in (watch.poll(),) if stall]
            time.sleep(0.1)
        assert [stall.rank for stall in reported] == [1]
        assert watch.poll() is seen_before.poll() is None
    (tmp_path / "other" / "worker-3-1.txt").write_text(" " * 256)  # of a killed worker
    watch.remove_empty()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["worker-1-1.txt"]


def test_only_the_newest_start_of_a_worker_counts(tmp_path: Path) -> None:
    hang(tmp_path)
    assert last_stall(tmp_path).step == 2
    assert last_stall(tmp_path, {1: "lost"}).step == 2
    assert last_stall(tmp_path, {0: "lost"}) is None
    with stall_watchdog(tmp_path, 1, 2, 60):  # restarted, and then ended for another reason
        assert last_stall(tmp_path) is None
