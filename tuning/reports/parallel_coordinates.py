"""The parallel coordinates of a sweep: each trial as a line through its parameters and metric."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainers.reports.vega import Chart, Columns, data_source, quantitative, with_unit
from tuning.reports.sweep_charts import cell_text, selected_trial
from tuning.spaces.distributions import Distribution
from tuning.trials.leaderboard import TrialResult

AXIS_WIDTH = 95
"""Pixels that each axis needs for its labels."""


def parallel_coordinates(
    results: Sequence[TrialResult], space: Mapping[str, Distribution], metric: str, mode: str
) -> Chart:
    """Each trial as a line through its parameters; the last axis is the metric.

    A line leaves out the axes of parameters that its trial does not have.
    """
    lines, ends = _datasets(results, space, metric)
    axes = [*space, metric]
    best = results[0].number
    description = (
        f"Every line is one of {len(results):,} trials, through its parameters, coloured by "
        f"{metric}; trial {best:04d} is highlighted. The numbers are those of the leaderboard."
    )
    spec = {
        "params": selected_trial(best),
        "layer": list(_layers(axes, metric, mode, len(results))),
    }
    return Chart(
        "parallel-coordinates",
        "Parallel coordinates",
        description,
        spec,
        {"lines": lines, "ends": ends},
        300,
        AXIS_WIDTH * len(axes),
    )


def _datasets(
    results: Sequence[TrialResult], space: Mapping[str, Distribution], metric: str
) -> tuple[Columns, Columns]:
    """The points of all lines, and the labels at both ends of each axis."""
    lines: dict[str, list[Any]] = {"trial": [], "axis": [], "at": [], "value": [], "set": []}
    ends: dict[str, list[Any]] = {"axis": [], "at": [], "text": []}
    for path in [*space, metric]:
        own = [r for r in results if path == metric or path in r.parameters]
        values = [r.value if path == metric else r.parameters[path] for r in own]
        low, high, positions = _positions(values, space.get(path))
        for result, value, position in zip(own, values, positions, strict=True):
            row = (result.number, path, position, result.value, cell_text(value))
            for name, cell in zip(lines, row, strict=True):
                lines[name].append(cell)
        ends["axis"] += [path, path]
        ends["at"] += [0, 1]
        ends["text"] += [cell_text(low), cell_text(high)]
    return lines, ends


def _positions(values: Sequence[Any], space: Distribution | None) -> tuple[Any, Any, list[float]]:
    """The labels at the bottom and the top of an axis, and the position of each value on it."""
    if space is not None and space.choice is not None:
        texts = [cell_text(choice) for choice in space.choice]
        top = max(1, len(texts) - 1)
        return texts[0], texts[-1], [space.optuna_value(value) / top for value in values]
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = space.bounds if space and space.bounds else (min(finite), max(finite))
    scaled = math.log if space is not None and space.is_log else float
    width = (scaled(high) - scaled(low)) or 1.0
    positions = [
        (scaled(value) - scaled(low)) / width if math.isfinite(value) else math.nan
        for value in values
    ]
    return low, high, positions


def _layers(axes: list[str], metric: str, mode: str, trials: int) -> Iterator[dict[str, Any]]:
    """All lines, the selected trial's line above them, and the labels of the axes."""
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
    encoding = {"x": x, "y": y, "detail": {"field": "trial"}, "tooltip": tooltip}
    opacity = max(0.15, min(0.8, 40 / max(1, trials)))
    yield {
        **data_source("lines"),
        "mark": {"type": "line", "strokeWidth": 1.3, "strokeOpacity": opacity, "aria": False},
        "encoding": {**encoding, "color": colour},
    }
    yield {
        **data_source("lines"),
        "transform": [{"filter": "datum.trial == picked"}],
        "mark": {"type": "line", "strokeWidth": 3, "color": "$accent"},
        "encoding": encoding,
    }
    for at, dy in ((0, 8), (1, -8)):
        mark = {"type": "text", "color": "$ink", "fontSize": 11, "baseline": "middle", "dy": dy}
        yield {
            **data_source("ends"),
            "transform": [{"filter": f"datum.at == {at}"}],
            "mark": mark,
            "encoding": {"x": x, "y": y, "text": {"field": "text"}},
        }
