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
from trainers.data.remote import local_dataset
from trainers.data.splits import count_samples
from trainers.devices import local_device
from trainers.engine.heartbeat import stall_watchdog
from trainers.engine.loop import train
from trainers.engine.stall_files import STALLS
from trainers.run_folder import CHECKPOINTS, TRIALS
from trainers.runs.ray_train import WorkerConfig, run_workers
from trainers.runs.visibility import require_sweep_visible
from trainers.runs.worker_errors import format_error
from trainers.runs.worker_meter import POWER_TRACE_ENV_VAR, WorkerMeter
from trainers.spec import RunSpec, resolve
from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.reporter import TrackerReporter
from trainers.worker import Worker
from tuning.trials.space import SweepSpec, trial_spec_data

JOURNAL_FILE = "journal.jsonl"
LAST_RESULT_FILE, ENDED_FILE, FAILED_FILE = "last.json", "ended.json", "failed.json"


@dataclass(frozen=True)
class Sweep:
    """What all trials of a sweep share."""

    spec_data: Mapping[str, Any]
    """The sweep's whole spec as plain data."""
    spec: SweepSpec
    dataset: Path
    folder: Path
    power_trace: str | None = field(default_factory=lambda: os.environ.get(POWER_TRACE_ENV_VAR))
    """A recorded trace of power in place of what the trials' devices say."""

    @property
    def key(self) -> str:
        return self.folder.name

    def trial_folder(self, number: int) -> Path:
        return self.folder / TRIALS / f"{number:04d}"

    def trial_key(self, number: int) -> str:
        return f"{self.key}/{number:04d}"

    def trial_spec_data(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The plain spec of the trial with these values."""
        return trial_spec_data(
            self.spec_data, {path: parameters[path] for path in self.spec.parameters}
        )

    def executed_spec_data(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """As it is run: saved at each evaluation.

        So what was reported can be had as a checkpoint wherever Tune ends the trial.
        """
        data = self.trial_spec_data(parameters)
        saves = data["checkpoint"]
        best = {"keep_best": max(1, saves["keep_best"]), "metric": self.spec.metric}
        return {**data, "checkpoint": {**saves, **best, "mode": self.spec.mode}}


def run_trial(config: dict[str, Any], sweep: Sweep, tracker: Any) -> None:
    """Ray Tune's trainable. Reports every evaluation; Tune may end it at any report."""
    from ray import tune

    number = config["trial"]
    folder = sweep.trial_folder(number)
    require_sweep_visible(sweep.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FAILED_FILE).exists():  # Ray tries again what a second attempt would not change
        raise TrainingError((folder / FAILED_FILE).read_text())
    last = (
        json.loads((folder / LAST_RESULT_FILE).read_text())
        if (folder / LAST_RESULT_FILE).exists()
        else {}
    )
    exploited = tune.get_checkpoint()
    if exploited is not None:
        with exploited.as_directory() as source:
            _import_checkpoint(Path(source), folder / CHECKPOINTS)
    elif last and ((folder / ENDED_FILE).exists() or last["complete"]):
        tune.report(last)
        return
    data = sweep.executed_spec_data(config)
    try:
        spec, workload = resolve(data, RunSpec)
        dataset = local_dataset(sweep.dataset, spec)
        progress = TuneReporter(sweep, spec, folder)
        if spec.scale.max_workers > 1:
            job = WorkerConfig(data, sweep.dataset, folder, sweep.trial_key(number), threads=1)
            run_workers(job, tracker, progress.on_progress, threading.Event())
        else:
            set_threads(sweep)
            worker = Worker(hardware=local_device(spec.scale.accelerator))
            reporter = _TrackerAndTuneReporter(tracker, sweep.trial_key(number), progress)
            key = sweep.trial_key(number)
            with (
                WorkerMeter(tracker, key, worker.hardware, trace=sweep.power_trace),
                stall_watchdog(folder / STALLS, 0, 1, spec.train.stall_timeout_s),
            ):
                train(spec, workload, dataset, folder, reporter, worker)
    except Exception as error:
        write_atomic(folder / FAILED_FILE, format_error(error))
        raise TrainingError(format_error(error)) from error


def set_threads(sweep: Sweep) -> None:
    """Have PyTorch use as many threads as the sweep's trials have CPUs."""
    import torch

    torch.set_num_threads(max(1, int(sweep.spec.resources.cpu)))


def _import_checkpoint(source: Path, checkpoints: Path) -> None:
    """Make another trial's checkpoint the only one of this trial."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    Checkpoints(checkpoints).import_from(source)


class TuneReporter:
    """What Ray Tune is told of a trial's evaluations."""

    def __init__(self, sweep: Sweep, spec: RunSpec, folder: Path) -> None:
        samples = count_samples(sweep.dataset, "train")
        self._steps = spec.train.total_steps(samples)
        self._epoch_steps = samples / spec.train.global_batch
        self._metric = sweep.spec.metric
        self._folder, self._attaches_checkpoints = folder, sweep.spec.scheduler.name == "pbt"
        self._unreported: dict[int, dict[str, float]] = {}
        last = (
            json.loads((folder / LAST_RESULT_FILE).read_text())
            if (folder / LAST_RESULT_FILE).exists()
            else {}
        )
        self._earlier_device_s, self._start_s = last.get("device_s", 0.0), time.monotonic()

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
            "device_s": self._earlier_device_s + time.monotonic() - self._start_s,
        }

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Blocks until Tune has decided; SystemExit is Tune's way to end a trial."""
        from ray import tune

        result = self.result(metrics, step)
        write_atomic(self._folder / LAST_RESULT_FILE, json.dumps(result))
        newest = None
        if self._attaches_checkpoints:  # looking for it reads all of it
            newest = Checkpoints(self._folder / CHECKPOINTS).latest()
        tune.report(result, checkpoint=newest and tune.Checkpoint.from_directory(newest))

    def on_progress(self, step: int, points: list[MetricPoint], lines: list[str]) -> None:
        """Report the evaluations among the metrics that the workers sent; log their lines."""
        for line in lines:
            print(line, flush=True)
        for name, value, row_step, _ in points:
            if name.startswith("val/"):
                self._unreported.setdefault(row_step, {})[name] = value
        for evaluated in sorted(self._unreported):
            self.report(self._unreported.pop(evaluated), evaluated)


class _TrackerAndTuneReporter(TrackerReporter):
    """Tells the tracker everything, and Ray Tune of each evaluation."""

    def __init__(self, tracker: Any, run: str, tune_reporter: TuneReporter) -> None:
        super().__init__(tracker, run)
        self._tune_reporter = tune_reporter

    def on_evaluation_end(
        self, metrics: Mapping[str, float], step: int, checkpoints: Checkpoints
    ) -> None:
        checkpoints.wait()
        self.flush()
        self._tune_reporter.report(metrics, step)
