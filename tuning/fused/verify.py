"""Trains some fused trials again, each by itself, and compares the metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from trainers.data.remote import local_dataset
from trainers.devices import local_device
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.run_folder import TRACKING
from trainers.spec import RunSpec, resolve
from trainers.tracking.operation_log import read_metrics
from trainers.worker import Worker
from tuning.trials.best_spec import best_spec_data
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import Leaderboard, TrialResult
from tuning.trials.trial import JOURNAL_FILE, Sweep, set_threads

VERIFIED_TRIALS = 3
"""The best, the middle and the worst of a leaderboard."""

Series = dict[tuple[str, int], float]
"""Metric and step -> value."""


@dataclass(frozen=True)
class Deviation:
    """The largest difference between a trial's metrics in a slot and alone."""

    trial: int
    value: float
    metric: str
    step: int
    compared: int
    """How many values were compared."""

    def __str__(self) -> str:
        return (
            f"trial {self.trial:04d} alone: {self.compared} values, largest deviation "
            f"{self.value:.2g} ({self.metric} at step {self.step})"
        )


def trials_to_verify(board: Leaderboard) -> list[TrialResult]:
    """The trials to train again: spread evenly over the leaderboard."""
    last = len(board.results) - 1
    places = sorted(
        {round(last * share / (VERIFIED_TRIALS - 1)) for share in range(VERIFIED_TRIALS)}
    )
    return [board.results[place] for place in places] if board.results else []


def measure_deviation(sweep: Sweep, trial: TrialResult) -> Deviation:
    """Train a trial alone up to the step that it reached, and compare losses and evaluations.

    To be called in a process with the resources of a trial. Nothing is tracked or kept.
    """
    set_threads(sweep)
    parts = Journal(sweep.folder / JOURNAL_FILE).schedule(trial.number, trial.changes)
    assert parts is not None, "only an earlier release has not kept it"
    spec, workload = resolve(best_spec_data(sweep, parts), RunSpec)
    alone = _Recorder(trial.step)
    worker = Worker(hardware=local_device(spec.scale.accelerator))
    # Its checkpoints are read by nobody.
    saves = spec.checkpoint.model_copy(update={"every_steps": "auto", "keep_best": 0, "uri": None})
    spec = spec.model_copy(update={"checkpoint": saves})
    dataset = local_dataset(sweep.dataset_of(spec), spec)
    with TemporaryDirectory() as folder:
        train(spec, workload, dataset, Path(folder), alone, worker)
    points = read_metrics(sweep.folder / TRACKING, sweep.trial_key(trial.number))
    fused = {(name, step): value for name, value, step, _ in points}
    both = [
        (abs(value - fused[metric, step]), (metric, step))
        for (metric, step), value in alone.series.items()
        if (metric, step) in fused and step > parts[-1][0]  # before, it was another trial's state
    ]
    value, (metric, step) = max(both)
    return Deviation(trial.number, value, metric, step, len(both))


class _Recorder(NullReporter):
    """Keeps losses and evaluations in memory, and stops the run after a number of steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.series: Series = {}
        self._ended = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            if name == "train/loss" or name.startswith(("val/", "test/")):
                self.series[name, step] = value

    def on_step_end(self, step: int) -> None:
        self._ended = step + 1 >= self._steps

    def should_stop(self) -> bool:
        return self._ended
