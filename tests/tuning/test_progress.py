"""The progress of a sweep in the terminal and in a log."""

import contextlib
import io
import json
import math
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tuning.progress import SweepProgress
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal
from tuning.trials.trial import Sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """A sweep of eight trials, one of which ended before this command started."""
    parameters = {"optimizer.lr": {"uniform": (0, 1)}}
    spec = {"parameters": parameters, "metric": "val/accuracy", "mode": "max", "trials": 8}
    (tmp_path / "trials" / "0000").mkdir(parents=True)
    (tmp_path / "trials" / "0000" / "ended.json").write_text("{}")
    return Sweep({}, SweepSpec.model_validate(spec), tmp_path, tmp_path)


def test_a_log_has_a_line_per_event_and_at_most_one_per_second(sweep: Sweep) -> None:
    now, written = 0.0, io.StringIO()
    console = Console(file=written, width=200)
    with SweepProgress(console, sweep, lambda: now) as progress:
        progress.on_trial_event("start", 1, {})
        progress.on_trial_event("result", 1, {"val/accuracy": 0.5, "epoch": 1})
        assert written.getvalue() == ""
        progress.on_trial_event("stop", 1, {"val/accuracy": 0.5, "epoch": 1})
        progress.on_trial_event("error", 2, {})
        now = 0.9
        progress.on_trial_event("done", 3, {"val/accuracy": 0.75, "epoch": 4})
        now = 1.1
        progress.on_trial_event("start", 4, {})
        progress.on_trial_event("done", 4, {})
    assert written.getvalue().splitlines() == [
        "trial 0001 stop  0 running  best val/accuracy 0.5000 (trial 0001)",
        "trials 0002 error, 0003 done  1 running  best val/accuracy 0.7500 (trial 0003)",
        "trial 0004 done  0 running  best val/accuracy 0.7500 (trial 0003)",
    ]


def test_the_table_of_a_terminal(sweep: Sweep) -> None:
    now = 100.0
    progress = SweepProgress(Console(file=io.StringIO()), sweep, lambda: now)
    assert progress.remaining_s() is None
    progress.on_trial_event("stop", 1, {"val/accuracy": 0.5, "epoch": 2})
    progress.on_trial_event("done", 2, {"val/accuracy": 0.25, "epoch": 6})
    progress.on_trial_event("result", 3, {"val/accuracy": 0.75, "epoch": 2})
    now = 150.0
    # 2.5 trials took 50 s; of eight one had ended before, and 4.5 are left.
    assert progress.remaining_s() == pytest.approx(90)
    screen = Console(file=io.StringIO(), width=200)
    screen.print(progress.table())
    heads, row = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert heads.split() == [
        *("trials", "running", "complete", "stopped", "failed"),
        *("best", "val/accuracy", "time", "left", "spent"),
    ]
    assert row.split() == [
        *("3/8", "1", "1", "1", "0", "0.7500", "(trial", "0003)"),
        *("0:50", "about", "1:30", "unknown"),
    ]


def test_best_is_the_first_of_the_leaderboard(sweep: Sweep) -> None:
    """The leaderboard compares the last evaluations of trials that did not fail."""
    progress = SweepProgress(Console(file=io.StringIO()), sweep)

    def after(event: str, trial: int, value: float) -> str:
        progress.on_trial_event(event, trial, {"val/accuracy": value})
        return str(next(iter(progress.table().columns[5].cells)))

    assert after("result", 1, math.nan) == ""
    assert after("result", 1, 0.5) == "0.5000 (trial 0001)"
    assert after("result", 2, 0.75) == "0.7500 (trial 0002)"
    assert after("result", 2, 0.625) == "0.6250 (trial 0002)"
    assert after("error", 2, 0.625) == "0.5000 (trial 0001)"
    assert after("result", 3, -math.inf) == "0.5000 (trial 0001)"


def test_best_is_by_the_evaluation_that_counts_also_of_trials_of_before(sweep: Sweep) -> None:
    """Trial 0 ended before this command started; trial 1 got worse after its best evaluation."""
    spec = sweep.spec.model_copy(update={"select": "best"})
    best = {"best/val/accuracy": 0.75, "best/step": 10, "best/epoch": 1.0}
    last = {"val/accuracy": 0.25, "step": 20, "epoch": 2.0, **best}
    (sweep.folder / "trials" / "0000" / "last.json").write_text(json.dumps(last))
    Journal(sweep.folder / "journal.jsonl").record_suggestion(0, {"optimizer.lr": 0.5})
    progress = SweepProgress(Console(file=io.StringIO()), replace(sweep, spec=spec))
    assert progress._best_text() == "0.7500 (trial 0000)"
    progress.on_trial_event("result", 1, {**last, "best/val/accuracy": 0.875})
    assert progress._best_text() == "0.8750 (trial 0001)"


def test_the_live_table_is_drawn_while_events_come(sweep: Sweep) -> None:
    """By a thread of its own, which would end with `dictionary changed size during iteration`."""
    progress = SweepProgress(Console(file=io.StringIO(), force_terminal=True), sweep)
    errors: list[Exception] = []
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            try:
                progress.table()
            except Exception as error:
                errors.append(error)
                return

    with more_switches_of_threads():
        thread = threading.Thread(target=draw)
        thread.start()
        for trial in range(2000):
            progress.on_trial_event("result", trial, {"val/accuracy": trial, "epoch": 1})
            progress.on_trial_event("done", trial // 2, {"val/accuracy": trial, "epoch": 1})
        done.set()
        thread.join()
    assert errors == []
    assert [*progress.table().columns[0].cells] == ["1000/8"]


@contextlib.contextmanager
def more_switches_of_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
