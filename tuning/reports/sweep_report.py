"""The report of a sweep, from its folder, whether it is finished or not."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cluster.base.config import check, read_yaml
from trainers.reports import charts, run_report
from trainers.reports.charts import Chart
from trainers.reports.history import Record, records, spans
from trainers.reports.page import Page, Section, Sheet, Tile, shown
from trainers.reports.run_report import cost_tiles, kind_of, thin, took
from trainers.run_folder import SPEC
from tuning.reports import sweep_charts
from tuning.trials.leaderboard import Leaderboard, leaderboard, pareto_front
from tuning.trials.space import SweepSpec
from tuning.trials.trial import Sweep

MOST_POINTS = 30_000
"""Of the curves of the sweep's metric: Vega took 8 s to draw 100,000 on two busy cores."""
MORE_POINTS = 20_000
"""Of the curves of all other metrics together."""
MORE_METRICS = 5
"""How many others are drawn: those of validation, then of training."""
SPLITS_OF = 20
"""The best so many trials whose steps are shown by their parts."""


def sweep_page(folder: Path) -> Page:
    """The report of the sweep in `folder`. Raises SpecError where nothing was tracked yet."""
    found = records(folder)
    data = read_yaml(folder / SPEC)
    spec = check(SweepSpec, data["sweep"], "sweep.")
    sweep = Sweep(data, spec, folder, folder)  # its data set is not looked at
    board = leaderboard(sweep)
    trials = {
        int(key.rpartition("/")[2]): record
        for key, record in sorted(found.items())
        if key != folder.name
    }
    record = found[folder.name]
    kinds = {number: kind_of(each) for number, each in trials.items()}
    best = [trials[s.number] for s in board.standings[:SPLITS_OF]]
    timeline = spans(folder, found)
    time_charts = list(run_report.splits(best, "trial")) if len(best) > 1 else []
    if timeline:
        named = {each.key: kind_of(each) for each in found.values()}
        time_charts.insert(0, charts.timeline(timeline, named))
    sections = [
        Section("Summary", [_summary(spec, record, board, kinds)]),
        Section("Learning curves", list(_curves(spec, board, trials, kinds))),
        Section("Leaderboard", list(_leaderboard(spec, board, trials, kinds))),
        Section("What the parameters did", list(_parameters(spec, board, kinds))),
        Section("Pareto fronts", list(_fronts(spec, board, trials, kinds))),
        Section("Where the time goes", time_charts),
        Section("Energy and cost", list(run_report.costs(record))),
        Section("How it was made", list(run_report.made_with(record))),
    ]
    return Page(record.key, run_report.lead(record), [each for each in sections if each.blocks])


def _summary(
    spec: SweepSpec, record: Record, board: Leaderboard, kinds: Mapping[int, str]
) -> list[Tile]:
    ends = list(kinds.values())
    parts = ", ".join(
        f"{ends.count(kind)} {kind}"
        for kind in ("complete", "stopped", "failed", "running")
        if kind in ends
    )
    tiles = [Tile("trials", f"{len(ends)} of {spec.total_trials}", parts)]
    if board.best:
        best = Tile(
            f"best {spec.metric}", shown(board.best.value), f"trial {board.best.number:04d}"
        )
        tiles.insert(0, best)
    return [*tiles, took(record), *cost_tiles(record)]


def _curves(
    spec: SweepSpec, board: Leaderboard, trials: Mapping[int, Record], kinds: Mapping[int, str]
) -> Iterator[Chart | str]:
    if not board.standings:
        yield "No trial was evaluated yet."
        return
    epochs = {s.number: s.epoch / s.step for s in board.standings if s.step}
    names = dict.fromkeys(name for number in epochs for name in trials[number].series)
    others = sorted(
        (
            name
            for name in names
            if name.startswith(("val/", "train/")) and name not in (spec.metric, "train/epoch")
        ),
        key=lambda name: (name.startswith("train/"), name),
    )[:MORE_METRICS]
    for metric in (spec.metric, *others):
        whole = {n: trials[n].series[metric] for n in epochs if metric in trials[n].series}
        points = MOST_POINTS if metric == spec.metric else MORE_POINTS // len(others)
        each = max(2, points // max(1, len(whole)))
        drawn = {n: (thin(series, each), epochs[n]) for n, series in whole.items()}
        chart = sweep_charts.curves(metric, drawn, kinds, board.standings[0].number)
        thinned = any(len(series.steps) > each for series in whole.values())
        yield (
            _said(chart, f" An even grid of {each} points of each is drawn.") if thinned else chart
        )


def _said(chart: Chart, more: str) -> Chart:
    return replace(chart, text=chart.text + more)


def _leaderboard(
    spec: SweepSpec, board: Leaderboard, trials: Mapping[int, Record], kinds: Mapping[int, str]
) -> Iterator[Sheet | str]:
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
        for standing in board.standings
    ]
    columns = ("trial", spec.metric, *objectives, *costs, "epochs", "ended", *spec.parameters)
    titled = [charts.titled(name) for name in columns]
    goal = "least" if spec.mode == "min" else "greatest"
    caption = (
        f"All trials that were evaluated, the {goal} {spec.metric} first. A column's name sorts by "
        "it; a trial's number brings it out in the charts."
    )
    yield Sheet("leaderboard", caption, titled, rows, picks=True)
    for number, reason in board.failed.items():
        yield f"Trial {number:04d} failed: {reason}"


def _cell(value: object) -> object:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain else str(value)


def _parameters(
    spec: SweepSpec, board: Leaderboard, kinds: Mapping[int, str]
) -> Iterator[Chart | str]:
    standings = [s for s in board.standings if math.isfinite(s.value)]
    if len(standings) < 2:
        return
    yield sweep_charts.parallel(standings, spec.parameters, spec.metric, spec.mode)
    if board.importances:
        yield sweep_charts.importances(board.importances, spec.metric)
    for path, space in spec.parameters.items():
        yield sweep_charts.sliced(path, standings, space, spec.metric, kinds)


def _fronts(
    spec: SweepSpec, board: Leaderboard, trials: Mapping[int, Record], kinds: Mapping[int, str]
) -> Iterator[Chart | str]:
    """The metric against each other objective, dollars and joules, where these are known."""
    objectives = dict(objective.split(" ") for objective in spec.objective)
    modes = {"cost_usd": "min", "energy_j": "min"} | objectives
    for other, mode in modes.items():
        points = {
            s.number: (cost, s.value)
            for s in board.standings
            if (cost := trials[s.number].latest(other)) is not None
            and math.isfinite(cost)
            and math.isfinite(s.value)
        }
        if other == spec.metric or len(points) < 2:
            continue
        figures = {n: {other: cost, spec.metric: value} for n, (cost, value) in points.items()}
        best = pareto_front(figures, {spec.metric: spec.mode, other: mode})
        yield sweep_charts.front(other, spec.metric, points, best, kinds)
    if len(objectives) > 2:
        names = ", ".join(f"{number:04d}" for number in board.front)
        yield f"Front of {', '.join(spec.objective)} together: {names or 'unknown'}."
