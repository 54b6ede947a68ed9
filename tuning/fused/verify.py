"""Whether fused trials gave what they give alone: some of them trained again, by themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from trainers.devices import local_device
from trainers.engine.loop import train
from trainers.engine.reporter import SilentReporter
from trainers.run_folder import TRACK
from trainers.spec import RunSpec, resolve
from trainers.tracking.operation_log import logged
from trainers.worker import Worker
from tuning.trials.leaderboard import Leaderboard, Standing
from tuning.trials.trial import Sweep, set_threads

TRIALS = 3
"""The best, the middle and the worst of a leaderboard."""

Series = dict[tuple[str, int], float]
"""Metric and step -> value."""


@dataclass(frozen=True)
class Deviation:
    """The largest difference between what a trial reported in a slot and alone."""

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


def chosen(board: Leaderboard) -> list[Standing]:
    """The trials to train alone."""
    last = len(board.standings) - 1
    places = sorted({round(last * share / (TRIALS - 1)) for share in range(TRIALS)})
    return [board.standings[place] for place in places] if board.standings else []


def deviation(sweep: Sweep, standing: Standing) -> Deviation:
    """Train a trial alone as far as it came in its slot, and compare losses and evaluations.

    Called in a process that has what the sweep's trials have. Untracked, and without a trace.
    """
    set_threads(sweep)
    spec, workload = resolve(sweep.trial_spec(standing.parameters), RunSpec)
    alone = _Recorder(standing.step)
    worker = Worker(hardware=local_device(spec.scale.accelerator))
    with TemporaryDirectory() as folder:
        train(spec, workload, sweep.dataset, Path(folder), alone, worker)
    told = logged(sweep.folder / TRACK, sweep.trial_key(standing.number))
    fused = {(name, step): value for name, value, step, _ in told}
    both = [(abs(value - fused[at]), at) for at, value in alone.series.items() if at in fused]
    value, (metric, step) = max(both)
    return Deviation(standing.number, value, metric, step, len(both))


class _Recorder(SilentReporter):
    """Keeps losses and evaluations in memory, and stops the run after so many steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.series: Series = {}
        self._over = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            if name == "train/loss" or name.startswith(("val/", "test/")):
                self.series[name, step] = value

    def tick(self, step: int) -> None:
        self._over = step + 1 >= self._steps

    def should_stop(self) -> bool:
        return self._over
