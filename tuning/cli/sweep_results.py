"""The end of a sweep in the terminal: the leaderboard, the costs, and how to continue."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tuning.trials.leaderboard import Leaderboard, TrialResult
    from tuning.trials.trial import Sweep

SHOWN_TRIALS = 10


def print_results(
    console: "Console", sweep: "Sweep", board: "Leaderboard", tracked: "Mapping[str, Any]"
) -> None:
    """Print what `tuning.sweep.run_to_end` returned."""
    from trainers.run_folder import TRACKING
    from tuning.trials.leaderboard import failure_lines, has_ended

    if board.results:
        console.print(_leaderboard_table(sweep, board))
    if "failure" in tracked:
        console.print(f"the sweep failed: {tracked['failure']}", style="red", highlight=False)
    for line in failure_lines(board.failed, sweep.spec.total_trials):
        console.print(line, style="red", highlight=False)
    if sweep.spec.objective[1:]:
        front = ", ".join(f"{number:04d}" for number in board.pareto_trials)
        named = ", ".join(sweep.spec.objective)
        console.print(f"Pareto front of {named}: {front or 'unknown'}", highlight=False)
    if board.importances:
        shares = "  ".join(f"{path} {share:.2f}" for path, share in board.importances.items())
        console.print(f"importance: {shares}")
    if "unsent" in tracked:
        console.print(f"{tracked['unsent']}; kept in {sweep.folder / TRACKING}", style="yellow")
    else:
        console.print(f"MLflow run: {tracked['run_id']} (heliostat ui)")
    if "notice" in tracked:
        console.print(tracked["notice"], style="yellow", markup=False)
    for name, text in tracked.get("account", {}).items():
        console.print(f"{name}: {text}", highlight=False)
    if board.failed or not has_ended(sweep, board):
        console.print(_how_to_resume(sweep, board, tracked), highlight=False)
    if board.best is not None:
        console.print("\n".join(_how_to_use(sweep, board.best)))
    elif board.results and sweep.spec.constraints:
        console.print("no trial keeps all of sweep.constraints", style="yellow", highlight=False)


def _leaderboard_table(sweep: "Sweep", board: "Leaderboard") -> "Table":
    from rich.table import Table

    from tuning.trials.take_over import changes_text

    table = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    others = [objective.partition(" ")[0] for objective in sweep.spec.objective[1:]]
    repeated = sweep.spec.repeated_fields
    scores_of = [sweep.spec.metric, *(["mean, 95 %"] if repeated else []), *others]
    for column in ("trial", *scores_of, "epochs", "", *sweep.spec.parameters):
        table.add_column(column, justify="right", overflow="fold")
    for result in board.results[:SHOWN_TRIALS]:
        parameters = [
            _format_cell(result.parameters.get(path, "")) for path in sweep.spec.parameters
        ]
        objectives = [_format_cell(result.objectives.get(name, "unknown")) for name in others]
        mean = [str(result.repeated or "")] if repeated else []
        scores = (f"{result.value:.4f}", *mean, *objectives, f"{result.epoch:.1f}")
        stopped = "stopped" if result.number in board.ended else "interrupted"
        ended = [] if result.complete else [stopped]
        ended += [changes_text(result.changes)] if result.changes else []
        ended += ["breaks a constraint"] if result.violation else []
        table.add_row(f"{result.number:04d}", *scores, ", ".join(ended), *parameters)
    return table


def _format_cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _how_to_resume(sweep: "Sweep", board: "Leaderboard", tracked: "Mapping[str, Any]") -> str:
    """What has not ended, or has failed, and the command that goes on with it."""
    from cluster.connection.ray_connection import submission_metadata
    from trainers.run_folder import display_path
    from tuning.trials.leaderboard import has_ended

    reason = tracked.get("reason")  # the limit of the budget at which the sweep was stopped
    limit = (reason or "").partition(" ")[0].rstrip(":")
    raised = f" --set {limit}=MORE" if limit else ""
    state = "run those that failed again with"
    if "failure" in tracked:
        state = "once that is mended, continue with"
    elif not has_ended(sweep, board):
        state = (
            f"{f'{reason}; ' if reason else ''}stopped with {len(board.ended)} of "
            f"{sweep.spec.total_trials} trials ended; continue with"
        )
    return (
        f"{state}\n  heliostat {'submit ' if submission_metadata() else ''}sweep --resume "
        f"{display_path(sweep.folder)}{raised}"
    )


def _how_to_use(sweep: "Sweep", best: "TrialResult") -> Iterator[str]:
    """The best checkpoint, and the commands that train from it."""
    from trainers.checkpoints.place import checkpoint_at
    from trainers.run_folder import CHECKPOINTS, MODEL, display_path, display_place
    from tuning.fused.fusion_plan import planned_slots

    folder, trial = sweep.folder, sweep.trial_folder(best.number)
    train = f"heliostat train {display_path(folder)}/best.yaml"
    yield f"best checkpoint: {display_place(checkpoint_at(trial / CHECKPOINTS, best.step))}"
    if (folder / MODEL).exists():
        yield f'load its model: load_model("{display_path(folder)}")'
    rounding = " (alone, its value differs by rounding)" if planned_slots(sweep) else ""
    yield f"train it afresh: {train}{rounding}"
    from_step = f"{display_path(trial)}@{best.step}"
    yield f"train it further: {train} --from {from_step} --set train.epochs=N"
