"""One trial under Ray Tune: the training loop in Tune's own worker, or Ray Train started there.

A trial is identified by its number in the sweep's journal, and all its files are in a folder of
that number. So Tune may forget it: a trial that is started again continues from its newest
checkpoint, or from another trial's that it was offered, and an ended one reports its last result
again.
"""

import contextlib
import functools
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.base.errors import HeliostatError, TrainingError
from cluster.base.files import write_atomic
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.manifest import read_manifest
from trainers.checkpoints.place import current_store
from trainers.data.remote import local_dataset
from trainers.data.splits import count_samples
from trainers.devices import local_device
from trainers.engine.heartbeat import stall_watchdog
from trainers.engine.loop import train
from trainers.engine.stall_files import STALLS
from trainers.run_folder import CHECKPOINTS, TRIALS
from trainers.runs.failure_policy import OutageError, format_error, is_outage, log_traceback
from trainers.runs.ray_train import WorkerConfig, run_workers
from trainers.runs.visibility import require_sweep_visible
from trainers.runs.worker_meter import POWER_TRACE_ENV_VAR, WorkerMeter
from trainers.spec import RunSpec, ScaleSpec, resolve
from trainers.stores import external_wait
from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.reporter import TrackerReporter
from trainers.worker import Worker
from tuning.spaces.space import SweepSpec, trial_spec_data
from tuning.trials.datasets import dataset_key
from tuning.trials.journal import Journal
from tuning.trials.ranking import with_best
from tuning.trials.take_over import CHANGES, Beginning, begin_trial

JOURNAL_FILE = "journal.jsonl"
REPORT_S = 2.0
"""Seconds between a trial's reports to the tracker, besides those at evaluations: MLflow takes 10
to 30 ms of the same cores for each of them, however little it is sent."""
LAST_RESULT_FILE, ENDED_FILE, FAILED_FILE = "last.json", "ended.json", "failed.json"
"""In a trial's folder: the result of its last evaluation, how it ended, the error if it failed."""
OUTAGE_FILE = "outage.txt"
"""In a trial's folder: how storage or a device failed last, after which it was started again."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """A sweep: its spec, data sets and folder, the same for all its trials."""

    spec_data: Mapping[str, Any]
    """The sweep's whole spec as plain data."""
    spec: SweepSpec
    dataset: Path
    """The data set of the spec's section `data`; of its first trials where they vary that."""
    folder: Path
    power_trace: str | None = field(default_factory=lambda: os.environ.get(POWER_TRACE_ENV_VAR))
    """Path of a recorded power trace that replaces the readings of the trials' devices."""
    datasets: Mapping[str, Path] = field(default_factory=dict)
    """The data sets of trials by `dataset_key`; a trial without an entry has `dataset`."""

    @property
    def key(self) -> str:
        return self.folder.name

    @functools.cached_property
    def samples(self) -> int:
        """Samples in the training split, as this machine's copy of the data set has them."""
        spec, _ = resolve(self.spec_data, RunSpec)
        return self.samples_of(spec)

    def dataset_of(self, spec: RunSpec) -> Path:
        """The data set of a trial with this spec."""
        return self.datasets.get(dataset_key(spec), self.dataset)

    def samples_of(self, spec: RunSpec) -> int:
        """Samples in the training split of a trial with this spec."""
        return count_samples(local_dataset(self.dataset_of(spec), spec), "train")

    @property
    def threads(self) -> int:
        """Threads with which a trial computes on a CPU, or each of its workers."""
        scale, cpus = self.spec_data["scale"], self.spec.resources.cpu
        workers = ScaleSpec.model_validate(scale).max_workers
        return scale.get("threads") or (max(1, int(cpus)) if workers == 1 else 1)

    def trial_folder(self, number: int) -> Path:
        return self.folder / TRIALS / f"{number:04d}"

    def trial_key(self, number: int) -> str:
        return f"{self.key}/{number:04d}"

    def trial_spec_data(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The spec, as plain data, of the trial with these parameters."""
        varied = (*self.spec.parameters, *self.spec.repeated_fields)
        return trial_spec_data(
            self.spec_data, {path: parameters[path] for path in varied if path in parameters}
        )

    def begin_trial(self, config: Mapping[str, Any], tracker: Any) -> Beginning:
        """Where a trial begins or goes on that Tune starts with this configuration."""
        number = int(config["trial"])
        folder = self.trial_folder(number)
        last = last_result(folder)
        if self.spec.scheduler.name != "pbt":
            return Beginning(config, 0, int(last.get("step", 0)))
        journal = Journal(self.folder / JOURNAL_FILE)
        return begin_trial(number, folder, journal, last, tracker, self.trial_key(number))

    def executed_spec_data(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The same spec with a checkpoint at each evaluation, as the trial is run.

        So there is a checkpoint of the reported metrics wherever Tune ends the trial.
        """
        data = self.trial_spec_data(parameters)
        checkpoint = data["checkpoint"]
        best = {"keep_best": max(1, checkpoint["keep_best"]), "metric": self.spec.metric}
        if self.spec.scheduler.name == "pbt":  # a trial may be one evaluation ahead of the driver
            best["keep"] = max(2, checkpoint["keep"])
        return {**data, "checkpoint": {**checkpoint, **best, "mode": self.spec.mode}}

    def fused_spec_data(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The same as it is run in a slot, whose last evaluation is saved when the trial ends.

        With pbt each evaluation is saved: another trial may take over its state.
        """
        if self.spec.scheduler.name == "pbt":
            data = self.executed_spec_data(parameters)
            return {**data, "checkpoint": {**data["checkpoint"], "every_steps": 1}}
        if self.spec.select == "best":
            return self.executed_spec_data(parameters)
        return self.trial_spec_data(parameters)


def run_trial(config: dict[str, Any], sweep: Sweep, tracker: Any) -> None:
    """Ray Tune's trainable. Reports every evaluation; Tune may end it at any report.

    Tune stores the function's name in its state, and resumes a sweep under that name only.
    """
    from ray import tune

    number = config["trial"]
    folder = sweep.trial_folder(number)
    require_sweep_visible(sweep.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / FAILED_FILE).exists():  # Ray retries, though the error would be the same
        raise TrainingError((folder / FAILED_FILE).read_text())
    last = last_result(folder)
    if last and ((folder / ENDED_FILE).exists() or last["complete"]):
        tune.report(last)
        return
    try:
        beginning = sweep.begin_trial(config, tracker)
        data = sweep.executed_spec_data(beginning.parameters)
        spec, workload = resolve(data, RunSpec)
        prepared = sweep.dataset_of(spec)
        dataset = local_dataset(prepared, spec)
        key = sweep.trial_key(number)
        tune_reporter = TuneReporter(sweep, spec, folder, beginning.known_step, beginning.changes)
        if spec.scale.max_workers > 1:
            tune_reporter.report_saved()
            workers = WorkerConfig(data, prepared, folder, key, threads=sweep.threads)
            run_workers(workers, tracker, tune_reporter.on_progress, threading.Event())
        else:
            set_threads(sweep)
            worker = Worker(hardware=local_device(spec.scale.accelerator))
            reporter = _TrackerAndTuneReporter(tracker, key, tune_reporter)
            with (
                WorkerMeter(tracker, key, worker.hardware, trace=sweep.power_trace),
                stall_watchdog(folder / STALLS, 0, 1, spec.train.stall_timeout_s),
            ):
                train(spec, workload, dataset, folder, reporter, worker)
    except Exception as error:
        log_traceback(sweep.folder, error)
        reason = format_error(error)
        if is_outage(error):  # Ray starts the trial again
            write_atomic(folder / OUTAGE_FILE, reason)
            raise OutageError(reason) from error
        write_atomic(folder / FAILED_FILE, reason)
        raise TrainingError(reason) from error
    finally:
        with contextlib.suppress(HeliostatError):
            current_store(folder / CHECKPOINTS).forget_copies()


def set_threads(sweep: Sweep) -> None:
    """Let PyTorch use the threads of a trial."""
    import torch

    torch.set_num_threads(sweep.threads)


def last_result(folder: Path) -> dict[str, Any]:
    """The result of the last evaluation of the trial in `folder`; {} before the first one."""
    path = folder / LAST_RESULT_FILE
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return result


class TuneReporter:
    """Reports a trial's evaluations to Ray Tune."""

    def __init__(
        self,
        sweep: Sweep,
        spec: RunSpec,
        folder: Path,
        known_step: int | None = None,
        changes: int = 0,
    ) -> None:
        """`known_step` is that of the evaluation which is not to be reported again at a restart,
        `changes` the number of changes that were made to the trial's state.
        """
        samples = sweep.samples_of(spec)
        self._steps = spec.train.total_steps(samples)
        self._epoch_steps = samples / spec.train.global_batch
        self._sweep, self._metric = sweep.spec, sweep.spec.metric
        self._folder, self._changes = folder, {CHANGES: changes} if changes else {}
        self._unreported: dict[int, dict[str, float]] = {}
        self._known_step = known_step
        last = last_result(folder)
        self._earlier = last if last.get(CHANGES, 0) == changes else {}
        """The result of the evaluation before; {} where it is of a state that is gone."""
        self._earlier_device_s = last.get("device_s", 0.0)
        self._start_s = time.monotonic()

    def result(self, metrics: Mapping[str, float], step: int) -> dict[str, Any]:
        """An evaluation after `step` steps as a result for Tune and the leaderboard."""
        if self._metric not in metrics:
            raise TrainingError(
                f"sweep.metric: the workload has no {self._metric} (it has {', '.join(metrics)})"
            )
        result = {
            **metrics,
            **self._changes,
            "step": step,
            "epoch": step / self._epoch_steps,
            "complete": step == self._steps,
            "device_s": self._earlier_device_s + time.monotonic() - self._start_s,
        }
        self._earlier = with_best(self._sweep, result, self._earlier)
        return dict(self._earlier)

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Blocks until Tune has decided. To end the trial, Tune raises SystemExit here."""
        from ray import tune

        known_step, self._known_step = self._known_step, None
        if step == known_step:
            return
        result = self.result(metrics, step)
        write_atomic(self._folder / LAST_RESULT_FILE, json.dumps(result))
        with external_wait():  # Tune may pause the trial
            tune.report(result)

    def report_saved(self) -> None:
        """Report the evaluation of the newest checkpoint, unless Tune was told before.

        For trials of several workers: their tracker passes on each metric once only.
        """
        newest = Checkpoints(self._folder / CHECKPOINTS).latest()
        manifest = read_manifest(newest) if newest is not None else {}
        if manifest.get("metrics"):
            self.report(manifest["metrics"], manifest["step"])

    def on_progress(self, step: int, points: list[MetricPoint], lines: list[str]) -> None:
        """Report the evaluations among the workers' metrics, and log the workers' messages."""
        for line in lines:
            logger.warning("%s", line)  # Ray shows no lower level of a Tune worker
        for name, value, row_step, _ in points:
            if name.startswith("val/"):
                self._unreported.setdefault(row_step, {})[name] = value
        for evaluated in sorted(self._unreported):
            self.report(self._unreported.pop(evaluated), evaluated)


class _TrackerAndTuneReporter(TrackerReporter):
    """Reports everything to the tracker, and each evaluation to Ray Tune as well."""

    def __init__(self, tracker: Any, run: str, tune_reporter: TuneReporter) -> None:
        super().__init__(tracker, run, REPORT_S)
        self._tune_reporter = tune_reporter

    def on_evaluation_end(
        self, metrics: Mapping[str, float], step: int, checkpoints: Checkpoints
    ) -> None:
        checkpoints.wait()
        self.flush()
        self._tune_reporter.report(metrics, step)
