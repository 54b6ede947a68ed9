"""An engine: trains a sweep's trials on one device, as slots of programs.

Two kinds of threads meet here. Calls of Tune (`start`, `next`, `stop`) come on threads of their
own, many at a time, and wait. One computing thread does all the work, and owns all state of it:
`engine_loop.py` has both. Calls reach it through commands only. What the two sides share is a
trial's queue of results, and the registry of trials, which has a lock. The
`tests/tuning/fused/test_engine_threads.py` start and stop trials as fast as they can.
"""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.base.errors import TrainingError
from cluster.base.files import write_atomic
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.run_folder import CHECKPOINTS
from trainers.spec import RunSpec, resolve
from trainers.tracking.reporter import TrackerReporter
from tuning.fused.engine_loop import EngineLoop
from tuning.fused.engine_trial import EngineTrial, SupersededError, TrialRegistry
from tuning.fused.trial_saver import LEASE_FILE
from tuning.programs.program import Program
from tuning.programs.program_signature import Variant
from tuning.trials.take_over import Beginning
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, LAST_RESULT_FILE, Sweep, TuneReporter

REPORT_S = 5.0
"""Seconds between a trial's reports to the tracker: there are many trials, and MLflow takes 10 to
30 ms for each of them, however little it is sent."""

START_LOCKS = 64
"""Locks for the starts of trials, by number: two instances of a trial start one after another."""


class Engine:
    """Trains trials in slots. Each method may be called by any thread, and blocks it."""

    def __init__(
        self, sweep: Sweep, tracker: Any, slots: int, program: Program | None = None
    ) -> None:
        """`slots` are those of each program. Without a `program`, the engine compiles one first."""
        self._sweep, self._tracker = sweep, tracker
        self._trials = TrialRegistry()
        self._start_locks = [threading.Lock() for _ in range(START_LOCKS)]
        self._loop = EngineLoop(sweep, slots, self._trials, program)
        threading.Thread(target=self._loop.run, daemon=True, name="engine").start()

    def start(self, config: Mapping[str, Any]) -> str:
        """Begin or resume the trial with this configuration of Tune's; returns its lease.

        Tune may start a trial again before the paused instance has stopped: that one is stopped
        here, and does not save the trial any more.
        """
        number = int(config["trial"])
        folder = self._sweep.trial_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        with self._start_locks[number % START_LOCKS]:
            for other in self._trials.all():
                if other.number == number:
                    self.stop(other.lease)
            beginning = self._sweep.begin_trial(config, self._tracker)
            lease = f"{number}-{uuid4().hex}"
            write_atomic(folder / LEASE_FILE, lease)
            self._trials.add(self._new_trial(number, lease, folder, beginning))
        return lease

    def next(self, lease: str) -> dict[str, Any]:
        """Wait for a trial's next evaluation, and return it as a result for Tune.

        Raises TrainingError if the trial has failed, SupersededError if it was stopped meanwhile.
        """
        trial = self._trials.get(lease)
        self._loop.post(lambda: self._loop.request_next(trial))
        result = trial.results.get()
        if isinstance(result, SupersededError):
            raise result
        if isinstance(result, TrainingError):
            trial.files.write(FAILED_FILE, str(result))
            raise result
        if result["complete"] or self._sweep.spec.scheduler.name == "pbt":
            trial.checkpoints.wait()  # another trial may take it over when Tune has this result
        if result["complete"]:
            trial.reporter.flush()
        if not trial.files.write(LAST_RESULT_FILE, json.dumps(result)):
            raise SupersededError(lease)
        return {**result, "done": result["complete"] or trial.had_ended}

    def stop(self, lease: str) -> None:
        """End a trial; when this returns, its last evaluated state is on disk.

        From then on this instance writes nothing into the trial's folder.
        """
        trial = self._trials.pop(lease)
        if trial is not None:
            trial.files.close()
            self._loop.call(lambda: self._loop.stop(trial))
            trial.checkpoints.wait()
            trial.checkpoints.forget_copies()
            trial.reporter.flush()

    def _new_trial(
        self, number: int, lease: str, folder: Path, beginning: Beginning
    ) -> EngineTrial:
        spec, workload = resolve(self._sweep.fused_spec_data(beginning.parameters), RunSpec)
        last = folder / LAST_RESULT_FILE
        result = json.loads(last.read_text()) if last.exists() else {}
        samples = self._sweep.samples_of(spec)
        trial = EngineTrial(
            number,
            lease,
            Variant(spec, workload, spec.train.total_steps(samples)),
            folder,
            spec.train.evaluation_steps(samples),
            TuneReporter(self._sweep, spec, folder, changes=beginning.changes),
            TrackerReporter(self._tracker, self._sweep.trial_key(number), REPORT_S),
            Checkpoints(folder / CHECKPOINTS, spec.checkpoint),
            had_ended=bool(result) and ((folder / ENDED_FILE).exists() or result["complete"]),
            reported_step=beginning.known_step,
            device_s=result.get("device_s", 0.0),
        )
        if (folder / FAILED_FILE).exists():  # a second attempt would not change it
            trial.results.put(TrainingError((folder / FAILED_FILE).read_text()))
        elif trial.had_ended:
            trial.results.put(result)
        trial.ended = not trial.results.empty()
        return trial
