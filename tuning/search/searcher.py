"""The parameters of the next trial: Optuna's samplers as a Ray Tune searcher, with a journal.

Every suggestion is on disk before Tune gets it, and every end of a trial before the sampler
learns from it. Tune's own snapshots are seconds old. With the journal, a sweep whose driver was
killed continues with exactly the trials that it had, even those newer than the snapshot.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from tuning.search.optuna_study import SearchStudy
from tuning.spaces.constraints import violations
from tuning.spaces.space import COST_METRICS, SweepSpec
from tuning.trials.budget import find_open_budget
from tuning.trials.journal import Journal
from tuning.trials.ranking import losses, selected, selected_value


class JournaledSearcher(Searcher):  # type: ignore[misc]
    """A Ray Tune searcher that suggests `{"trial": number, path: value, ...}`."""

    def __init__(
        self, sweep: SweepSpec, journal: Path, epochs_per_trial: float | None = None
    ) -> None:
        """`epochs_per_trial` are the epochs of a trial that no scheduler stops."""
        super().__init__(metric=sweep.metric, mode=sweep.mode)
        self._sweep, self._journal_path = sweep, journal
        self._epochs_per_trial = epochs_per_trial
        self._trial_numbers: dict[str, int] = {}
        """Tune's trial id -> number of the trial in the journal."""
        self._load_journal()

    def _load_journal(self) -> None:
        self._journal = Journal(self._journal_path)
        self._unknown: list[int] | None = None
        """Numbers of the journaled trials that Tune does not know, the last one first; None where
        they are not counted yet."""

    @functools.cached_property
    def _search(self) -> SearchStudy:
        """Made when it is needed first: a resumed Tune reads two searchers and uses one."""
        return SearchStudy(self._sweep, self._journal)

    def __getstate__(self) -> dict[str, Any]:
        read_again = ("_journal", "_search", "_unknown")
        return {name: value for name, value in self.__dict__.items() if name not in read_again}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load_journal()

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_text(json.dumps(self._trial_numbers))

    def restore(self, checkpoint_path: str) -> None:
        self._trial_numbers = json.loads(Path(checkpoint_path).read_text())
        self._unknown = None

    def live_trials(self) -> set[str]:
        """Tune's ids of the trials that it knows and that have not ended."""
        numbers = self._trial_numbers.items()
        return {trial_id for trial_id, number in numbers if number not in self._journal.ends}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the parameters of a journaled trial that Tune does not know, otherwise a new
        suggestion. Return None while the budget does not cover another trial.
        """
        if self._unknown is None:
            known = set(self._trial_numbers.values())
            self._unknown = sorted(set(self._journal.parameters) - known, reverse=True)
        if self._unknown:
            number = self._unknown.pop()
        else:
            number = self._journal.next_number
            if len(self._journal.parameters) >= self._sweep.total_trials:
                return str(Searcher.FINISHED)
            budget = find_open_budget(self._journal_path.parent.name)
            if budget is not None and not budget.can_start_trial():
                return None
            suggested = self._search.suggest(number)
            if suggested is None:
                return str(Searcher.FINISHED)
            self._journal.record_suggestion(number, *suggested)
        self._trial_numbers[trial_id] = number
        return {"trial": number, **self._journal.parameters[number]}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        number, result = self._trial_numbers[trial_id], result or {}
        if number in self._journal.ends:
            return
        sweep, search = self._sweep, self._search
        value = None if error else selected_value(sweep, result)
        step, complete = int(result.get("step", 0)), bool(result.get("complete"))
        if value is None:
            self._journal.record_end(number, None, step, complete)
        else:
            several = list(losses(sweep, self._at_full_length(result))) if sweep.objective else None
            broken = violations(sweep.constraints, self._with_costs(number, result))
            self._journal.record_end(number, value, step, complete, several, broken)
        search.tell(number)

    def _at_full_length(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The evaluation that counts, with the time on the device of a trial that is not stopped.

        A trial that was stopped early has cost little, which is no merit of its parameters.
        """
        evaluation = dict(selected(self._sweep, result))
        epoch, device_s = result.get("epoch"), result.get("device_s")
        if not result.get("complete") and self._epochs_per_trial and epoch and device_s:
            evaluation["device_s"] = device_s * self._epochs_per_trial / epoch
        return evaluation

    def _with_costs(self, number: int, result: Mapping[str, Any]) -> dict[str, Any]:
        """The evaluation that counts, with the costs of the trial if constraints need them."""
        known = dict(selected(self._sweep, result))
        budget = find_open_budget(self._journal_path.parent.name)
        if budget is not None and any(
            text.startswith(COST_METRICS) for text in self._sweep.constraints
        ):
            known |= budget.costs_of(number)
        return known
