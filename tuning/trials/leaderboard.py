"""What a sweep came to: the leaderboard, which parameters mattered, the best trial's spec."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.base.config import write_yaml
from trainers.tracking.descriptions import markdown_table, with_facts
from tuning.trials.budget import trial_costs
from tuning.trials.searcher import Journal, study_from_journal
from tuning.trials.space import COST_METRICS
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, LAST_RESULT_FILE, Sweep

FANOVA_TREE_DEPTH = 8
"""Of fANOVA. Optuna's 64 splits down to single trials: that takes the longer the more there are,
and shares differ by less than those of another seed do."""
MAX_DESCRIBED_TRIALS = 10
"""Trials in the note on a sweep."""


@dataclass(frozen=True)
class TrialResult:
    """A trial as it stands."""

    number: int
    parameters: Mapping[str, Any]
    value: float
    """The metric at its last evaluation, which is also what its newest checkpoint gives."""
    step: int
    epoch: float
    complete: bool
    objectives: Mapping[str, float] = field(default_factory=dict)
    """Of `sweep.objective`, those that are known of it."""


@dataclass(frozen=True)
class Leaderboard:
    """All trials that were evaluated at least once, the best first."""

    results: list[TrialResult]
    ended: list[int]
    """Numbers of the trials that will not go on: complete, stopped or failed."""
    failed: dict[int, str]
    """Number of a failed trial -> why."""
    importances: dict[str, float]
    """Share of the metric's variance that each parameter explains (fANOVA); adds up to 1."""
    pareto_trials: list[int]
    """Numbers of the trials that no other one beats in all objectives; [] with less than two."""

    @property
    def best(self) -> TrialResult | None:
        return self.results[0] if self.results else None


def read_leaderboard(sweep: Sweep) -> Leaderboard:
    """Read from the sweep's folder, whether it is finished or not."""
    journal = Journal(sweep.folder / JOURNAL_FILE)
    standings, ended, failed = [], [], {}
    objectives = dict(objective.split(" ") for objective in sweep.spec.objective)
    costs = trial_costs(sweep) if objectives.keys() & set(COST_METRICS) else {}
    for number, parameters in journal.parameters.items():
        folder = sweep.trial_folder(number)
        if (folder / FAILED_FILE).exists():
            failed[number] = (folder / FAILED_FILE).read_text()
        if (folder / ENDED_FILE).exists() or number in failed:
            ended.append(number)
        if (folder / LAST_RESULT_FILE).exists() and number not in failed:
            last = json.loads((folder / LAST_RESULT_FILE).read_text())
            known = {**last, **costs.get(number, {})}
            figures = {name: known[name] for name in objectives if name in known}
            standings.append(
                TrialResult(
                    number,
                    parameters,
                    last[sweep.spec.metric],
                    last["step"],
                    last["epoch"],
                    last["complete"],
                    figures,
                )
            )
    sign = -1 if sweep.spec.mode == "max" else 1
    standings.sort(key=lambda s: (s.value != s.value, sign * s.value))  # NaN comes last
    front = pareto_front({s.number: s.objectives for s in standings}, objectives)
    return Leaderboard(standings, ended, failed, parameter_importances(sweep, journal), front)


def pareto_front(figures: Mapping[int, Mapping[str, float]], modes: Mapping[str, str]) -> list[int]:
    """The trials that no other one equals in all objectives and beats in one of them, in order.

    `modes` is min or max for each objective. Trials of which one is not known are left out, and
    with less than two objectives there is no front.
    """
    if len(modes) < 2:
        return []
    signs = {name: 1 if mode == "min" else -1 for name, mode in modes.items()}
    points = {
        number: [sign * known[name] for name, sign in signs.items()]
        for number, known in figures.items()
        if all(math.isfinite(known.get(name, math.nan)) for name in signs)
    }

    def beaten(point: list[float]) -> bool:
        return any(
            other != point and all(a <= b for a, b in zip(other, point, strict=True))
            for other in points.values()
        )

    return [number for number, point in points.items() if not beaten(point)]


def parameter_importances(sweep: Sweep, journal: Journal) -> dict[str, float]:
    """fANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014) by Optuna; {} with too few trials.

    Stopped trials count with the value at which they were stopped.
    """
    import optuna

    study = study_from_journal(sweep.spec, journal)
    trials = [_as_complete(trial) for trial in study.trials]
    known = [trial for trial in trials if trial.state.name == "COMPLETE"]
    values = {trial.value for trial in known}
    if len(known) < 4 or len(values) < 2:
        return {}
    plain = optuna.create_study(direction=study.direction.name.lower())
    plain.add_trials(known)
    evaluator = optuna.importance.FanovaImportanceEvaluator(max_depth=FANOVA_TREE_DEPTH, seed=0)
    found = optuna.importance.get_param_importances(plain, evaluator=evaluator)
    return {str(path): float(share) for path, share in found.items()}


def _as_complete(trial: Any) -> Any:
    from optuna.trial import TrialState, create_trial

    if trial.state is not TrialState.PRUNED or not trial.intermediate_values:
        return trial
    value = list(trial.intermediate_values.values())[-1]
    return create_trial(value=value, params=trial.params, distributions=trial.distributions)


def write_best(sweep: Sweep, best: TrialResult, path: Path) -> None:
    """The best trial's spec as a file that `heliostat train` takes."""
    write_yaml(sweep.trial_spec_data(best.parameters), path)


def sweep_description(sweep: Sweep, board: Leaderboard, account: Mapping[str, str]) -> str:
    """What MLflow's page of a sweep says: its best trials, what mattered, what it cost."""
    total = sweep.spec.total_trials
    head = f"{len(board.ended)} of {total} trials have ended, {len(board.failed)} of them failed."
    paths = list(sweep.spec.parameters)
    rows = [
        (f"{s.number:04d}", s.value, s.epoch, *(s.parameters[path] for path in paths))
        for s in board.results[:MAX_DESCRIBED_TRIALS]
    ]
    best = markdown_table(("trial", sweep.spec.metric, "epochs", *paths), rows)
    shares = {f"importance of {path}": share for path, share in board.importances.items()}
    known: dict[str, object] = {**shares, **account}
    return with_facts(f"{head}\n\n{best}", known)


def trial_description(sweep: Sweep, values: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What MLflow's page of a trial says: how far it came, with what."""
    ended = "Complete" if result.get("complete") else f"Stopped by {sweep.spec.scheduler.name}"
    tried = {path: values[path] for path in sweep.spec.parameters}
    metrics = {name: value for name, value in result.items() if name.startswith("val/")}
    return with_facts(
        f"**{ended}** after {result.get('epoch', 0):.1f} epochs.", {**tried, **metrics}
    )
