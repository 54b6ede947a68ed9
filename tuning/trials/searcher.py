"""Which values the next trial gets: Optuna's samplers under Ray Tune, with a durable journal.

Every suggestion is on disk before Tune hears of it, and every end of a trial before the search
learns from it. Tune's own snapshots are seconds old; with the journal, a sweep whose driver was
killed goes on with the very trials it had, however much newer they are than the snapshot.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from cluster.base.files import truncate_partial_line
from tuning.trials.budget import find_open_budget
from tuning.trials.space import Distribution, SweepSpec

if TYPE_CHECKING:
    import optuna


class Journal:
    """The trials of a sweep as an append-only file: what each got, and how it ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.parameters: dict[int, dict[str, Any]] = {}
        self.ends: dict[int, dict[str, Any]] = {}
        """By trial: `value` of the metric or None, `step`, and `complete`."""
        if path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last is torn
                self._apply(json.loads(line))

    def _apply(self, entry: dict[str, Any]) -> None:
        if "parameters" in entry:
            self.parameters[entry["trial"]] = entry["parameters"]
        else:
            self.ends[entry["trial"]] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a+b") as file:
            truncate_partial_line(file.fileno())
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._apply(entry)

    def record_suggestion(self, trial: int, parameters: Mapping[str, Any]) -> None:
        self._append({"trial": trial, "parameters": dict(parameters)})

    def record_end(self, trial: int, value: float | None, step: int, complete: bool) -> None:
        self._append({"trial": trial, "value": value, "step": step, "complete": complete})


class JournaledSearcher(Searcher):  # type: ignore[misc]
    """A Ray Tune searcher that hands out `{"trial": number, path: value, ...}`."""

    def __init__(self, sweep: SweepSpec, journal: Path) -> None:
        super().__init__(metric=sweep.metric, mode=sweep.mode)
        self._sweep, self._journal_path = sweep, journal
        self._trial_numbers: dict[str, int] = {}
        """Tune's trial id -> our number."""
        self._load_journal()

    def _load_journal(self) -> None:
        self._journal = Journal(self._journal_path)
        self._study = study_from_journal(self._sweep, self._journal)
        self._open_trials: dict[int, optuna.Trial] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_journal", "_study", "_asked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load_journal()

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps(self._trial_numbers))

    def restore(self, checkpoint_path: str) -> None:
        self._trial_numbers = json.loads(Path(checkpoint_path).read_text())

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The values of a trial that Tune has lost sight of, else new ones; None while, as far
        as one can see, there is no money for them.
        """
        lost = sorted(set(self._journal.parameters) - set(self._trial_numbers.values()))
        number = lost[0] if lost else len(self._journal.parameters)
        if not lost:
            if number >= self._sweep.total_trials:
                return str(Searcher.FINISHED)
            purse = find_open_budget(self._journal_path.parent.name)
            if purse is not None and not purse.can_start_trial():
                return None
            self._journal.record_suggestion(number, self._new_parameters(number))
        self._trial_numbers[trial_id] = number
        return {"trial": number, **self._journal.parameters[number]}

    def _new_parameters(self, number: int) -> dict[str, Any]:
        if self._sweep.search == "grid":
            return self._sweep.combinations()[number]
        space = {path: optuna_distribution(d) for path, d in self._sweep.parameters.items()}
        asked = self._open_trials[number] = self._study.ask(space)
        return {path: self._from_optuna(path, value) for path, value in asked.params.items()}

    def _from_optuna(self, path: str, value: Any) -> Any:
        choice = self._sweep.parameters[path].choice
        return value if choice is None else next(c for c in choice if to_optuna(c) == value)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number, result = self._trial_numbers[trial_id], result or {}
        if number in self._journal.ends:
            return
        value = None if error else result.get(self._sweep.metric)
        complete = bool(result.get("complete"))
        self._journal.record_end(number, value, int(result.get("step", 0)), complete)
        ended = frozen_trial(self._sweep, self._journal, number)
        asked = self._open_trials.pop(number, None)
        if asked is None:
            self._study.add_trial(ended)
            return
        for step, reported in ended.intermediate_values.items():
            asked.report(reported, step)
        self._study.tell(asked, ended.value if complete else None, ended.state)


def to_optuna(value: Any) -> Any:
    """A choice as Optuna takes it: plain scalars as they are, all else as JSON."""
    scalar = value is None or isinstance(value, (bool, int, float, str))
    return value if scalar else json.dumps(value)


def optuna_distribution(distribution: Distribution) -> "optuna.distributions.BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if distribution.choice is not None:
        return CategoricalDistribution([to_optuna(value) for value in distribution.choice])
    low, high = distribution.bounds or (0, 0)
    log = "log" in distribution.kind
    if "integer" in distribution.kind:
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def frozen_trial(sweep: SweepSpec, journal: Journal, number: int) -> "optuna.trial.FrozenTrial":
    """An ended trial as Optuna knows it: complete, pruned at a step, or failed."""
    from optuna.trial import TrialState, create_trial

    end = journal.ends[number]
    value = end["value"]
    state = TrialState.COMPLETE if end["complete"] else TrialState.PRUNED
    if value is None or not math.isfinite(value):
        state, value = TrialState.FAIL, None
    parameters = journal.parameters[number]
    return create_trial(
        state=state,
        value=value if state is TrialState.COMPLETE else None,
        params={path: to_optuna(parameters[path]) for path in sweep.parameters},
        distributions={path: optuna_distribution(d) for path, d in sweep.parameters.items()},
        intermediate_values={end["step"]: value} if state is TrialState.PRUNED else {},
    )


def study_from_journal(sweep: SweepSpec, journal: Journal) -> "optuna.Study":
    """An Optuna study that knows the trials of the journal that have ended."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = sweep.seed + len(journal.parameters)
    sampler: optuna.samplers.BaseSampler
    if sweep.search == "tpe":
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    elif sweep.search == "cmaes":
        sampler = optuna.samplers.CmaEsSampler(seed=seed)
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed)
    direction = "maximize" if sweep.mode == "max" else "minimize"
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.add_trials([frozen_trial(sweep, journal, number) for number in journal.ends])
    return study
