"""Ray Tune's side of a sweep's search: how many trials there are, and how many run at a time.

Tune keeps both in its state, and a restored Tune goes on with what it was begun with. Here both are
of the command that runs: the searcher says when there are no more trials, and a resumed sweep may
have more of them, or another number at a time.
"""

import sys
from typing import Any

from ray.tune.search import ConcurrencyLimiter, SearchGenerator

from tuning.trials.searcher import JournaledSearcher

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
