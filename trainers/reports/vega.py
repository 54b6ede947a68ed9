"""Charts as Vega-Lite specs: a grammar for the marks, datasets for the numbers.

A chart is drawn twice: by Vega in the reader's browser, in the width and colours of the page, and
by the same Vega here as a PNG file. Names such as `$accent` stand for the colours of a palette.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Columns = Mapping[str, Sequence[Any]]
"""Column name -> values; all columns are equally long."""

VEGA_LITE_VERSION = "6.4"
"""The version of Vega-Lite that the specs are written for."""
PNG_WIDTH, PNG_SCALE = 760, 2
"""Width of a PNG file in CSS pixels, and its dots per pixel."""
MAX_PNG_ROWS = 10_000
"""Rows of a dataset that are drawn in a PNG file, besides the last one of each trial."""
PALETTES: dict[str, dict[str, Any]] = {
    "light": {
        "paper": "#ffffff",
        "ink": "#1c2530",
        "muted": "#5b6673",
        "grid": "#e3e7ec",
        "accent": "#c2410c",
        "blue": "#1d5fa8",
        "grey": "#8a94a0",
        "red": "#b3123c",
        "gap": "#d9dee4",
        "scheme": {"name": "viridis", "extent": [0, 0.85]},
    },
    "dark": {
        "paper": "#12161c",
        "ink": "#e8ecf1",
        "muted": "#a3aebb",
        "grid": "#2b333d",
        "accent": "#ff9d5c",
        "blue": "#6cb0f5",
        "grey": "#7d8895",
        "red": "#ff7d97",
        "gap": "#333d49",
        "scheme": {"name": "plasma", "extent": [0.35, 1]},
    },
}
CONFIG: dict[str, Any] = {
    "background": "$paper",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "$ink",
        "titleColor": "$ink",
        "gridColor": "$grid",
        "domainColor": "$muted",
        "tickColor": "$muted",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 150,
        "labelOverlap": True,
    },
    "legend": {
        "labelColor": "$ink",
        "titleColor": "$ink",
        "labelFontSize": 12,
        "titleFontWeight": "normal",
        "orient": "top",
        "symbolOpacity": 1,
    },
}
UNITS = (
    ("samples_per_s", "samples/s"),
    ("tokens_per_s", "tokens/s"),
    ("flop_per_s", "FLOP/s"),
    ("_usd", "US$"),
    ("_j", "J"),
    ("_s", "s"),
    ("_bytes", "bytes"),
    ("kg_co2e", "kg CO2e"),
    ("accuracy", "fraction of 1"),
    ("_share", "fraction of 1"),
    ("goodput", "fraction of 1"),
    ("mfu", "fraction of 1"),
)


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite spec with its data and a text alternative."""

    name: str
    """Of its PNG file and its HTML element: letters, digits and dashes."""
    title: str
    description: str
    """Text alternative for screen readers; also the caption."""
    spec: Mapping[str, Any]
    """Vega-Lite, without width, data and the colours' values."""
    datasets: Mapping[str, Columns]
    height: int = 260
    """Pixels."""
    min_width: int = 0
    """Pixels; in a narrower page the chart is scrolled sideways."""


def with_unit(name: str) -> str:
    """A metric's name with its unit, where the name implies one."""
    unit = next((unit for end, unit in UNITS if name.endswith(end)), None)
    return f"{name} ({unit})" if unit else name


def to_rows(table: Columns) -> list[dict[str, Any]]:
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def with_palette(spec: Any, palette: Mapping[str, Any]) -> Any:
    """The spec with the names of colours replaced by the colours of a palette."""
    named = re.compile(r'"\$(\w+)"')
    return json.loads(named.sub(lambda found: json.dumps(palette[found[1]]), json.dumps(spec)))


def write_png(chart: Chart, path: Path) -> None:
    import vl_convert

    named = {
        name: _without_nan(_downsampled(to_rows(table))) for name, table in chart.datasets.items()
    }
    whole = {
        **chart.spec,
        "title": {"text": chart.title, "anchor": "start", "color": "$ink", "fontSize": 14},
        "width": max(PNG_WIDTH, chart.min_width),
        "height": chart.height,
        "config": {**CONFIG, "padding": 12},
    }
    light = with_palette(whole, PALETTES["light"])
    data = vl_convert.vegalite_to_png(
        {**light, "datasets": named}, vl_version=VEGA_LITE_VERSION, scale=PNG_SCALE
    )
    path.write_bytes(data)


def _downsampled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about MAX_PNG_ROWS rows, with the last one of each trial: more take minutes."""
    every = -(-len(rows) // MAX_PNG_ROWS)
    if every < 2 or "trial" not in rows[0]:
        return rows
    following = [row["trial"] for row in rows[1:]] + [None]
    return [
        row
        for n, (row, after) in enumerate(zip(rows, following, strict=True))
        if n % every == 0 or row["trial"] != after
    ]


def _without_nan(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: finite_or_none(value) for name, value in row.items()} for row in rows]


def finite_or_none(value: Any) -> Any:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_scale(values: Iterable[float]) -> dict[str, Any]:
    """Logarithmic where the values are positive and far apart, else linear and not from 0."""
    known = [value for value in values if math.isfinite(value)]
    wide = known and min(known) > 0 and max(known) / min(known) > 30
    return {"type": "log"} if wide else {"type": "linear", "zero": False}


def quantitative(field: str, title: str, **more: Any) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title, **more}


def data_source(name: str) -> dict[str, Any]:
    return {"data": {"name": name}}
