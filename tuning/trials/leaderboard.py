"""The results of a sweep's trials, from its folder: the leaderboard and the Pareto front."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainers.checkpoints.ranking import loss_of
from trainers.run_folder import CHECKPOINTS, MODEL
from trainers.spec import RunSpec, resolve
from tuning.spaces.space import COST_METRICS, SweepSpec
from tuning.stopping.fronts import first_front
from tuning.trials.budget import trial_costs
from tuning.trials.importances import parameter_importances
from tuning.trials.journal import Journal
from tuning.trials.ranking import loss, objective_modes, selected, violation
from tuning.trials.repeats import Repeated, best_mean_first
from tuning.trials.take_over import CHANGES
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, Sweep, last_result

SHOWN_NUMBERS = 5
"""Failed trials that a line names; it counts the others."""
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialResult:
    """The evaluation that counts of a trial: its last or its best one, as `sweep.select` says."""

    number: int
    parameters: Mapping[str, Any]
    value: float
    """The metric; the checkpoint of this step gives the same."""
    step: int
    epoch: float
    complete: bool
    """Whether the trial has done all its steps, also those after this evaluation."""
    changes: int = 0
    """How often pbt has changed the parameters, which are the last ones of this evaluation."""
    objectives: Mapping[str, float] = field(default_factory=dict)
    """Objective of `sweep.objective` -> its value, where it is known."""
    violation: float = 0.0
    """How far it breaks `sweep.constraints`; 0 if it keeps them all."""
    repeated: Repeated | None = None
    """The trainings of its configuration for `sweep.repeat` and `sweep.folds`, this one included,
    as far as they have ended."""


@dataclass(frozen=True)
class Leaderboard:
    """All trials of the search that were evaluated at least once, the best first."""

    results: list[TrialResult]
    """Those whose configuration was repeated come first, by the mean of its trainings."""
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
        """The best trial; None if no trial has a finite value and keeps the constraints."""
        return next(
            (r for r in self.results[:1] if math.isfinite(r.value) and not r.violation), None
        )

    def finalists(self, sweep: SweepSpec) -> list[TrialResult]:
        """The best complete trials by their own values, whose configurations are repeated."""
        complete = [result for result in self.results if result.complete and not result.violation]
        by_value = sorted(complete, key=lambda result: loss(sweep, result.value))
        return by_value[: sweep.finalists]


def read_leaderboard(sweep: Sweep) -> Leaderboard:
    """The leaderboard of a sweep, finished or not, without the importances."""
    journal = Journal(sweep.folder / JOURNAL_FILE)
    objectives = objective_modes(sweep.spec) if sweep.spec.objective else {}
    asked = " ".join([*objectives, *sweep.spec.constraints])
    costs = trial_costs(sweep) if any(name in asked for name in COST_METRICS) else {}
    results, ended, failed = [], [], {}
    for number in journal.parameters:
        folder = sweep.trial_folder(number)
        if (folder / FAILED_FILE).exists():
            failed[number] = (folder / FAILED_FILE).read_text()
        if (folder / ENDED_FILE).exists() or number in failed:
            ended.append(number)
        last = last_result(folder)
        if last and number not in failed:
            counts = selected(sweep.spec, last)
            known = {**counts, **costs.get(number, {})}
            results.append(
                TrialResult(
                    number,
                    journal.parameters_after(number, changes := last.get(CHANGES, 0)),
                    value=counts[sweep.spec.metric],
                    step=counts["step"],
                    epoch=counts["epoch"],
                    complete=last["complete"],
                    changes=changes,
                    objectives={name: known[name] for name in objectives if name in known},
                    violation=violation(sweep.spec, known),
                )
            )
    results.sort(key=lambda result: (result.violation > 0, loss(sweep.spec, result.value)))
    results = best_mean_first(sweep, results, journal)
    feasible = {r.number: r.objectives for r in results if not r.violation}
    front = pareto_front(feasible, objectives)
    return Leaderboard(results, ended, failed, front)


def has_ended(sweep: Sweep, board: Leaderboard) -> bool:
    """Whether all trials have ended, with the trainings of the best configurations."""
    if len(board.ended) < sweep.spec.total_trials:
        return False
    return not sweep.spec.repeated_fields or all(
        result.repeated is not None and result.repeated.complete
        for result in board.finalists(sweep.spec)
    )


def with_importances(sweep: Sweep, board: Leaderboard) -> Leaderboard:
    """The leaderboard with the importances, which take minutes for 10,000 trials."""
    journal = Journal(sweep.folder / JOURNAL_FILE)
    return replace(board, importances=parameter_importances(sweep.spec, journal))


def failure_lines(failed: Mapping[int, str], total: int) -> list[str]:
    """Lines on the trials that failed, by number with their reasons: how many, and each reason.

    Reasons that differ in numbers only are told once, in the words of the first trial.
    """
    if not failed:
        return []
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for number, reason in failed.items():
        groups[failure_kind(reason)].append(number)
    by_size = sorted(groups.values(), key=len, reverse=True)
    lines = [f"{_listed(numbers)} failed: {failed[numbers[0]]}" for numbers in by_size]
    return [f"{len(failed)} of {total} trials failed", *lines]


def _listed(numbers: Sequence[int]) -> str:
    named = ", ".join(f"{number:04d}" for number in numbers[:SHOWN_NUMBERS])
    more = f" and {len(numbers) - SHOWN_NUMBERS} more" if len(numbers) > SHOWN_NUMBERS else ""
    return f"trial{'s' if len(numbers) > 1 else ''} {named}{more}"


def failure_kind(reason: str) -> str:
    """The same for reasons that differ in numbers only."""
    return NUMBER.sub("#", reason)


def pareto_front(values: Mapping[int, Mapping[str, float]], modes: Mapping[str, str]) -> list[int]:
    """The trials that no other trial dominates, in the order of `values`.

    `values` has the objectives of each trial, and `modes` is min or max for each objective. Trials
    with an unknown or infinite objective are left out. With fewer than two objectives the front
    is empty.
    """
    if len(modes) < 2:
        return []
    known = {
        number: objectives
        for number, objectives in values.items()
        if all(math.isfinite(objectives.get(name, math.nan)) for name in modes)
    }
    points = [
        tuple(loss_of(objectives[name], mode) for name, mode in modes.items())
        for objectives in known.values()
    ]
    numbers = list(known)
    return [numbers[position] for position in first_front(points)]


def export_best(sweep: Sweep, board: Leaderboard) -> None:
    """Export the best trial's model, at the step that counts, to `model` in the sweep's folder.

    So `load_model` takes the sweep's folder. Does nothing where there is no such checkpoint. What
    the user's model raises is only logged: the sweep has ended.
    """
    from trainers.checkpoints.checkpoints import Checkpoints
    from trainers.checkpoints.export import export_model

    if board.best is None:
        return
    trial = sweep.trial_folder(board.best.number)
    try:
        checkpoint = Checkpoints(trial / CHECKPOINTS).at(board.best.step)
        if checkpoint is not None:
            spec, workload = resolve(sweep.trial_spec_data(board.best.parameters), RunSpec)
            export_model(sweep.folder / MODEL, spec, workload, checkpoint)
    except Exception:
        logger.exception("the model of the best trial could not be exported")
