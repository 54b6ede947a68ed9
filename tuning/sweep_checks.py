"""What may change in a sweep that has begun, checked before Ray starts."""

from collections.abc import Sequence
from pathlib import Path

from cluster.base.config import did_you_mean
from cluster.base.errors import SpecError
from trainers.engine.metric_names import validation_metrics
from trainers.workload import Workload
from tuning.spaces.constraints import parse_constraint
from tuning.spaces.searches import EXHAUSTIVE
from tuning.spaces.space import COST_METRICS, SweepRunSpec, SweepSpec
from tuning.trials.journal import Journal
from tuning.trials.trial import JOURNAL_FILE

CHANGEABLE = (
    *("budget", "cost"),
    *("sweep.trials", "sweep.repeat", "sweep.folds", "sweep.finalists", "sweep.concurrency"),
)
"""Sections and fields of the spec that may change in a sweep that has begun."""


def check_metrics(spec: SweepRunSpec, workload: Workload, dataset: Path) -> None:
    """Raise SpecError if trials are compared by a metric that evaluations do not report."""
    wanted = {"sweep.metric": [spec.sweep.metric]}
    if spec.sweep.objective:
        names = [objective.partition(" ")[0] for objective in spec.sweep.objective]
        wanted = {"sweep.objective": [name for name in names if name not in COST_METRICS]}
    bounded = [parse_constraint(text).metric for text in spec.sweep.constraints]
    wanted["sweep.constraints"] = [name for name in bounded if name not in COST_METRICS]
    if all(name == "val/loss" for names in wanted.values() for name in names):
        return  # nearly all workloads have it, and trying takes a moment
    known = validation_metrics(spec, workload, dataset)
    for path, names in wanted.items():
        for name in names:
            if known is not None and name not in known:
                raise SpecError(f"{path}: the workload has no {name}{did_you_mean(name, known)}")


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise SpecError for a field that cannot change in a sweep that has begun."""
    for assignment in overrides:
        path = assignment.partition("=")[0].strip()
        if not any(path == each or path.startswith(f"{each}.") for each in CHANGEABLE):
            raise SpecError(f"--set {assignment}: cannot change in a sweep that has begun")


def check_trials(folder: Path, sweep: SweepSpec, overrides: Sequence[str]) -> None:
    """Raise SpecError where `sweep.trials` of a sweep that has begun is changed in vain."""
    if not any(assignment.startswith("sweep.trials=") for assignment in overrides):
        return
    if sweep.search in EXHAUSTIVE:
        raise SpecError(f"sweep.trials: {sweep.search} tries every combination, and no more")
    begun = len(Journal(folder / JOURNAL_FILE).parameters)
    if sweep.trials > sweep.total_trials <= begun:
        raise SpecError(f"sweep.trials: all {begun} combinations of the space have been tried")
    if sweep.trials < begun:
        raise SpecError(f"sweep.trials: {begun} have begun already (got {sweep.trials})")
