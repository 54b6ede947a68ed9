"""One trial, as Ray Tune runs it: the training loop in Tune's own worker, or Ray Train inside.

A trial's identity is its number in the sweep's journal, and all that it does is in a folder of
that number. So it does not matter whether Tune remembers it: a trial that starts again goes on
from its newest checkpoint, and one that had ended says so again.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.base.errors import TrainingError
from cluster.base.files import write_atomic
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.data.dataset import rows
from trainers.data.remote import here
from trainers.devices import local_device
from trainers.engine.heartbeat import watched
from trainers.engine.loop import train
from trainers.engine.stall_files import STALLS
from trainers.run_folder import CHECKPOINTS, TRIALS
from trainers.runs.metering import TRACE, WorkerMeter
from trainers.runs.ray_train import Job, explain, run_workers
from trainers.runs.visibility import check_sweep_here
from trainers.spec import RunSpec, resolve
from trainers.tracking.operation_log import Row
from trainers.tracking.reporter import TrackerReporter
from trainers.worker import Worker
from tuning.trials.space import SweepSpec, trial_data

JOURNAL = "journal.jsonl"
LAST, ENDED, FAILED = "last.json", "ended.json", "failed.json"


@dataclass(frozen=True)
class Sweep:
    """What all trials of a sweep share."""

    data: Mapping[str, Any]
    """The sweep's whole spec as plain data."""
    spec: SweepSpec
    dataset: Path
    folder: Path
    power_trace: str | None = field(default_factory=lambda: os.environ.get(TRACE))
    """A recorded trace of power in place of what the trials' devices say."""

    @property
    def key(self) -> str:
        return self.folder.name

    def trial_folder(self, number: int) -> Path:
        return self.folder / TRIALS / f"{number:04d}"

    def trial_key(self, number: int) -> str:
        return f"{self.key}/{number:04d}"

    def trial_spec(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The plain spec of the trial with these values."""
        return trial_data(self.data, {path: parameters[path] for path in self.spec.parameters})

    def saved_spec(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """As it is run: saved at each evaluation.

        So what was reported can be had as a checkpoint wherever Tune ends the trial.
        """
        data = self.trial_spec(parameters)
        saves = data["checkpoint"]
        best = {"keep_best": max(1, saves["keep_best"]), "metric": self.spec.metric}
        return {**data, "checkpoint": {**saves, **best, "mode": self.spec.mode}}


def run_trial(config: dict[str, Any], sweep: Sweep, tracker: Any) -> None:
    """Ray Tune's trainable. Reports every evaluation; Tune may end it at any report."""
    from ray import tune

    number = config["trial"]
    folder = sweep.trial_folder(number)
    check_sweep_here(sweep.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FAILED).exists():  # Ray tries again what a second attempt would not change
        raise TrainingError((folder / FAILED).read_text())
    last = json.loads((folder / LAST).read_text()) if (folder / LAST).exists() else {}
    exploited = tune.get_checkpoint()
    if exploited is not None:
        with exploited.as_directory() as source:
            _adopt(Path(source), folder / CHECKPOINTS)
    elif last and ((folder / ENDED).exists() or last["complete"]):
        tune.report(last)
        return
    data = sweep.saved_spec(config)
    try:
        spec, workload = resolve(data, RunSpec)
        dataset = here(sweep.dataset, spec)
        progress = Progress(sweep, spec, folder)
        if spec.scale.max_workers > 1:
            job = Job(data, sweep.dataset, folder, sweep.trial_key(number), threads=1)
            run_workers(job, tracker, progress.watch, threading.Event())
        else:
            set_threads(sweep)
            worker = Worker(hardware=local_device(spec.scale.accelerator))
            reporter = _TrialReporter(tracker, sweep.trial_key(number), progress)
            key = sweep.trial_key(number)
            with (
                WorkerMeter(tracker, key, worker.hardware, trace=sweep.power_trace),
                watched(folder / STALLS, 0, 1, spec.train.stall_timeout_s),
            ):
                train(spec, workload, dataset, folder, reporter, worker)
    except Exception as error:
        write_atomic(folder / FAILED, explain(error))
        raise TrainingError(explain(error)) from error


def set_threads(sweep: Sweep) -> None:
    """Have PyTorch use as many threads as the sweep's trials have CPUs."""
    import torch

    torch.set_num_threads(max(1, int(sweep.spec.resources.cpu)))


def _adopt(source: Path, checkpoints: Path) -> None:
    """Make another trial's checkpoint the only one of this trial."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    Checkpoints(checkpoints).adopt(source)


class Progress:
    """What Ray Tune is told of a trial's evaluations."""

    def __init__(self, sweep: Sweep, spec: RunSpec, folder: Path) -> None:
        samples = rows(sweep.dataset, "train")
        self._steps = spec.train.total_steps(samples)
        self._epoch_steps = samples / spec.train.global_batch
        self._metric = sweep.spec.metric
        self._folder, self._exploits = folder, sweep.spec.scheduler.name == "pbt"
        self._seen: dict[int, dict[str, float]] = {}
        last = json.loads((folder / LAST).read_text()) if (folder / LAST).exists() else {}
        self._before_s, self._start_s = last.get("device_s", 0.0), time.monotonic()

    def result(self, metrics: Mapping[str, float], step: int) -> dict[str, Any]:
        """An evaluation after `step` steps, as Tune and the leaderboard take it."""
        if self._metric not in metrics:
            raise TrainingError(
                f"sweep.metric: the workload has no {self._metric} (it has {', '.join(metrics)})"
            )
        return {
            **metrics,
            "step": step,
            "epoch": step / self._epoch_steps,
            "complete": step == self._steps,
            "device_s": self._before_s + time.monotonic() - self._start_s,
        }

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Blocks until Tune has decided; SystemExit is Tune's way to end a trial."""
        from ray import tune

        result = self.result(metrics, step)
        write_atomic(self._folder / LAST, json.dumps(result))
        newest = None
        if self._exploits:  # looking for it reads all of it
            newest = Checkpoints(self._folder / CHECKPOINTS).newest()
        tune.report(result, checkpoint=newest and tune.Checkpoint.from_directory(newest))

    def watch(self, step: int, rows: list[Row], lines: list[str]) -> None:
        """Report the evaluations among the metrics that the workers sent; log their lines."""
        for line in lines:
            print(line, flush=True)
        for name, value, row_step, _ in rows:
            if name.startswith("val/"):
                self._seen.setdefault(row_step, {})[name] = value
        for evaluated in sorted(self._seen):
            self.report(self._seen.pop(evaluated), evaluated)


class _TrialReporter(TrackerReporter):
    """Tells the tracker everything, and Ray Tune of each evaluation."""

    def __init__(self, tracker: Any, run: str, progress: Progress) -> None:
        super().__init__(tracker, run)
        self._progress = progress

    def evaluated(self, metrics: Mapping[str, float], step: int, checkpoints: Checkpoints) -> None:
        checkpoints.wait()
        self.flush()
        self._progress.report(metrics, step)
