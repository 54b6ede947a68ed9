"""The charts of a sweep: learning curves, importances, slices and Pareto fronts."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainers.reports.charts import status_colours
from trainers.reports.history import Series
from trainers.reports.vega import Chart, Columns, choose_scale, data_source, quantitative, with_unit
from tuning.spaces.distributions import Distribution
from tuning.trials.leaderboard import TrialResult

STATUSES = ("complete", "running", "stopped", "failed")
"""In the order of the legend."""


def slug(text: str) -> str:
    """The text as part of a chart's name."""
    return text.replace("/", "-").replace("_", "-").replace(".", "-")


def selected_trial(best: int) -> list[dict[str, Any]]:
    """The parameter with the highlighted trial: the best, until another is selected in the page."""
    return [{"name": "picked", "value": best}]


def cell_text(value: Any) -> str:
    """A parameter's value as text; floats with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def learning_curves(
    metric: str, series: Mapping[int, tuple[Series, float]], statuses: Mapping[int, str], best: int
) -> Chart:
    """One metric of all trials; `series` has the points of each trial, and its epochs per step."""
    points: Columns = {
        "trial": [number for number, (own, _) in series.items() for _ in own.steps],
        "epoch": [step * epoch for own, epoch in series.values() for step in own.steps],
        "value": [value for own, _ in series.values() for value in own.values],
    }
    trials: Columns = {"trial": list(series), "kind": [statuses[number] for number in series]}
    x = quantitative("epoch", "epoch", scale={"nice": False, "zero": False})
    y = quantitative("value", with_unit(metric), scale=choose_scale(points["value"]))
    opacity = max(0.12, min(0.7, 12 / max(1, len(series))))
    lookup = {"data": {"name": "trials"}, "key": "trial", "fields": ["kind"]}
    all_lines = {
        # With `opacity` each line would be a layer of its own, and a thousand take a minute.
        "mark": {"type": "line", "strokeWidth": 1.2, "strokeOpacity": opacity, "aria": False},
        "transform": [{"lookup": "trial", "from": lookup}],
        "encoding": {
            "x": x,
            "y": y,
            "detail": {"field": "trial"},
            "color": status_colours(_present(trials["kind"])),
            "tooltip": [{"field": "trial", "title": "trial"}, {"field": "kind", "title": "ended"}],
        },
    }
    tooltip = [{"field": name} for name in ("trial", "epoch", "value")]
    dots = {"size": 16, "color": "$accent"}
    selected_line = {
        "mark": {"type": "line", "strokeWidth": 2.5, "color": "$accent", "point": dots},
        "transform": [{"filter": "datum.trial == picked"}],
        "encoding": {"x": x, "y": y, "tooltip": tooltip},
    }
    description = (
        f"{metric} of {len(series):,} trials over their epochs; trial {best:04d}, the best, is "
        "highlighted, or the one that is selected in the leaderboard."
    )
    layers = [all_lines, selected_line]
    spec = {"params": selected_trial(best), **data_source("points"), "layer": layers}
    datasets = {"points": points, "trials": trials}
    return Chart(f"curves-{slug(metric)}", metric, description, spec, datasets, 320)


def _present(statuses: Sequence[Any]) -> list[str]:
    return [status for status in STATUSES if status in statuses]


def importance_chart(shares: Mapping[str, float], metric: str) -> Chart:
    """A bar for each parameter."""
    table: Columns = {"parameter": list(shares), "share": list(shares.values())}
    spec = {
        **data_source("shares"),
        "mark": {"type": "bar", "color": "$blue", "tooltip": True},
        "encoding": {
            "y": {"field": "parameter", "type": "nominal", "sort": "-x", "title": None},
            "x": quantitative("share", f"share of the variance of {metric}", axis={"format": "%"}),
        },
    }
    largest = ", ".join(f"{path} {share:.0%}" for path, share in list(shares.items())[:3])
    description = (
        f"How much of the differences between trials each parameter explains (fANOVA): {largest}."
    )
    height = 40 + 30 * len(shares)
    return Chart("importances", "Importance", description, spec, {"shares": table}, height)


def slice_chart(
    path: str,
    results: Sequence[TrialResult],
    space: Distribution,
    metric: str,
    statuses: Mapping[int, str],
) -> Chart:
    """The metric over one parameter, of the trials that have it."""
    results = [r for r in results if path in r.parameters]
    values = [r.parameters[path] for r in results]
    choice = space.choice is not None
    table: Columns = {
        "x": [cell_text(value) for value in values] if choice else values,
        "value": [r.value for r in results],
        "trial": [r.number for r in results],
        "kind": [statuses[r.number] for r in results],
    }
    x: dict[str, Any] = quantitative("x", path, scale={"type": "linear", "zero": False})
    if choice:
        order = [cell_text(value) for value in space.choice or []]
        axis = {"labelAngle": 0}
        x = {"field": "x", "type": "nominal", "title": path, "sort": order, "axis": axis}
    elif space.is_log:
        x["scale"] = {"type": "log", "nice": False, "padding": 12}
    y = quantitative("value", with_unit(metric), scale=choose_scale(table["value"]))
    spec = _scatter(x, y, table, results[0].number)
    description = f"{metric} of each trial by its {path}."
    return Chart(f"slice-{slug(path)}", path, description, spec, {"dots": table}, 220)


def _scatter(
    x: Mapping[str, Any], y: Mapping[str, Any], table: Columns, best: int
) -> dict[str, Any]:
    """A dot for each trial, with a ring around the selected one."""
    tooltip = [{"field": name} for name in ("trial", "kind", "x", "value")]
    colour = status_colours(_present(table["kind"]))
    dots = {
        "mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.75},
        "encoding": {"x": x, "y": y, "color": colour, "tooltip": tooltip},
    }
    ring = {
        "transform": [{"filter": "datum.trial == picked"}],
        "mark": {"type": "point", "size": 170, "strokeWidth": 2.5, "color": "$accent"},
        "encoding": {"x": x, "y": y, "tooltip": tooltip},
    }
    return {"params": selected_trial(best), **data_source("dots"), "layer": [dots, ring]}


def pareto_chart(
    cost: str,
    metric: str,
    points: Mapping[int, tuple[float, float]],
    front: Sequence[int],
    statuses: Mapping[int, str],
) -> Chart:
    """The metric over its cost.

    `points` has the cost and the metric of each trial, the best first; `front` has the numbers of
    the trials on the Pareto front.
    """
    table: Columns = {
        "trial": list(points),
        "x": [x for x, _ in points.values()],
        "value": [value for _, value in points.values()],
        "kind": [statuses[number] for number in points],
    }
    steps = sorted(points[number] for number in front)
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
    names = ", ".join(f"{number:04d}" for number in front)
    description = (
        f"Pareto front of {metric} and {cost}: no other trial is better in both than {names}."
    )
    datasets = {"dots": table, "front": line}
    return Chart(f"front-{slug(cost)}", f"{metric} and {cost}", description, spec, datasets, 300)
