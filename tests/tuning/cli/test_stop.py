"""`heliostat stop`: of a run, a sweep or a trial on this machine, else of a job."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.base.config import write_yaml
from cluster.connection import job_server_client
from heliostat.main import main
from trainers.run_folder import SPEC, TRIALS, WHOLE, locked, stop_requests
from tuning.cli import stop
from tuning.trials.journal import Journal
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, LAST_RESULT_FILE

Wait = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep whose trial 7 runs, 6 has ended and 5 has failed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(stop, "POLL_S", 0.01)
    folder = tmp_path / "runs" / "s"
    folder.mkdir(parents=True)
    write_yaml({}, folder / SPEC)
    journal = Journal(folder / JOURNAL_FILE)
    for number in range(8):
        journal.record_suggestion(number, {"optimizer.lr": 0.1})
        (folder / TRIALS / f"{number:04d}").mkdir(parents=True)
    (folder / TRIALS / "0006" / ENDED_FILE).write_text("{}")
    (folder / TRIALS / "0005" / FAILED_FILE).write_text("ValueError")
    return folder


@pytest.fixture
def running(folder: Path, wait_until: Wait) -> Iterator[list[set[str]]]:
    """A process that works on the sweep, and obeys; what it was asked for."""
    seen: list[set[str]] = []
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        with locked(folder):
            begun.set()
            wait_until(lambda: over.is_set() or stop_requests(folder))
            seen.append(stop_requests(folder))
            if "0007" in seen[0]:
                last = {"epoch": 2.5, "val/loss": 0.5}
                (folder / TRIALS / "0007" / LAST_RESULT_FILE).write_text(json.dumps(last))
                (folder / TRIALS / "0007" / ENDED_FILE).write_text("{}")
                over.wait()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    yield seen
    over.set()
    thread.join()


@pytest.mark.parametrize("name", ["s", "runs/s"])
def test_a_sweep_is_asked_to_end_and_waited_for(
    name: str, running: list[set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", name]) == 0
    assert running == [{WHOLE}]
    assert capsys.readouterr().out.splitlines() == [
        "s: saving",
        "s: stopped",
        "  resume it: heliostat sweep --resume runs/s",
    ]


@pytest.mark.parametrize("name", ["s/0007", "s/7", "runs/s/0007", "runs/s/trials/0007"])
def test_a_trial_is_asked_to_end_and_the_sweep_is_not(
    name: str, running: list[set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", name]) == 0
    assert running == [{"0007"}]
    assert capsys.readouterr().out.splitlines() == [
        "s/0007: ends at its next evaluation",
        "s/0007: ended after 2.5 epochs",
    ]


def test_trials_that_have_ended_or_not_begun(
    running: list[set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stop", "s/0006"]) == 0
    assert main(["stop", "s/0005"]) == 0
    assert capsys.readouterr().out == "s/0006: had ended\ns/0005: had ended\n"
    assert main(["stop", "s/0008"]) == 2
    assert capsys.readouterr().err == "s/0008: no such trial has begun\n"


def test_what_does_not_run_is_said_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")  # where no job server listens
    assert main(["stop", "s/0007"]) == 2
    assert capsys.readouterr().err == "s/0007: is not running\n"
    assert main(["stop", "s/0007", "--address", "http://127.0.0.1:9"]) == 2
    line = "s/0007: a trial is stopped on the machine with its sweep's folder\n"
    assert capsys.readouterr().err == line
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(job_server_client, "LOCAL_DASHBOARD_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    assert [main(["stop", name]) for name in ("s", "other")] == [2, 2]
    said = capsys.readouterr().err.splitlines()
    assert said == ["s: is not running", "other: no run, sweep or job of this name here"]
    assert time.monotonic() - began < 30, "only a job server that is there is asked for a minute"
    assert stop_requests(folder) == set()
