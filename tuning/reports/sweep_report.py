"""The report of a sweep, from its folder, whether it is finished or not."""

import math
from collections.abc import Iterator, Mapping
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
from tuning.trials.leaderboard import Leaderboard, pareto_front, read_leaderboard
from tuning.trials.space import SweepSpec
from tuning.trials.trial import Sweep

MAX_POINTS = 30_000
"""Of the curves of the sweep's metric: Vega took 8 s to draw 100,000 on two busy cores."""
MAX_OTHER_POINTS = 20_000
"""Of the curves of all other metrics together."""
MAX_OTHER_METRICS = 5
"""How many others are drawn: those of validation, then of training."""
MAX_STEP_TIME_TRIALS = 20
"""The best so many trials whose steps are shown by their parts."""


def sweep_page(folder: Path) -> Page:
    """The report of the sweep in `folder`. Raises SpecError where nothing was tracked yet."""
    found = read_histories(folder)
    data = read_yaml(folder / SPEC)
    spec = validate(SweepSpec, data["sweep"], "sweep.")
    sweep = Sweep(data, spec, folder, folder)  # its data set is not looked at
    board = read_leaderboard(sweep)
    trials = {
        int(key.rpartition("/")[2]): record
        for key, record in sorted(found.items())
        if key != folder.name
    }
    record = found[folder.name]
    kinds = {number: end_status(each) for number, each in trials.items()}
    best = [trials[s.number] for s in board.results[:MAX_STEP_TIME_TRIALS]]
    timeline = busy_spans(folder, found)
    time_charts = list(run_report.step_time_charts(best, "trial")) if len(best) > 1 else []
    if timeline:
        named = {each.key: end_status(each) for each in found.values()}
        time_charts.insert(0, charts.timeline_chart(timeline, named))
    sections = [
        Section("Summary", [_summary_cards(spec, record, board, kinds)]),
        Section("Learning curves", list(_learning_curves(spec, board, trials, kinds))),
        Section("Leaderboard", list(_leaderboard(spec, board, trials, kinds))),
        Section("What the parameters did", list(_parameter_charts(spec, board, kinds))),
        Section("Pareto fronts", list(_pareto_charts(spec, board, trials, kinds))),
        Section("Where the time goes", time_charts),
        Section("Energy and cost", list(run_report.costs_table(record))),
        Section("How it was made", list(run_report.provenance(record))),
    ]
    return Page(record.key, run_report.subtitle(record), [each for each in sections if each.blocks])


def _summary_cards(
    spec: SweepSpec, record: RunHistory, board: Leaderboard, kinds: Mapping[int, str]
) -> list[StatCard]:
    ends = list(kinds.values())
    parts = ", ".join(
        f"{ends.count(kind)} {kind}"
        for kind in ("complete", "stopped", "failed", "running")
        if kind in ends
    )
    tiles = [StatCard("trials", f"{len(ends)} of {spec.total_trials}", parts)]
    if board.best:
        best = StatCard(
            f"best {spec.metric}", format_number(board.best.value), f"trial {board.best.number:04d}"
        )
        tiles.insert(0, best)
    return [*tiles, wall_time_card(record), *cost_cards(record)]


def _learning_curves(
    spec: SweepSpec, board: Leaderboard, trials: Mapping[int, RunHistory], kinds: Mapping[int, str]
) -> Iterator[Chart | str]:
    if not board.results:
        yield "No trial was evaluated yet."
        return
    epochs = {s.number: s.epoch / s.step for s in board.results if s.step}
    names = dict.fromkeys(name for number in epochs for name in trials[number].series)
    others = sorted(
        (
            name
            for name in names
            if name.startswith(("val/", "train/")) and name not in (spec.metric, "train/epoch")
        ),
        key=lambda name: (name.startswith("train/"), name),
    )[:MAX_OTHER_METRICS]
    for metric in (spec.metric, *others):
        whole = {n: trials[n].series[metric] for n in epochs if metric in trials[n].series}
        points = MAX_POINTS if metric == spec.metric else MAX_OTHER_POINTS // len(others)
        each = max(2, points // max(1, len(whole)))
        drawn = {n: (downsample(series, each), epochs[n]) for n, series in whole.items()}
        chart = sweep_charts.learning_curves(metric, drawn, kinds, board.results[0].number)
        thinned = any(len(series.steps) > each for series in whole.values())
        yield (
            _with_remark(chart, f" An even grid of {each} points of each is drawn.")
            if thinned
            else chart
        )


def _with_remark(chart: Chart, more: str) -> Chart:
    return replace(chart, description=chart.description + more)


def _leaderboard(
    spec: SweepSpec, board: Leaderboard, trials: Mapping[int, RunHistory], kinds: Mapping[int, str]
) -> Iterator[DataTable | str]:
    """Numbers are those that MLflow is told: the metric of the last evaluation, costs."""
    objectives = [objective.partition(" ")[0] for objective in spec.objective[1:]]
    costs = [
        name
        for name in ("cost_usd", "energy_j", "kg_co2e")
        if name not in objectives and any(name in record.series for record in trials.values())
    ]
    rows = [
        (
            standing.number,
            standing.value,
            *(trials[standing.number].latest(name) for name in (*objectives, *costs)),
            standing.epoch,
            kinds[standing.number],
            *(_cell(standing.parameters[path]) for path in spec.parameters),
        )
        for standing in board.results
    ]
    columns = ("trial", spec.metric, *objectives, *costs, "epochs", "ended", *spec.parameters)
    titled = [with_unit(name) for name in columns]
    goal = "least" if spec.mode == "min" else "greatest"
    caption = (
        f"All trials that were evaluated, the {goal} {spec.metric} first. A column's name sorts by "
        "it; a trial's number brings it out in the charts."
    )
    yield DataTable("leaderboard", caption, titled, rows, selects_trial=True)
    for number, reason in board.failed.items():
        yield f"Trial {number:04d} failed: {reason}"


def _cell(value: object) -> object:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain else str(value)


def _parameter_charts(
    spec: SweepSpec, board: Leaderboard, kinds: Mapping[int, str]
) -> Iterator[Chart | str]:
    standings = [s for s in board.results if math.isfinite(s.value)]
    if len(standings) < 2:
        return
    yield sweep_charts.parallel_coordinates(standings, spec.parameters, spec.metric, spec.mode)
    if board.importances:
        yield sweep_charts.importance_chart(board.importances, spec.metric)
    for path, space in spec.parameters.items():
        yield sweep_charts.slice_chart(path, standings, space, spec.metric, kinds)


def _pareto_charts(
    spec: SweepSpec, board: Leaderboard, trials: Mapping[int, RunHistory], kinds: Mapping[int, str]
) -> Iterator[Chart | str]:
    """The metric against each other objective, dollars and joules, where these are known."""
    objectives = dict(objective.split(" ") for objective in spec.objective)
    modes = {"cost_usd": "min", "energy_j": "min"} | objectives
    for other, mode in modes.items():
        points = {
            s.number: (cost, s.value)
            for s in board.results
            if (cost := trials[s.number].latest(other)) is not None
            and math.isfinite(cost)
            and math.isfinite(s.value)
        }
        if other == spec.metric or len(points) < 2:
            continue
        figures = {n: {other: cost, spec.metric: value} for n, (cost, value) in points.items()}
        best = pareto_front(figures, {spec.metric: spec.mode, other: mode})
        yield sweep_charts.pareto_chart(other, spec.metric, points, best, kinds)
    if len(objectives) > 2:
        names = ", ".join(f"{number:04d}" for number in board.pareto_trials)
        yield f"Front of {', '.join(spec.objective)} together: {names or 'unknown'}."
