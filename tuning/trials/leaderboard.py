"""The results of a sweep's trials, from its folder: the leaderboard and the Pareto front."""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.base.config import write_yaml
from tuning.trials.budget import trial_costs
from tuning.trials.importances import parameter_importances
from tuning.trials.journal import Journal
from tuning.trials.space import COST_METRICS
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, Sweep, last_result


@dataclass(frozen=True)
class TrialResult:
    """The state of a trial after its last evaluation."""

    number: int
    parameters: Mapping[str, Any]
    value: float
    """The metric at the last evaluation; the newest checkpoint gives the same."""
    step: int
    epoch: float
    complete: bool
    objectives: Mapping[str, float] = field(default_factory=dict)
    """Objective of `sweep.objective` -> its value, where it is known."""


@dataclass(frozen=True)
class Leaderboard:
    """All trials that were evaluated at least once, the best first."""

    results: list[TrialResult]
    ended: list[int]
    """Numbers of the trials that are complete, stopped or failed."""
    failed: dict[int, str]
    """Number of a failed trial -> reason."""
    pareto_trials: list[int]
    """Numbers of the trials on the Pareto front; [] with fewer than two objectives."""
    importances: dict[str, float] = field(default_factory=dict)
    """Share of the metric's variance that each parameter explains (fANOVA); the sum is 1."""

    @property
    def best(self) -> TrialResult | None:
        return self.results[0] if self.results else None


def read_leaderboard(sweep: Sweep) -> Leaderboard:
    """The leaderboard of a sweep, finished or not, without the importances."""
    journal = Journal(sweep.folder / JOURNAL_FILE)
    objectives = dict(objective.split(" ") for objective in sweep.spec.objective)
    costs = trial_costs(sweep) if objectives.keys() & set(COST_METRICS) else {}
    results, ended, failed = [], [], {}
    for number, parameters in journal.parameters.items():
        folder = sweep.trial_folder(number)
        if (folder / FAILED_FILE).exists():
            failed[number] = (folder / FAILED_FILE).read_text()
        if (folder / ENDED_FILE).exists() or number in failed:
            ended.append(number)
        last = last_result(folder)
        if last and number not in failed:
            known = {**last, **costs.get(number, {})}
            results.append(
                TrialResult(
                    number,
                    parameters,
                    value=last[sweep.spec.metric],
                    step=last["step"],
                    epoch=last["epoch"],
                    complete=last["complete"],
                    objectives={name: known[name] for name in objectives if name in known},
                )
            )
    sign = -1 if sweep.spec.mode == "max" else 1
    results.sort(key=lambda r: (r.value != r.value, sign * r.value))  # NaN comes last
    front = pareto_front({r.number: r.objectives for r in results}, objectives)
    return Leaderboard(results, ended, failed, front)


def with_importances(sweep: Sweep, board: Leaderboard) -> Leaderboard:
    """The leaderboard with the importances, which take minutes for 10,000 trials."""
    journal = Journal(sweep.folder / JOURNAL_FILE)
    return replace(board, importances=parameter_importances(sweep.spec, journal))


def pareto_front(values: Mapping[int, Mapping[str, float]], modes: Mapping[str, str]) -> list[int]:
    """The trials that no other trial dominates, in the order of `values`.

    `values` has the objectives of each trial, and `modes` is min or max for each objective. Trials
    with an unknown or infinite objective are left out. With fewer than two objectives the front
    is empty.
    """
    if len(modes) < 2:
        return []
    signs = {name: -1.0 if mode == "max" else 1.0 for name, mode in modes.items()}
    losses = {
        number: tuple(sign * objectives.get(name, math.nan) for name, sign in signs.items())
        for number, objectives in values.items()
    }
    known = {number: each for number, each in losses.items() if all(map(math.isfinite, each))}
    on_front = _undominated(sorted(set(known.values())))
    return [number for number, each in known.items() if each in on_front]


def _undominated(points: list[tuple[float, ...]]) -> set[tuple[float, ...]]:
    """Those of `points`, which differ and are sorted, to which no other one is at most equal.

    A point can only be dominated by one before it, on the front so far. Of two or three numbers the
    first one is sorted. In the other two, the points of the front that matter are steps: the second
    number rises and the third one falls. So it takes O(n log n). With four numbers and more, each
    point is compared with the front: 1 s for 10,000 points that are all on it.
    """
    if points and len(points[0]) > 3:
        import numpy as np

        front = np.empty((len(points), len(points[0])))
        found = 0
        for point in points:
            if not (front[:found] <= point).all(axis=1).any():
                front[found] = point
                found += 1
        return set(map(tuple, front[:found].tolist()))
    on_front, seconds, thirds = set(), list[float](), list[float]()
    for point in points:
        second, third = (*point, 0.0)[1:3]
        end = bisect.bisect_right(seconds, second)
        if end and thirds[end - 1] <= third:
            continue
        on_front.add(point)
        begin = bisect.bisect_left(seconds, second)
        stop = begin
        while stop < len(thirds) and thirds[stop] >= third:
            stop += 1
        seconds[begin:stop], thirds[begin:stop] = [second], [third]
    return on_front


def write_best(sweep: Sweep, best: TrialResult, path: Path) -> None:
    """Write the best trial's spec as a file that `heliostat train` takes."""
    write_yaml(sweep.trial_spec_data(best.parameters), path)
