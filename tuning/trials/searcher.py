"""The parameters of the next trial: Optuna's samplers as a Ray Tune searcher, with a journal.

Every suggestion is on disk before Tune gets it, and every end of a trial before the sampler
learns from it. Tune's own snapshots are seconds old. With the journal, a sweep whose driver was
killed continues with exactly the trials that it had, even those newer than the snapshot.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from tuning.trials.budget import find_open_budget
from tuning.trials.journal import Journal
from tuning.trials.optuna_study import frozen_trial, study_from_journal
from tuning.trials.ranking import selected_value
from tuning.trials.space import SweepSpec
from tuning.trials.suggestion import suggest

if TYPE_CHECKING:
    import optuna


class JournaledSearcher(Searcher):  # type: ignore[misc]
    """A Ray Tune searcher that suggests `{"trial": number, path: value, ...}`."""

    def __init__(self, sweep: SweepSpec, journal: Path) -> None:
        super().__init__(metric=sweep.metric, mode=sweep.mode)
        self._sweep, self._journal_path = sweep, journal
        self._trial_numbers: dict[str, int] = {}
        """Tune's trial id -> number of the trial in the journal."""
        self._load_journal()

    def _load_journal(self) -> None:
        self._journal = Journal(self._journal_path)
        self._study = study_from_journal(self._sweep, self._journal)
        self._open_trials: dict[int, optuna.Trial] = {}
        """Trials that were suggested and have not ended, as Optuna's own."""

    def __getstate__(self) -> dict[str, Any]:
        read_again = ("_journal", "_study", "_open_trials")
        return {name: value for name, value in self.__dict__.items() if name not in read_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load_journal()

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps(self._trial_numbers))

    def restore(self, checkpoint_path: str) -> None:
        self._trial_numbers = json.loads(Path(checkpoint_path).read_text())

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the parameters of a journaled trial that Tune does not know, otherwise a new
        suggestion. Return None while the budget does not cover another trial.
        """
        unknown = sorted(set(self._journal.parameters) - set(self._trial_numbers.values()))
        number = unknown[0] if unknown else len(self._journal.parameters)
        if not unknown:
            if number >= self._sweep.total_trials:
                return str(Searcher.FINISHED)
            budget = find_open_budget(self._journal_path.parent.name)
            if budget is not None and not budget.can_start_trial():
                return None
            self._journal.record_suggestion(number, self._new_parameters(number))
        self._trial_numbers[trial_id] = number
        return {"trial": number, **self._journal.parameters[number]}

    def _new_parameters(self, number: int) -> dict[str, Any]:
        if self._sweep.search == "grid":
            return self._sweep.combinations()[number]
        asked = self._open_trials[number] = self._study.ask()
        return suggest(asked, self._sweep)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number, result = self._trial_numbers[trial_id], result or {}
        if number in self._journal.ends:
            return
        value = None if error else selected_value(self._sweep, result)
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
