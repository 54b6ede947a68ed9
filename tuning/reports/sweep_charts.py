"""The charts of a sweep: its trials' curves, what they tried, and what that brought."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainers.reports.charts import status_colours
from trainers.reports.history import Series
from trainers.reports.vega import (
    Chart,
    Columns,
    choose_scale,
    data_source,
    quantitative,
    with_unit,
)
from tuning.trials.leaderboard import TrialResult
from tuning.trials.space import Distribution

AXIS_WIDTH = 95
"""Pixels that each axis of the parallel coordinates needs for its labels."""


def slug(text: str) -> str:
    return text.replace("/", "-").replace("_", "-").replace(".", "-")


def selected_trial(best: int) -> list[dict[str, Any]]:
    """The trial that is brought out: the best, until the page sets another one."""
    return [{"name": "picked", "value": best}]


def learning_curves(
    metric: str, series: Mapping[int, tuple[Series, float]], kinds: Mapping[int, str], best: int
) -> Chart:
    """One metric of all trials; of each its points, and epochs of a step."""
    points: Columns = {
        "trial": [number for number, (own, _) in series.items() for _ in own.steps],
        "epoch": [step * epoch for own, epoch in series.values() for step in own.steps],
        "value": [value for own, _ in series.values() for value in own.values],
    }
    trials: Columns = {"trial": list(series), "kind": [kinds[number] for number in series]}
    order = [
        kind for kind in ("complete", "running", "stopped", "failed") if kind in trials["kind"]
    ]
    x = quantitative("epoch", "epoch", scale={"nice": False, "zero": False})
    y = quantitative("value", with_unit(metric), scale=choose_scale(points["value"]))
    faint = max(0.12, min(0.7, 12 / max(1, len(series))))
    each = {
        # With `opacity` each line would be a layer of its own, and a thousand take a minute.
        "mark": {"type": "line", "strokeWidth": 1.2, "strokeOpacity": faint, "aria": False},
        "transform": [
            {
                "lookup": "trial",
                "from": {"data": {"name": "trials"}, "key": "trial", "fields": ["kind"]},
            }
        ],
        "encoding": {
            "x": x,
            "y": y,
            "detail": {"field": "trial"},
            "color": status_colours(order),
            "tooltip": [{"field": "trial", "title": "trial"}, {"field": "kind", "title": "ended"}],
        },
    }
    tooltip = [{"field": name} for name in ("trial", "epoch", "value")]
    one = {
        "mark": {
            "type": "line",
            "strokeWidth": 2.5,
            "color": "$accent",
            "point": {"size": 16, "color": "$accent"},
        },
        "transform": [{"filter": "datum.trial == picked"}],
        "encoding": {"x": x, "y": y, "tooltip": tooltip},
    }
    text = (
        f"{metric} of {len(series):,} trials over their epochs; trial {best:04d}, the best, is "
        "brought out, or the one that is chosen in the leaderboard."
    )
    spec = {"params": selected_trial(best), **data_source("points"), "layer": [each, one]}
    return Chart(
        f"curves-{slug(metric)}", metric, text, spec, {"points": points, "trials": trials}, 320
    )


def parallel_coordinates(
    standings: Sequence[TrialResult], space: Mapping[str, Distribution], metric: str, mode: str
) -> Chart:
    """Each trial as a line through its values; the last axis is the metric."""
    lines: dict[str, list[Any]] = {"trial": [], "axis": [], "at": [], "value": [], "set": []}
    ends: dict[str, list[Any]] = {"axis": [], "at": [], "text": []}
    for path, values in [
        *((path, [s.parameters[path] for s in standings]) for path in space),
        (metric, [s.value for s in standings]),
    ]:
        low, high, positions = _positions(values, space.get(path))
        for standing, value, position in zip(standings, values, positions, strict=True):
            row = (standing.number, path, position, standing.value, _cell_text(value))
            for name, cell in zip(lines, row, strict=True):
                lines[name].append(cell)
        ends["axis"] += [path, path]
        ends["at"] += [0, 1]
        ends["text"] += [_cell_text(low), _cell_text(high)]
    axes = [*space, metric]
    x = {
        "field": "axis",
        "type": "nominal",
        "sort": axes,
        "title": None,
        "axis": {"labelAngle": -20, "grid": True, "domain": False, "labelOverlap": False},
        "scale": {"padding": 0.3},
    }
    y = quantitative("at", "", axis=None, scale={"domain": [-0.06, 1.06]})
    colour = quantitative(
        "value",
        with_unit(metric),
        scale={"scheme": "$scheme", "reverse": mode == "min"},
        legend={"gradientLength": 180},
    )
    tooltip = [{"field": name} for name in ("trial", "value")]
    trial = {"field": "trial"}
    shape = {"x": x, "y": y, "detail": trial, "tooltip": tooltip}
    faint = max(0.15, min(0.8, 40 / max(1, len(standings))))
    each = {
        **data_source("lines"),
        "mark": {"type": "line", "strokeWidth": 1.3, "strokeOpacity": faint, "aria": False},
        "encoding": {**shape, "color": colour},
    }
    one = {
        **data_source("lines"),
        "transform": [{"filter": "datum.trial == picked"}],
        "mark": {"type": "line", "strokeWidth": 3, "color": "$accent"},
        "encoding": shape,
    }
    labels = [
        {
            **data_source("ends"),
            "transform": [{"filter": f"datum.at == {at}"}],
            "mark": {
                "type": "text",
                "color": "$ink",
                "fontSize": 11,
                "baseline": "middle",
                "dy": dy,
            },
            "encoding": {"x": x, "y": y, "text": {"field": "text"}},
        }
        for at, dy in ((0, 8), (1, -8))
    ]
    best = standings[0].number
    text = (
        f"Every line is one of {len(standings):,} trials, through the values that it had, coloured "
        f"by {metric}; trial {best:04d} is brought out. The numbers are those of the leaderboard."
    )
    spec = {"params": selected_trial(best), "layer": [each, one, *labels]}
    tables = {"lines": lines, "ends": ends}
    width = AXIS_WIDTH * len(axes)
    return Chart("parallel-coordinates", "Parallel coordinates", text, spec, tables, 300, width)


def _positions(values: Sequence[Any], space: Distribution | None) -> tuple[Any, Any, list[float]]:
    """What is at the foot of an axis, what at its head, and where on it each value is."""
    if space is not None and space.choice is not None:
        texts = [_cell_text(choice) for choice in space.choice]
        top = max(1, len(texts) - 1)
        return texts[0], texts[-1], [texts.index(_cell_text(value)) / top for value in values]
    known = [float(value) for value in values if math.isfinite(value)]
    low, high = space.bounds if space and space.bounds else (min(known), max(known))
    into = math.log if space is not None and "log" in space.kind else float
    wide = (into(high) - into(low)) or 1.0
    places = [
        (into(value) - into(low)) / wide if math.isfinite(value) else math.nan for value in values
    ]
    return low, high, places


def _cell_text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def importance_chart(shares: Mapping[str, float], metric: str) -> Chart:
    table: Columns = {"parameter": list(shares), "share": list(shares.values())}
    spec = {
        **data_source("shares"),
        "mark": {"type": "bar", "color": "$blue", "tooltip": True},
        "encoding": {
            "y": {"field": "parameter", "type": "nominal", "sort": "-x", "title": None},
            "x": quantitative("share", f"share of the variance of {metric}", axis={"format": "%"}),
        },
    }
    most = ", ".join(f"{path} {share:.0%}" for path, share in list(shares.items())[:3])
    text = f"How much of the differences between trials each parameter explains (fANOVA): {most}."
    return Chart("importances", "Importance", text, spec, {"shares": table}, 40 + 30 * len(shares))


def slice_chart(
    path: str,
    standings: Sequence[TrialResult],
    space: Distribution,
    metric: str,
    kinds: Mapping[int, str],
) -> Chart:
    """The metric by one parameter."""
    values = [s.parameters[path] for s in standings]
    choice = space.choice is not None
    table: Columns = {
        "x": [_cell_text(value) for value in values] if choice else values,
        "value": [s.value for s in standings],
        "trial": [s.number for s in standings],
        "kind": [kinds[s.number] for s in standings],
    }
    x: dict[str, Any] = quantitative("x", path, scale={"type": "linear", "zero": False})
    if choice:
        order = [_cell_text(value) for value in space.choice or []]
        x = {
            "field": "x",
            "type": "nominal",
            "title": path,
            "sort": order,
            "axis": {"labelAngle": 0},
        }
    elif "log" in space.kind:
        x["scale"] = {"type": "log", "nice": False, "padding": 12}
    text = f"{metric} of each trial by its {path}."
    spec = _scatter(
        x,
        quantitative("value", with_unit(metric), scale=choose_scale(table["value"])),
        table,
        standings[0].number,
    )
    return Chart(f"slice-{slug(path)}", path, text, spec, {"dots": table}, 220)


def _scatter(
    x: Mapping[str, Any], y: Mapping[str, Any], table: Columns, first: int
) -> dict[str, Any]:
    order = [kind for kind in ("complete", "running", "stopped", "failed") if kind in table["kind"]]
    tooltip = [{"field": name} for name in ("trial", "kind", "x", "value")]
    dots = {
        "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.75},
        "encoding": {"x": x, "y": y, "color": status_colours(order), "tooltip": tooltip},
    }
    one = {
        "transform": [{"filter": "datum.trial == picked"}],
        "mark": {"type": "point", "size": 170, "strokeWidth": 2.5, "color": "$accent"},
        "encoding": {"x": x, "y": y, "tooltip": tooltip},
    }
    return {"params": selected_trial(first), **data_source("dots"), "layer": [dots, one]}


def pareto_chart(
    cost: str,
    metric: str,
    points: Mapping[int, tuple[float, float]],
    best: Sequence[int],
    kinds: Mapping[int, str],
) -> Chart:
    """The metric by what it cost; `points` are cost and metric of each trial, the best first."""
    table: Columns = {
        "trial": list(points),
        "x": [cost for cost, _ in points.values()],
        "value": [value for _, value in points.values()],
        "kind": [kinds[number] for number in points],
    }
    steps = sorted(points[number] for number in best)
    line = {"x": [x for x, _ in steps], "value": [value for _, value in steps]}
    x = quantitative("x", with_unit(cost), scale=choose_scale(table["x"]))
    y = quantitative("value", with_unit(metric), scale=choose_scale(table["value"]))
    spec = _scatter(x, y, table, next(iter(points)))
    stairs = {
        **data_source("front"),
        "mark": {"type": "line", "interpolate": "step-after", "color": "$accent", "strokeWidth": 2},
        "encoding": {"x": x, "y": y},
    }
    spec["layer"] = [stairs, *spec["layer"]]
    names = ", ".join(f"{number:04d}" for number in best)
    text = f"Pareto front of {metric} and {cost}: no other trial is better in both than {names}."
    title = f"{metric} and {cost}"
    tables = {"dots": table, "front": line}
    return Chart(f"front-{slug(cost)}", title, text, spec, tables, 300)
