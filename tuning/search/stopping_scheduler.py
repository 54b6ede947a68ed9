"""A stopping rule as a Ray Tune scheduler, with its evaluations on disk.

Ray's own schedulers keep their rungs in memory, and Ray saves no scheduler: a resumed sweep would
begin without them. Ray's ASHA also files late evaluations under lower rungs, and never stops a
trial whose metric is NaN.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import IO, Any

from ray.tune.schedulers import FIFOScheduler

from cluster.base.files import truncate_partial_line
from trainers.run_folder import TRIALS
from tuning.search.schedulers import EPOCH_ATTR, CostPerEpoch
from tuning.spaces.space import SweepSpec
from tuning.stopping.rules import Evaluation, StoppingRule
from tuning.trials.journal import Journal
from tuning.trials.ranking import losses, selected, violation
from tuning.trials.trial import JOURNAL_FILE, last_result

EVALUATIONS_FILE = "evaluations.jsonl"
"""In a sweep's folder: what the scheduler was told, a line for each evaluation of a trial."""


class InOrder(FIFOScheduler):  # type: ignore[misc]
    """Trials in the order of their numbers."""

    def choose_trial_to_run(self, controller: Any) -> Any:
        """The first trial that waits. Ray's own looks through all trials, ended ones too."""
        waiting = [
            trial for trial in controller.get_live_trials() if trial.status in ("PENDING", "PAUSED")
        ]
        return min(
            waiting,
            key=lambda trial: (trial.status == "PAUSED", trial.config["trial"]),
            default=None,
        )


class StoppingScheduler(InOrder):
    """Trials in their order, some stopped by a rule.

    An evaluation that is not finite is the worst at each point where the rule decides: its trial is
    stopped if any trial had a finite one there or earlier.
    """

    def __init__(
        self,
        sweep: SweepSpec,
        rule: StoppingRule,
        cost_per_epoch: CostPerEpoch,
        interval: float,
        folder: Path | None,
    ) -> None:
        """`interval` are the epochs between evaluations. Without the sweep's `folder`, nothing is
        kept on disk. Tune pickles the scheduler before it is used.
        """
        super().__init__()
        self._sweep, self._rule, self._cost_per_epoch = sweep, rule, cost_per_epoch
        self._interval, self._folder = interval, folder
        self._at: dict[int, float] | None = None
        """Trial -> what it had used at its last evaluation; None before the file was read."""
        self._finite_from = math.inf
        """The least that a trial had used when its evaluation was finite."""
        self._file: IO[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        evaluation = self._new_evaluation(trial.config["trial"], result)
        if evaluation is None:
            return str(self.CONTINUE)
        decides = self._add(evaluation)
        self._write(evaluation)
        if not decides or result.get("complete"):  # a complete trial ends by itself
            return str(self.CONTINUE)
        if evaluation.finite:
            stops = self._rule.stops(evaluation)
        else:
            stops = self._finite_from <= evaluation.at
        return str(self.STOP if stops else self.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.on_trial_result(controller, trial, result)  # Tune does not tell of a last result

    def debug_string(self) -> str:
        return f"{self._sweep.scheduler.name}: {len(self._at or {})} trials evaluated"

    def _new_evaluation(self, trial: int, result: Mapping[str, Any]) -> Evaluation | None:
        """A result as an evaluation; None if it is none, or was told of before."""
        if self._at is None:
            self._at = {}
            self._read()
        if EPOCH_ATTR not in result or self._sweep.metric not in result:
            return None
        at = float(result[EPOCH_ATTR])
        if self._sweep.scheduler.resource != "epoch":
            at *= self._cost_per_epoch(trial, result)
        since = self._at.get(trial, 0.0)
        if at <= since:
            return None
        counts = selected(self._sweep, result)
        found = losses(self._sweep, counts)
        broken = math.inf if math.inf in found else violation(self._sweep, counts)
        finite = math.inf not in losses(self._sweep, result)
        return Evaluation(trial, since, at, found, broken, finite)

    def _add(self, evaluation: Evaluation) -> bool:
        assert self._at is not None
        self._at[evaluation.trial] = evaluation.at
        if evaluation.finite:
            self._finite_from = min(self._finite_from, evaluation.at)
        return self._rule.add(evaluation)

    def _write(self, evaluation: Evaluation) -> None:
        """Append a line; it outlives this process, if not the machine."""
        if self._folder is None:
            return
        if self._file is None:
            self._file = (self._folder / EVALUATIONS_FILE).open("a+b", buffering=0)
            truncate_partial_line(self._file.fileno())
        line = [_json(value) for value in astuple(evaluation)]
        self._file.write(json.dumps(line).encode() + b"\n")

    def _read(self) -> None:
        """Note the evaluations of before an interruption, also those that only the trials know."""
        if self._folder is None:
            return
        path = self._folder / EVALUATIONS_FILE
        for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
            trial, since, at, found, broken, finite = map(_from_json, json.loads(line))
            self._add(Evaluation(trial, since, at, tuple(found), broken, finite))
        for number in Journal(self._folder / JOURNAL_FILE).parameters:
            self._read_last(number, self._folder / TRIALS / f"{number:04d}")

    def _read_last(self, trial: int, folder: Path) -> None:
        """Note a trial's last evaluation, if its line was lost, or no lines were written then."""
        assert self._at is not None
        evaluation = self._new_evaluation(trial, last_result(folder))
        if evaluation is None:
            return
        if trial not in self._at:  # one of those before it was at the rungs that it has passed
            self._at[trial] = max(0.0, evaluation.at - self._interval)
            evaluation = self._new_evaluation(trial, last_result(folder))
            assert evaluation is not None
        self._add(evaluation)
        self._write(evaluation)


def _json(value: Any) -> Any:
    """A value with null for infinity, which JSON lacks."""
    if isinstance(value, tuple):
        return [_json(each) for each in value]
    return None if value == math.inf else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    return math.inf if value is None else value
