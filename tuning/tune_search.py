"""Ray Tune's side of a sweep's search: how many trials there are, and how many run at a time.

Tune keeps both in its state, and a restored Tune goes on with what it was begun with. Here both are
of the command that runs: the searcher says when there are no more trials, and a resumed sweep may
have more of them, or another number at a time.
"""

import sys
from collections.abc import Mapping
from typing import Any

from ray.tune.search import ConcurrencyLimiter, Searcher, SearchGenerator

from tuning.search.searcher import JournaledSearcher
from tuning.trials.budget import find_open_budget

ENDLESS = -1
"""Tune's `num_samples` of a search that ends by itself."""


class SweepSearch(SearchGenerator):  # type: ignore[misc]
    """Tune's search algorithm of a sweep, which Tune pickles before it is used."""

    def __init__(self, journaled: JournaledSearcher, concurrency: int) -> None:
        self._journaled, self._concurrency = journaled, concurrency
        super().__init__(self._limiter())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._journaled, self._concurrency)

    def _limiter(self) -> ConcurrencyLimiter:
        return ConcurrencyLimiter(self._journaled, self._concurrency)

    def restore_from_dir(self, dirpath: str) -> None:
        super().restore_from_dir(dirpath)
        # Trials that failed run again, and those that ended after Tune's snapshot do not.
        self.searcher = self._limiter()
        self.searcher.live_trials = self._journaled.live_trials()

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state({**state, "total_samples": sys.maxsize, "finished": False})


class RepeatSearch(Searcher):  # type: ignore[misc]
    """A Ray Tune searcher that suggests given configurations, in their order."""

    def __init__(
        self, key: str, metric: str, mode: str, left: Mapping[int, dict[str, Any]]
    ) -> None:
        """`key` is the sweep's, `left` has the configurations by the number of their trials."""
        super().__init__(metric=metric, mode=mode)
        self._key, self._left = key, list(left.values())

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next configuration; None while the budget does not cover it."""
        if not self._left:
            return str(Searcher.FINISHED)
        budget = find_open_budget(self._key)
        if budget is not None and not budget.can_start_trial():
            return None
        return self._left.pop(0)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing is learned from a result."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept: a resumed sweep has another list."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: Tune begins anew with what is left."""
