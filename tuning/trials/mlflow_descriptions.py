"""The descriptions of sweeps and trials on their MLflow pages, as markdown."""

from collections.abc import Mapping
from typing import Any

from trainers.tracking.mlflow_run import markdown_table, with_facts
from tuning.trials.leaderboard import Leaderboard
from tuning.trials.ranking import selected
from tuning.trials.take_over import CHANGES, changes_text
from tuning.trials.trial import Sweep

MAX_DESCRIBED_TRIALS = 10
"""Trials in the description of a sweep."""


def sweep_description(sweep: Sweep, board: Leaderboard, account: Mapping[str, str]) -> str:
    """The best trials of a sweep, the importances of its parameters, and its costs."""
    total = sweep.spec.total_trials
    head = f"{len(board.ended)} of {total} trials have ended, {len(board.failed)} of them failed."
    paths = list(sweep.spec.parameters)
    rows = [
        (f"{r.number:04d}", r.value, r.epoch, *(r.parameters.get(path, "") for path in paths))
        for r in board.results[:MAX_DESCRIBED_TRIALS]
    ]
    best = markdown_table(("trial", sweep.spec.metric, "epochs", *paths), rows)
    shares = {f"importance of {path}": share for path, share in board.importances.items()}
    facts: dict[str, object] = {**shares, **account}
    return with_facts(f"{head}\n\n{best}", facts)


def trial_description(
    sweep: Sweep, parameters: Mapping[str, Any], result: Mapping[str, Any], stopped: str
) -> str:
    """How far a trial came, with its parameters and its metrics.

    `stopped` is what stopped it: a scheduler, or "hand"; empty for a complete trial.
    """
    ended = f"Stopped by {stopped}" if stopped else "Complete"
    tried = {p: parameters[p] for p in sweep.spec.parameters if p in parameters}
    counts = selected(sweep.spec, result)
    metrics = {name: value for name, value in counts.items() if name.startswith("val/")}
    head = f"**{ended}** after {result.get('epoch', 0):.1f} epochs."
    if changes := result.get(CHANGES):
        head += f" The parameters were {changes_text(changes)}; these are the last ones."
    return with_facts(head, {**tried, **metrics})
