"""Several sweeps compared in one page: what each found, how soon, and in what they differ."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.config import flatten, read_yaml, validate
from cluster.base.errors import SpecError
from trainers.reports.charts import PART_COLOURS
from trainers.reports.history import RunHistory, read_histories
from trainers.reports.page import DataTable, Page, Section, StatCard, format_number
from trainers.reports.run_report import cost_cards, wall_time_card
from trainers.reports.vega import Chart, Columns, choose_scale, data_source, quantitative, with_unit
from trainers.run_folder import SPEC, display_path, folder_kind
from tuning.reports.sweep_charts import cell_text, slug
from tuning.spaces.distributions import Distribution
from tuning.spaces.space import SweepSpec
from tuning.trials.leaderboard import Leaderboard, TrialResult, read_leaderboard
from tuning.trials.ranking import loss
from tuning.trials.trial import Sweep

MAX_BEST = 10
"""How many of each sweep's best trials the table has."""
UNLIKE = ("storage", "tracking.uri")
"""Fields that say where a sweep was run, and not what it did."""


@dataclass(frozen=True)
class _Compared:
    """One of the sweeps."""

    name: str
    data: dict[str, Any]
    """Its whole spec."""
    spec: SweepSpec
    board: Leaderboard
    histories: dict[str, RunHistory]
    key: str

    @property
    def history(self) -> RunHistory:
        return self.histories[self.key]

    def trial(self, number: int) -> RunHistory:
        return self.histories[f"{self.key}/{number:04d}"]


def comparison_page(folders: Sequence[Path]) -> Page:
    """The page that compares the sweeps in `folders`.

    Raises SpecError where they are not ranked by the same metric, or one is no sweep.
    """
    specs = [_read_spec(folder) for folder in folders]
    first = specs[0]
    for folder, spec in zip(folders, specs, strict=True):
        if (spec.metric, spec.mode) != (first.metric, first.mode):
            raise SpecError(
                f"sweep.metric: {folders[0].name} is ranked by {first.metric} ({first.mode}), and "
                f"{folder.name} by {spec.metric} ({spec.mode})"
            )
    names = [folder.name for folder in folders]
    if len({*names}) < len(names):
        names = [display_path(folder) for folder in folders]
    sweeps = [_read(*each) for each in zip(folders, specs, names, strict=True)]
    sections = [
        Section("Summary", [_cards(sweep) for sweep in sweeps]),
        Section("How soon", list(_progress_charts(sweeps))),
        Section("All trials", list(_sorted_values(sweeps))),
        Section("Best trials", [_best_table(sweeps)]),
        Section("By parameter", list(_parameter_charts(sweeps))),
        Section("Differences", list(_differences(sweeps))),
    ]
    title = " and ".join(sweep.name for sweep in sweeps)
    subtitle = f"{len(sweeps)} sweeps, compared by {first.metric} ({first.mode})"
    return Page(title, subtitle, [section for section in sections if section.blocks])


def _read_spec(folder: Path) -> SweepSpec:
    if folder_kind(folder) != "sweep":
        raise SpecError(f"{folder.name}: is no sweep; only sweeps are compared")
    return validate(SweepSpec, read_yaml(folder / SPEC)["sweep"], "sweep.")


def _read(folder: Path, spec: SweepSpec, name: str) -> _Compared:
    data = read_yaml(folder / SPEC)
    board = read_leaderboard(Sweep(data, spec, folder, folder))
    return _Compared(name, data, spec, board, read_histories(folder), folder.name)


def _cards(sweep: _Compared) -> list[StatCard]:
    board, best = sweep.board, sweep.board.best
    counts = f"{len(board.failed)} failed" if board.failed else ""
    trials = StatCard("trials", f"{len(board.ended)} of {sweep.spec.total_trials}", counts)
    found = StatCard(f"{sweep.name}: best {sweep.spec.metric}", "none")
    if best is not None:
        mean = f", mean {best.repeated}" if best.repeated else ""
        found = StatCard(found.label, format_number(best.value), f"trial {best.number:04d}{mean}")
    return [found, trials, wall_time_card(sweep.history), *cost_cards(sweep.history)]


def _progress_charts(sweeps: Sequence[_Compared]) -> Iterator[Chart]:
    """The best value so far, over the trials, the time, the cost and the energy of each sweep."""

    def place(sweep: _Compared, result: TrialResult) -> float:
        return sweep.trial(result.number).last_update_ms

    def seconds(sweep: _Compared, result: TrialResult) -> float:
        return (place(sweep, result) - sweep.history.started_ms) / 1000

    def spent(name: str) -> Callable[[_Compared, TrialResult], float]:
        return lambda sweep, result: sweep.trial(result.number).latest(name) or 0.0

    yield _best_so_far(sweeps, "trials", "evaluated trials", lambda *_: 1.0, place)
    yield _best_so_far(sweeps, "time", "seconds since the sweep began", seconds, place, sums=False)
    for name in ("cost_usd", "energy_j"):
        if all(name in sweep.history.series for sweep in sweeps):
            yield _best_so_far(sweeps, slug(name), f"{name} of the trials", spent(name), place)


def _best_so_far(
    sweeps: Sequence[_Compared],
    name: str,
    x_title: str,
    amount: Callable[[_Compared, TrialResult], float],
    place: Callable[[_Compared, TrialResult], float],
    sums: bool = True,
) -> Chart:
    """A stair for each sweep. `amount` is what a trial adds to x, or x itself without `sums`."""
    spec = sweeps[0].spec
    table: dict[str, list[Any]] = {"sweep": [], "x": [], "value": [], "trial": []}
    for sweep in sweeps:
        total, best = 0.0, math.inf
        for result in sorted(sweep.board.results, key=lambda each: place(sweep, each)):
            total = amount(sweep, result) + (total if sums else 0.0)
            best = min(best, loss(spec, result.value))
            if best < math.inf:
                value = -best if spec.mode == "max" else best
                row = (sweep.name, total, value, result.number)
                for column, cell in zip(table.values(), row, strict=True):
                    column.append(cell)
    ends = [
        f"{sweep.name} {format_number(values[-1])}"
        for sweep in sweeps
        if (values := [v for s, v in zip(*_pair(table), strict=True) if s == sweep.name])
    ]
    mark = {"type": "line", "interpolate": "step-after", "point": True, "tooltip": True}
    text = f"The best {spec.metric} so far, over the {x_title}. At the end: {', '.join(ends)}."
    title = f"Best {spec.metric} over {x_title}"
    encoding = _encoding(sweeps, table, quantitative("x", x_title))
    whole = {**data_source("best"), "mark": mark, "encoding": encoding}
    return Chart(f"best-over-{name}", title, text, whole, {"best": table})


def _pair(table: dict[str, list[Any]]) -> tuple[list[Any], list[Any]]:
    return table["sweep"], table["value"]


def _encoding(sweeps: Sequence[_Compared], table: Columns, x: dict[str, Any]) -> dict[str, Any]:
    """The metric over `x`, in the colour of the sweep."""
    names = [sweep.name for sweep in sweeps]
    colours = [PART_COLOURS[place % len(PART_COLOURS)] for place in range(len(names))]
    return {
        "x": x,
        "y": quantitative(
            "value", with_unit(sweeps[0].spec.metric), scale=choose_scale(table["value"])
        ),
        "color": {
            "field": "sweep",
            "type": "nominal",
            "title": None,
            "scale": {"domain": names, "range": colours},
        },
        "tooltip": [{"field": name} for name in table],
    }


def _sorted_values(sweeps: Sequence[_Compared]) -> Iterator[Chart]:
    """The values of all trials of each sweep, the best first: how good, and how many."""
    rows = [
        (sweep.name, place / (len(values) - 1) if len(values) > 1 else 0.0, result.value)
        for sweep in sweeps
        if (values := _by_value(sweep))
        for place, result in enumerate(values)
    ]
    if not rows:
        return
    names, shares, values = (list(column) for column in zip(*rows, strict=True))
    table: Columns = {"sweep": names, "x": shares, "value": values}
    x = quantitative("x", "share of the trials that are better", axis={"format": "%"})
    mark = {"type": "line", "point": len(rows) < 200, "tooltip": True}
    spec = {**data_source("values"), "mark": mark, "encoding": _encoding(sweeps, table, x)}
    text = f"{sweeps[0].spec.metric} of all trials of each sweep, the best first."
    yield Chart("sorted-values", "Values of all trials", text, spec, {"values": table})


def _by_value(sweep: _Compared) -> list[TrialResult]:
    finite = [result for result in sweep.board.results if math.isfinite(result.value)]
    return sorted(finite, key=lambda result: loss(sweep.spec, result.value))


def _best_table(sweeps: Sequence[_Compared]) -> DataTable:
    """The best trials of all sweeps together; empty cells are fields that a sweep did not vary."""
    spec = sweeps[0].spec
    paths = list(dict.fromkeys(path for sweep in sweeps for path in sweep.spec.parameters))
    ranked = [(sweep, result) for sweep in sweeps for result in sweep.board.results[:MAX_BEST]]
    ranked.sort(key=lambda each: loss(spec, each[1].value))
    rows = [
        (
            sweep.name,
            f"{result.number:04d}",
            result.value,
            str(result.repeated or ""),
            result.epoch,
            *(_cell(result.parameters.get(path)) for path in paths),
        )
        for sweep, result in ranked
    ]
    columns = ("sweep", "trial", with_unit(spec.metric), "mean", "epochs", *paths)
    caption = f"The {MAX_BEST} best trials of each sweep. Select a column to sort by it."
    return DataTable("best", caption, columns, rows)


def _cell(value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if number or value is None else str(value)


def _parameter_charts(sweeps: Sequence[_Compared]) -> Iterator[Chart]:
    """The metric over each parameter that all sweeps vary."""
    for path, space in sweeps[0].spec.parameters.items():
        if not all(path in sweep.spec.parameters for sweep in sweeps[1:]):
            continue
        rows = [
            (sweep.name, result.parameters[path], result.value, result.number)
            for sweep in sweeps
            for result in _by_value(sweep)
            if path in result.parameters
        ]
        if len(rows) > 1:
            yield _slice(sweeps, path, space, rows)


def _slice(
    sweeps: Sequence[_Compared], path: str, space: Distribution, rows: Sequence[tuple[Any, ...]]
) -> Chart:
    words = space.choice is not None or any(isinstance(row[1], (str, bool)) for row in rows)
    names, values, metric, trials = (list(column) for column in zip(*rows, strict=True))
    table: Columns = {
        "sweep": names,
        "x": [cell_text(value) for value in values] if words else values,
        "value": metric,
        "trial": trials,
    }
    x: dict[str, Any] = {"field": "x", "type": "nominal", "title": path, "axis": {"labelAngle": 0}}
    if not words:
        x = quantitative("x", path, scale={"type": "log" if space.is_log else "linear"})
        x["scale"] |= {} if space.is_log else {"zero": False}
    mark = {"type": "point", "filled": True, "size": 45, "opacity": 0.75}
    spec = {**data_source("dots"), "mark": mark, "encoding": _encoding(sweeps, table, x)}
    text = f"{sweeps[0].spec.metric} of each trial by its {path}, in the colour of its sweep."
    return Chart(f"slice-{slug(path)}", path, text, spec, {"dots": table}, 220)


def _differences(sweeps: Sequence[_Compared]) -> Iterator[DataTable | str]:
    """The fields of the specs that are not the same in all sweeps, and how long each took."""
    flat = [flatten(sweep.data) for sweep in sweeps]
    rows = []
    for path in dict.fromkeys(path for fields in flat for path in fields):
        texts = [json.dumps(fields[path]) if path in fields else "" for fields in flat]
        if len({*texts}) > 1 and path not in UNLIKE:
            rows.append((path, *texts))
    if not rows:
        yield "The specs are the same in every field."
        return
    rows.append(("(wall time)", *(wall_time_card(sweep.history).value for sweep in sweeps)))
    columns = ("field", *(sweep.name for sweep in sweeps))
    yield DataTable("differences", "Fields that differ", columns, rows)
