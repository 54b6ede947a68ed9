"""The search of a sweep as an Optuna study, which can be made again from the journal."""

import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tuning.search.samplers import algorithm, build_sampler, suggestion_seed
from tuning.spaces.searches import (
    EXHAUSTIVE,
    FROM_LAST_VALUES,
    MAX_COMBINATIONS,
    ONE_OBJECTIVE,
    WITHOUT_MEMORY,
)
from tuning.spaces.space import SweepSpec
from tuning.spaces.suggestion import (
    completed,
    count_combinations,
    optuna_parameters,
    optuna_values,
    suggest,
)
from tuning.trials.journal import Journal
from tuning.trials.ranking import loss

if TYPE_CHECKING:
    import optuna

ATTEMPTS, RANDOM_ATTEMPTS = 4, 4
"""How often the search, and after it chance, is asked for values that were not tried yet."""


class SearchStudy:
    """Suggests the parameters of the next trial, and learns how trials ended.

    A suggestion depends on the sweep's spec, on the number of the trial, on the suggestions before
    it and on the trials that have ended. The journal has all of them: also the state that Optuna's
    samplers keep in the attributes of trials and of the study (the distribution of CMA-ES, the
    parents of a generation, the place in a Sobol sequence). So a study that is made again from the
    journal suggests what this one would have suggested.
    """

    def __init__(self, sweep: SweepSpec, journal: Journal) -> None:
        self._sweep, self._journal = sweep, journal
        self._algorithm = algorithm(sweep)
        self._learns = self._algorithm not in WITHOUT_MEMORY
        self._objectives = 1 if self._algorithm in ONE_OBJECTIVE else max(1, len(sweep.objective))
        self._numbers: dict[int, int] = {}
        """Number of a trial -> its number in Optuna's study."""
        self._tried = {_key(parameters) for parameters in journal.parameters.values()}
        self._untried = self._combinations()
        if self._learns:
            self._restore()

    def suggest(self, number: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The parameters of the next trial, and what the journal must have besides them.

        No combination of values is suggested twice, except to pbt. None if there is no other one.
        """
        before = dict(self._study_attributes()) if self._learns else {}
        for discarded, (parameters, trial) in enumerate(self._asked_values(number)):
            if self._sweep.scheduler.name == "pbt" or _key(parameters) not in self._tried:
                self._tried.add(_key(parameters))
                return parameters, self._suggestion(number, parameters, trial, before, discarded)
            if trial is not None:
                self._discard(trial)
        return None

    def _asked_values(
        self, number: int
    ) -> "Iterator[tuple[dict[str, Any], optuna.trial.Trial | None]]":
        """Suggestions for a trial, until one is taken, each with its trial in a study that learns.

        First a point that the user gave, then the search, then chance, then, in a finite space,
        what was not tried yet.
        """
        place = len(self._journal.parameters)
        if place < len(self._sweep.enqueue):
            point = optuna_values(self._sweep.parameters, self._sweep.enqueue[place])
            yield self._ask(number, 0, self._algorithm, point)
        if self._algorithm not in EXHAUSTIVE:
            for attempt in range(1, 1 + ATTEMPTS + RANDOM_ATTEMPTS):
                name = self._algorithm if attempt <= ATTEMPTS else "random"
                yield self._ask(number, attempt, name, {})
        for parameters in self._untried:
            if _key(parameters) not in self._tried:
                point, _ = optuna_parameters(self._sweep.parameters, parameters)
                yield self._ask(number, 0, "random", point)

    def tell(self, number: int) -> None:
        """Let the search learn from a trial whose end is in the journal."""
        if not self._learns:
            return
        end = self._journal.ends[number]
        if self._journal.changes.get(number):  # it was not trained with what was suggested
            end = {**end, "value": None}
        state, losses, reported, attributes = self._outcome(end)
        trial_id = self._trial_id(self._numbers[number])
        for key, value in attributes.items():
            self._storage.set_trial_system_attr(trial_id, key, value)
        for step, value in reported.items():
            self._storage.set_trial_intermediate_value(trial_id, step, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CMA-ES does not look at constraints; see `_outcome`
            self._study.tell(self._numbers[number], losses, state)

    @property
    def trials(self) -> "list[optuna.trial.FrozenTrial]":
        """The trials as Optuna knows them; none for a search that does not learn."""
        return list(self._study.trials) if self._learns else []

    def _combinations(self) -> Iterator[dict[str, Any]]:
        """The combinations of a finite space: for grid in the order of the file, else mixed."""
        count = count_combinations(self._sweep.parameters)
        if count is None or count > MAX_COMBINATIONS:
            return
        listed = self._sweep.combinations()
        if self._algorithm != "grid":
            random.Random(self._sweep.seed).shuffle(listed)
        yield from listed

    def _restore(self) -> None:
        """Put the journal's trials into the study, as they were suggested and then as they ended.

        Trials that still ran are running: the search keeps away from them.
        """
        import optuna
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._storage = optuna.storages.InMemoryStorage()
        directions = ["minimize"] * self._objectives  # of losses, for which NaN is infinite
        self._study = optuna.create_study(storage=self._storage, directions=directions)
        self._earlier: list[optuna.trial.FrozenTrial] = []
        """Complete trials of other sweeps."""
        for trials in self._journal.earlier.values():
            for trial in trials:
                self._add_earlier(trial)
        for number, parameters in self._journal.parameters.items():
            suggestion = self._journal.suggestions[number]
            for _ in range(suggestion.get("discarded", 0)):
                self._study.add_trial(create_trial(state=TrialState.FAIL))
            self._numbers[number] = self._count()
            params, distributions = self._asked(parameters, suggestion)
            self._study.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=params,
                    distributions=distributions,
                    system_attrs=suggestion.get("trial", {}),
                )
            )
            for key, value in suggestion.get("study", {}).items():
                self._storage.set_study_system_attr(self._study_id(), key, value)
        for number in self._journal.ends:
            self.tell(number)

    def _asked(
        self, parameters: Mapping[str, Any], suggestion: Mapping[str, Any]
    ) -> "tuple[dict[str, Any], dict[str, optuna.distributions.BaseDistribution]]":
        """What Optuna suggested for a trial, in the order in which it was asked."""
        from optuna.trial import FixedTrial

        params, _ = optuna_parameters(self._sweep.parameters, parameters)
        fixed = FixedTrial({**params, **suggestion.get("params", {})})
        suggest(fixed, self._sweep)
        return fixed.params, fixed.distributions

    def _add_earlier(self, trial: Mapping[str, Any]) -> None:
        """Add a trial of an earlier sweep, whose entry has `parameters` and what an end has."""
        from optuna.trial import create_trial

        state, losses, reported, attributes = self._outcome(trial)
        params, distributions = self._asked(trial["parameters"], {})
        known = create_trial(
            state=state,
            values=losses,
            params=params,
            distributions=distributions,
            intermediate_values=reported,
            system_attrs=attributes,
        )
        self._study.add_trial(known)
        if losses is not None and math.isfinite(losses[0]):
            self._earlier.append(known)

    def _outcome(
        self, end: Mapping[str, Any]
    ) -> "tuple[optuna.trial.TrialState, list[float] | None, dict[int, float], dict[str, Any]]":
        """The state, losses, reported loss at a step, and attributes of a trial that ended.

        A trial without a value failed, and samplers ignore it. One whose value is not finite is the
        worst of all.
        """
        from optuna.trial import TrialState, create_trial

        value, violations = end["value"], end.get("violations", {})
        if value is None:
            return TrialState.FAIL, None, {}, {}
        losses = (end.get("losses") or [loss(self._sweep, value)])[: self._objectives]
        attributes = {}
        if self._algorithm in ONE_OBJECTIVE:  # they do not take constraints
            losses = [math.inf] if any(v > 0 for v in violations.values()) else losses
        elif violations:
            attributes = create_trial(value=0.0, constraints=violations).system_attrs
        if self._algorithm in FROM_LAST_VALUES:
            return TrialState.COMPLETE, losses, {}, attributes
        if not all(map(math.isfinite, losses)):  # TPE takes it for the worst of the stopped ones
            return TrialState.PRUNED, None, {}, attributes
        if end["complete"] or len(losses) > 1:
            return TrialState.COMPLETE, losses, {}, attributes
        return TrialState.PRUNED, None, {end["step"]: losses[0]}, attributes

    def _ask(
        self, number: int, attempt: int, name: str, point: dict[str, Any]
    ) -> "tuple[dict[str, Any], optuna.trial.Trial | None]":
        """Ask the sampler `name` for the parameters that `point`, in Optuna's form, has not."""
        seed = suggestion_seed(self._sweep, number, attempt)
        if not self._learns:
            distributions = self._sweep.parameters
            values = {path: distributions[path].from_optuna(own) for path, own in point.items()}
            return completed(distributions, values, random.Random(seed)), None
        self._study.sampler = build_sampler(self._sweep, name, seed, self._earlier)
        if point:
            self._study.enqueue_trial(point)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are not finite
            trial = self._study.ask()
            _ = trial.relative_params  # a given point belongs to a generation as well
            return suggest(trial, self._sweep), trial

    def _suggestion(
        self,
        number: int,
        parameters: Mapping[str, Any],
        trial: "optuna.trial.Trial | None",
        before: Mapping[str, Any],
        discarded: int,
    ) -> dict[str, Any]:
        """What makes the study again, besides the parameters; `before` are its old attributes."""
        if trial is None:
            return {}
        self._numbers[number] = trial.number
        attributes = self._study_attributes()
        params, _ = optuna_parameters(self._sweep.parameters, parameters)
        found = {
            "params": trial.params if trial.params != params else {},
            "discarded": discarded,
            "trial": dict(self._storage.get_trial_system_attrs(self._trial_id(trial.number))),
            "study": {k: v for k, v in attributes.items() if before.get(k) != v},
        }
        return {key: value for key, value in found.items() if value}

    def _discard(self, trial: "optuna.trial.Trial") -> None:
        from optuna.trial import TrialState

        self._study.tell(trial.number, state=TrialState.FAIL)

    def _study_attributes(self) -> dict[str, Any]:
        attributes: dict[str, Any] = self._storage.get_study_system_attrs(self._study_id())
        return attributes

    def _count(self) -> int:
        """The number of trials in Optuna's study."""
        count: int = self._storage.get_n_trials(self._study_id())
        return count

    def _study_id(self) -> int:
        study_id: int = self._storage.get_study_id_from_name(self._study.study_name)
        return study_id

    def _trial_id(self, number: int) -> int:
        trial_id: int = self._storage.get_trial_id_from_study_id_trial_number(
            self._study_id(), number
        )
        return trial_id


def _key(parameters: Mapping[str, Any]) -> str:
    """Equal for two trials with the same values."""
    return json.dumps(parameters, sort_keys=True, default=str)
