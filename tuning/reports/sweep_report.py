"""The report of a sweep, finished or not, from its folder."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.base.config import read_yaml, validate
from trainers.reports import charts, run_report
from trainers.reports.history import RunHistory, busy_spans, read_histories
from trainers.reports.page import DataTable, Page, Section, StatCard, format_number
from trainers.reports.run_report import cost_cards, downsample, end_status, wall_time_card
from trainers.reports.vega import Chart, with_unit
from trainers.run_folder import SPEC
from tuning.reports import sweep_charts
from tuning.reports.parallel_coordinates import parallel_coordinates
from tuning.spaces.space import COST_METRICS, SweepSpec
from tuning.trials.leaderboard import (
    Leaderboard,
    TrialResult,
    failure_lines,
    pareto_front,
    read_leaderboard,
    with_importances,
)
from tuning.trials.ranking import objective_modes
from tuning.trials.take_over import changes_text
from tuning.trials.trial import Sweep

MAX_POINTS = 30_000
"""Points of all curves of the sweep's metric: Vega took 8 s for 100,000 on two busy cores."""
MAX_OTHER_POINTS = 20_000
"""Points of the curves of all other metrics together."""
MAX_OTHER_METRICS = 5
"""How many other metrics are drawn: validation metrics first, then those of training."""
MAX_STEP_TIME_TRIALS = 20
"""How many of the best trials the chart of step times has."""


def sweep_page(folder: Path) -> Page:
    """The report of the sweep in `folder`. Raises SpecError where nothing was tracked yet."""
    histories = read_histories(folder)
    data = read_yaml(folder / SPEC)
    spec = validate(SweepSpec, data["sweep"], "sweep.")
    sweep = Sweep(data, spec, folder, folder)  # the report does not read the data set
    board = with_importances(sweep, read_leaderboard(sweep))
    history = histories[folder.name]
    trials = {
        int(key.rpartition("/")[2]): trial
        for key, trial in sorted(histories.items())
        if key != folder.name
    }
    statuses = {number: end_status(trial) for number, trial in trials.items()}
    sections = [
        Section("Summary", [_summary_cards(spec, history, board, statuses)]),
        Section("Learning curves", list(_learning_curves(spec, board, trials, statuses))),
        Section("Leaderboard", list(_leaderboard(spec, board, trials, statuses))),
        Section("Effect of the parameters", list(_parameter_charts(spec, board, statuses))),
        Section("Pareto fronts", list(_pareto_charts(spec, board, trials, statuses))),
        Section("Where the time goes", list(_time_charts(folder, histories, board, trials))),
        Section("Energy and cost", list(run_report.costs_table(history))),
        Section("How it was made", list(run_report.provenance(history))),
    ]
    shown = [section for section in sections if section.blocks]
    return Page(history.key, run_report.subtitle(history), shown)


def _summary_cards(
    spec: SweepSpec, history: RunHistory, board: Leaderboard, statuses: Mapping[int, str]
) -> list[StatCard]:
    ends = list(statuses.values())
    counts = ", ".join(
        f"{ends.count(status)} {status}"
        for status in ("complete", "stopped", "failed", "running")
        if status in ends
    )
    cards = [StatCard("trials", f"{len(ends)} of {spec.total_trials}", counts)]
    if board.best:
        value, trial = format_number(board.best.value), f"trial {board.best.number:04d}"
        cards.insert(0, StatCard(f"best {spec.metric}", value, trial))
    return [*cards, wall_time_card(history), *cost_cards(history)]


def _learning_curves(
    spec: SweepSpec,
    board: Leaderboard,
    trials: Mapping[int, RunHistory],
    statuses: Mapping[int, str],
) -> Iterator[Chart | str]:
    """The curves of the sweep's metric and of a few others, downsampled where they are long."""
    if board.best is None:
        finite = f"No trial has a finite {spec.metric} yet."
        yield finite if board.results else "No trial was evaluated yet."
        return
    epochs_per_step = {r.number: r.epoch / r.step for r in board.results if r.step}
    others = _other_metrics(spec, [trials[number] for number in epochs_per_step])
    for metric in (spec.metric, *others):
        series = {
            n: trials[n].series[metric] for n in epochs_per_step if metric in trials[n].series
        }
        total = MAX_POINTS if metric == spec.metric else MAX_OTHER_POINTS // len(others)
        points = max(2, total // max(1, len(series)))
        drawn = {n: (downsample(own, points), epochs_per_step[n]) for n, own in series.items()}
        chart = sweep_charts.learning_curves(metric, drawn, statuses, board.best.number)
        if any(len(own.steps) > points for own in series.values()):
            remark = f" An even grid of {points} points of each trial is drawn."
            chart = replace(chart, description=chart.description + remark)
        yield chart


def _other_metrics(spec: SweepSpec, trials: list[RunHistory]) -> list[str]:
    names = dict.fromkeys(name for trial in trials for name in trial.series)
    others = [
        name
        for name in names
        if name.startswith(("val/", "train/")) and name not in (spec.metric, "train/epoch")
    ]
    return sorted(others, key=lambda name: (name.startswith("train/"), name))[:MAX_OTHER_METRICS]


def _leaderboard(
    spec: SweepSpec,
    board: Leaderboard,
    trials: Mapping[int, RunHistory],
    statuses: Mapping[int, str],
) -> Iterator[DataTable | str]:
    """All evaluated trials with the numbers that MLflow has, and the errors of failed trials."""
    objectives = [objective.partition(" ")[0] for objective in spec.objective[1:]]
    costs = [
        name
        for name in COST_METRICS
        if name not in objectives and any(name in trial.series for trial in trials.values())
    ]
    rows = [
        (
            result.number,
            result.value,
            *_mean_cells(spec, result),
            *(
                result.objectives.get(name, trials[result.number].latest(name))
                for name in (*objectives, *costs)
            ),
            result.epoch,
            ", ".join([statuses[result.number], *_changed(result)]),
            *(_cell(result.parameters.get(path, "")) for path in spec.parameters),
        )
        for result in board.results
    ]
    means = ("mean", "± (95 %)", "trainings") if spec.repeated_fields else ()
    scores = (spec.metric, *means, *objectives, *costs)
    columns = ("trial", *scores, "epochs", "ended", *spec.parameters)
    first = "lowest" if spec.mode == "min" else "highest"
    caption = (
        f"All trials that were evaluated, the {first} {spec.metric} first. Select a column to sort "
        "by it, or the number of a trial to highlight it in the charts."
    )
    titles = [with_unit(name) for name in columns]
    yield DataTable("leaderboard", caption, titles, rows, selects_trial=True)
    yield from failure_lines(board.failed, spec.total_trials)


def _mean_cells(spec: SweepSpec, result: TrialResult) -> Sequence[object]:
    """The mean over the trainings of a configuration, half of its interval, and their number."""
    if not spec.repeated_fields:
        return ()
    if result.repeated is None:
        return (None, None, 1)
    return result.repeated.mean, result.repeated.half_width, len(result.repeated.values)


def _changed(result: TrialResult) -> list[str]:
    return [changes_text(result.changes)] if result.changes else []


def _cell(value: object) -> object:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number else str(value)


def _parameter_charts(
    spec: SweepSpec, board: Leaderboard, statuses: Mapping[int, str]
) -> Iterator[Chart]:
    results = [r for r in board.results if math.isfinite(r.value)]
    if len(results) < 2:
        return
    tried = {path for r in results for path in r.parameters}
    shown = {p: d for p, d in spec.parameters.items() if d.same_as is None and p in tried}
    yield parallel_coordinates(results, shown, spec.metric, spec.mode)
    if board.importances:
        yield sweep_charts.importance_chart(board.importances, spec.metric)
    for path, space in shown.items():
        yield sweep_charts.slice_chart(path, results, space, spec.metric, statuses)


def _pareto_charts(
    spec: SweepSpec,
    board: Leaderboard,
    trials: Mapping[int, RunHistory],
    statuses: Mapping[int, str],
) -> Iterator[Chart | str]:
    """The metric over each other objective, and over dollars and joules where they are known."""
    objectives = objective_modes(spec) if spec.objective else {}
    modes = {"cost_usd": "min", "energy_j": "min"} | objectives
    for other, mode in modes.items():
        points = {
            r.number: (cost, r.value)
            for r in board.results
            if (cost := r.objectives.get(other, trials[r.number].latest(other))) is not None
            and math.isfinite(cost)
            and math.isfinite(r.value)
        }
        if other == spec.metric or len(points) < 2:
            continue
        values = {n: {other: cost, spec.metric: value} for n, (cost, value) in points.items()}
        front = pareto_front(values, {spec.metric: spec.mode, other: mode})
        yield sweep_charts.pareto_chart(other, spec.metric, points, front, statuses)
    if len(objectives) > 2:
        names = ", ".join(f"{number:04d}" for number in board.pareto_trials)
        yield f"Front of {', '.join(spec.objective)} together: {names or 'unknown'}."


def _time_charts(
    folder: Path,
    histories: Mapping[str, RunHistory],
    board: Leaderboard,
    trials: Mapping[int, RunHistory],
) -> Iterator[Chart | str]:
    timeline = busy_spans(folder, histories)
    if timeline:
        statuses = {history.key: end_status(history) for history in histories.values()}
        yield charts.timeline_chart(timeline, statuses)
    best = [trials[r.number] for r in board.results[:MAX_STEP_TIME_TRIALS]]
    if len(best) > 1:
        yield from run_report.step_time_charts(best, "trial")
