"""The trainings of the best configurations as a search of Ray Tune: a list that it works off."""

from collections.abc import Mapping
from typing import Any

from ray.tune.search import Searcher

from tuning.trials.budget import find_open_budget


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
