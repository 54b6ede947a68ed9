"""The results of a sweep's trials, from its folder: the leaderboard and the Pareto front."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trainers.checkpoints.ranking import loss_of
from trainers.run_folder import CHECKPOINTS, MODEL
from trainers.spec import RunSpec, resolve
from tuning.stopping.fronts import first_front
from tuning.trials.budget import trial_costs
from tuning.trials.importances import parameter_importances
from tuning.trials.journal import Journal
from tuning.trials.ranking import loss, objective_modes, selected
from tuning.trials.space import COST_METRICS
from tuning.trials.take_over import CHANGES
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, Sweep, last_result


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
        """The best trial; None if no trial has a finite value."""
        return next((r for r in self.results[:1] if math.isfinite(r.value)), None)


def read_leaderboard(sweep: Sweep) -> Leaderboard:
    """The leaderboard of a sweep, finished or not, without the importances."""
    journal = Journal(sweep.folder / JOURNAL_FILE)
    objectives = objective_modes(sweep.spec) if sweep.spec.objective else {}
    costs = trial_costs(sweep) if objectives.keys() & set(COST_METRICS) else {}
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
                )
            )
    results.sort(key=lambda result: loss(sweep.spec, result.value))
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


def export_best(sweep: Sweep, best: TrialResult) -> None:
    """Export the model of the best trial, at the step that counts, to `model` in the sweep's folder.

    Does nothing where there is no such checkpoint. Raises what the user's model raises.
    """
    from trainers.checkpoints.checkpoints import Checkpoints
    from trainers.checkpoints.export import export_model

    checkpoint = Checkpoints(sweep.trial_folder(best.number) / CHECKPOINTS).at(best.step)
    if checkpoint is not None:
        spec, workload = resolve(sweep.trial_spec_data(best.parameters), RunSpec)
        export_model(sweep.folder / MODEL, spec, workload, checkpoint)
