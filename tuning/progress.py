"""The progress of a running sweep in the terminal."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.base.terminal import JobProgress
from cluster.cost.budget import usd_text
from cluster.cost.energy_meter import joules_text
from cluster.cost.ledger import CostTotals
from tuning.trials.budget import find_open_budget
from tuning.trials.journal import Journal
from tuning.trials.ranking import is_ranked, loss, selected, selected_value, violation
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, Sweep, last_result

MIN_LINE_INTERVAL_S = 1.0
"""Seconds between two lines where the output is no terminal, at least."""
END_STATUSES = {"done": "complete", "stop": "stopped", "error": "failed"}
"""Event -> status of the trial after it."""


class SweepProgress:
    """A live table in a terminal; elsewhere a line per event, and at most one per second."""

    def __init__(
        self, console: Console, sweep: Sweep, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._sweep, self._clock = console, sweep, clock
        self._started_s = clock()
        self._lock = threading.RLock()
        """Guards all below: the live table is drawn by a thread of its own."""
        self._running: dict[int, float] = {}
        """Running trial -> its epochs so far."""
        self._ended: dict[int, str] = {}
        """Ended trial -> its status."""
        self._epochs, self._timed = 0.0, 0
        """Epochs and number of the trials that ended since this command started."""
        self._values = _earlier_values(sweep)
        """Trial -> the metric at the evaluation that counts, which the leaderboard compares too."""
        self._totals: CostTotals | None = None
        self._events: list[str] = []
        self._line_s = -MIN_LINE_INTERVAL_S
        self._all_ended = {  # those that failed run again
            int(path.parent.name) for path in sweep.folder.glob(f"trials/*/{ENDED_FILE}")
        }
        """Trials that ended, in earlier commands too."""
        self._live = Live(
            get_renderable=self.table,
            console=console,
            refresh_per_second=2,
            redirect_stdout=False,  # other output goes to the run's log
            redirect_stderr=False,
        )
        self._job_progress = JobProgress(console)

    def __enter__(self) -> "SweepProgress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._write(self._clock() + MIN_LINE_INTERVAL_S)

    def on_trial_event(self, event: str, trial: int, result: Mapping[str, Any]) -> None:
        """A `tuning.tuner.TrialCallback`."""
        with self._lock:
            self._record(event, trial, result)
            self._write(self._clock())
            ended = len(self._all_ended)
            self._job_progress.report(lambda: f"{ended} trials ended  {self._summary()}")

    def _record(self, event: str, trial: int, result: Mapping[str, Any]) -> None:
        value = selected_value(self._sweep.spec, result)
        if value is not None:
            self._values[trial] = value
        spec = self._sweep.spec
        if event == "error" or violation(spec, selected(spec, result)) > 0:
            self._values.pop(trial, None)
        if event in END_STATUSES:
            self._running.pop(trial, None)
            if trial not in self._ended:
                self._epochs += float(result.get("epoch", 0.0))
                self._timed += 1
            self._all_ended.add(trial)
            self._ended[trial] = END_STATUSES[event]
            self._events.append(f"{trial:04d} {event}")
        else:
            self._running[trial] = float(result.get("epoch", 0.0))

    def _write(self, now_s: float) -> None:
        """Print the events since the last line, if that was long enough ago."""
        if (
            self._console.is_terminal
            or not self._events
            or now_s < self._line_s + MIN_LINE_INTERVAL_S
        ):
            return
        many = "s" if len(self._events) > 1 else ""
        self._console.print(f"trial{many} {', '.join(self._events)}  {self._summary()}")
        self._events, self._line_s = [], now_s

    def remaining_s(self) -> float | None:
        """Seconds until all trials have ended, at the pace of those that did; None before that."""
        with self._lock:
            mean = self._epochs / self._timed if self._timed else 0.0
            if not mean:
                return None
            running = sum(min(0.9, epoch / mean) for epoch in self._running.values())
            done = self._timed + running
            left = self._sweep.spec.planned_trials - len(self._all_ended) - running
        return (self._clock() - self._started_s) / done * max(0.0, left)

    def _spent_text(self) -> str:
        budget = find_open_budget(self._sweep.key)
        if budget is not None:
            self._totals = budget.totals
        totals = self._totals  # the last known ones, after the budget was closed
        usd = totals.usd if totals else None
        joules = totals.energy.joules if totals else None
        parts = [usd_text(usd)] if usd is not None else []
        parts += [joules_text(joules)] if joules is not None else []
        return ", ".join(parts) or "unknown"

    def _best_text(self) -> str:
        """The best value and its trial; empty before the first finite value."""
        spec, values = self._sweep.spec, self._values
        best = min(values, key=lambda trial: (loss(spec, values[trial]), trial), default=None)
        if best is None or not is_ranked(spec, values[best]):
            return ""
        return f"{values[best]:.4f} (trial {best:04d})"

    def _summary(self) -> str:
        best = self._best_text()
        shown = f"  best {self._sweep.spec.metric} {best}" if best else ""
        return f"{len(self._running)} running{shown}"

    def table(self) -> Table:
        """The progress as a table of one row."""
        spent = self._spent_text()
        with self._lock:
            counts = Counter(self._ended.values())
            left_s = self.remaining_s()
            cells = {
                "trials": f"{len(self._all_ended)}/{self._sweep.spec.planned_trials}",
                "running": str(len(self._running)),
                "complete": str(counts["complete"]),
                "stopped": str(counts["stopped"]),
                "failed": str(counts["failed"]),
                f"best {self._sweep.spec.metric}": self._best_text(),
                "time": _clock_text(self._clock() - self._started_s),
                "left": f"about {_clock_text(left_s)}" if left_s else "",
                "spent": spent,
            }
        table = Table(*cells, box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_row(*cells.values())
        return table


def _earlier_values(sweep: Sweep) -> dict[int, float]:
    """Trial -> its value, for the trials of before an interruption that did not fail."""
    values: dict[int, float] = {}
    for number in Journal(sweep.folder / JOURNAL_FILE).parameters:
        folder = sweep.trial_folder(number)
        counts = selected(sweep.spec, last_result(folder))
        value = counts.get(sweep.spec.metric)
        failed = (folder / FAILED_FILE).exists()
        if value is not None and not failed and not violation(sweep.spec, counts):
            values[number] = value
    return values


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
