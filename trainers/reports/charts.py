"""Charts as Vega-Lite has them: a grammar for the marks, tables for the numbers.

One chart is drawn twice: by Vega in the reader's browser, as wide as there is room and in its
colours, and by the same Vega here as a PNG file. Names such as `$accent` stand for the colours of
a palette.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.reports.history import Span

Columns = Mapping[str, Sequence[Any]]
"""Name of a column -> its values; all columns are equally long."""

VEGA_LITE_VERSION = "6.4"
"""Of Vega-Lite, whose charts these are."""
PNG_WIDTH, PNG_SCALE = 760, 2
"""Of a PNG file: pixels of the page, and dots for each of them."""
MAX_PNG_ROWS = 10_000
"""Of a table that is drawn as a PNG file, but for the last ones of each trial."""
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
PART_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
"""Colours for parts of a whole, told apart by the colour-blind too (Paul Tol, "bright")."""
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
SPLIT_COLOURS = {"train": "$grey", "val": "$blue", "test": "$accent", "run": "$blue"}
"""Kinds of curves -> their colour."""
MAX_LANES = 60
"""Lanes of a time line that are still to be read."""


@dataclass(frozen=True)
class Chart:
    """What is drawn, of which numbers, and in words."""

    name: str
    """Of its file and its place in the page: letters, digits and dashes."""
    title: str
    description: str
    """What is to be seen, for those who do not see it too."""
    spec: Mapping[str, Any]
    """Vega-Lite, without width, data and colours."""
    datasets: Mapping[str, Columns]
    height: int = 260
    """Pixels."""
    min_width: int = 0
    """Pixels below which it is scrolled sideways."""


def with_unit(name: str) -> str:
    """A metric's name with its unit, where that can be told from the name."""
    unit = next((unit for end, unit in UNITS if name.endswith(end)), None)
    return f"{name} ({unit})" if unit else name


def to_rows(table: Columns) -> list[dict[str, Any]]:
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def with_palette(spec: Any, palette: Mapping[str, Any]) -> Any:
    """The same with the colours of a palette for their names."""
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
    """Of very many rows, one of so many of each trial, and its last: drawing takes minutes."""
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
    """As JSON has it, which knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_scale(values: Iterable[float]) -> dict[str, Any]:
    """Logarithmic where the values are positive and far apart, else linear and not from 0."""
    known = [value for value in values if math.isfinite(value)]
    wide = known and min(known) > 0 and max(known) / min(known) > 30
    return {"type": "log"} if wide else {"type": "linear", "zero": False}


def quantitative(field: str, title: str, **more: Any) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title, **more}


def line_chart(name: str, title: str, x: str, tables: Mapping[str, Columns], text: str) -> Chart:
    """Lines of one metric by `kind`, from the table `points` with `x`, `y` and `kind`."""
    points = tables["points"]
    y = quantitative("y", title, scale=choose_scale(points["y"]))
    kinds = [kind for kind in SPLIT_COLOURS if kind in points["kind"]]
    encoding = {
        "x": quantitative("x", x, scale={"nice": False}),
        "y": y,
        "color": {
            "field": "kind",
            "type": "nominal",
            "title": None,
            "scale": {"domain": kinds, "range": [SPLIT_COLOURS[kind] for kind in kinds]},
            **({"legend": None} if len(kinds) < 2 else {}),
        },
    }
    mark = {"type": "line", "point": len(points["x"]) < 200, "tooltip": True, "clip": True}
    return Chart(
        name, title, text, {"mark": mark, "encoding": encoding, **data_source("points")}, tables
    )


def data_source(name: str) -> dict[str, Any]:
    return {"data": {"name": name}}


def step_time_chart(rows: Sequence[tuple[str, Mapping[str, float]]], what: str) -> Chart:
    """Parts of a step, in seconds, for each row, which stands for a run or some of its steps."""
    parts = list(dict.fromkeys(part for _, found in rows for part in found))
    table: Columns = {
        "row": [row for row, found in rows for _ in found],
        "part": [part for _, found in rows for part in found],
        "ms": [1e3 * found[part] for _, found in rows for part in found],
        "order": [parts.index(part) for _, found in rows for part in found],
    }
    colour = {
        "field": "part",
        "type": "nominal",
        "title": None,
        "scale": {"domain": parts, "range": list(PART_COLOURS[: len(parts)])},
        "legend": {"columns": 4},
    }
    spec = {
        **data_source("parts"),
        "mark": {"type": "bar", "tooltip": True},
        "encoding": {
            "y": {"field": "row", "type": "nominal", "title": what, "sort": None},
            "x": quantitative("ms", "time of a step (ms)", stack="zero"),
            "color": colour,
            "order": {"field": "order"},
        },
    }
    whole = sum(table["ms"])
    sums = {p: sum(found.get(p, 0.0) for _, found in rows) * 1e3 / whole for p in parts}
    largest = ", ".join(f"{p} {s:.0%}" for p, s in sorted(sums.items(), key=lambda i: -i[1])[:3])
    text = f"Mean time of a training step by part. Over all of them: {largest}."
    return Chart(
        "step-time", "Where a step's time goes", text, spec, {"parts": table}, _bars_height(rows)
    )


def _bars_height(rows: Sequence[Any]) -> int:
    """Pixels for so many bars."""
    return 30 + 22 * len(rows)


def idle_spans(spans: Sequence[Span]) -> list[Span]:
    """Of each place, the times between the first one's begin and the last one's end that are idle.

    Lanes of one place idle between two of their own spans; all until the last lane ends.
    """
    begin, end = min(span.begin for span in spans), max(span.end for span in spans)
    found = []
    for place in dict.fromkeys(span.lane for span in spans):
        until = begin
        for span in [s for s in spans if s.lane == place]:
            if span.begin > until:
                found.append(Span(place, "idle", until, span.begin))
            until = max(until, span.end)
        if end > until:
            found.append(Span(place, "idle", until, end))
    return found


def timeline_chart(spans: Sequence[Span], kinds: Mapping[str, str]) -> Chart:
    """When each place worked for what; `kinds` says of a key how it ended."""
    start = min(span.begin for span in spans)
    idle = idle_spans(spans)
    longest = max(span.end for span in spans) - start
    unit, seconds = ("h", 3600) if longest > 7200 else ("min", 60) if longest > 120 else ("s", 1)
    shown = list(dict.fromkeys(span.lane for span in spans))[:MAX_LANES]
    bars = [span for span in [*spans, *idle] if span.lane in shown]
    table: Columns = {
        "place": [bar.lane for bar in bars],
        "trial": [bar.key for bar in bars],
        "kind": [kinds.get(bar.key, "idle") for bar in bars],
        "from": [(bar.begin - start) / seconds for bar in bars],
        "to": [(bar.end - start) / seconds for bar in bars],
        "seconds": [bar.end - bar.begin for bar in bars],
    }
    order = [kind for kind in STATUS_COLOURS if kind in table["kind"]]
    tooltip = [{"field": f} for f in ("trial", "kind", "place")]
    spec = {
        **data_source("bars"),
        "mark": {"type": "bar", "height": {"band": 0.8}, "stroke": "$paper", "strokeWidth": 1},
        "encoding": {
            "y": {"field": "place", "type": "nominal", "title": None, "sort": shown},
            "x": quantitative("from", f"time since the first began ({unit})"),
            "x2": {"field": "to"},
            "color": status_colours(order),
            "tooltip": [*tooltip, {"field": "seconds", "type": "quantitative", "format": ".1f"}],
        },
    }
    lost = sum(span.end - span.begin for span in idle)
    whole = longest * len({span.lane for span in spans})
    text = (
        f"Which device worked on what, and when. Between the first begin and the last end "
        f"{lost / whole if whole else 0:.0%} of the time was idle ({lost:,.0f} of {whole:,.0f} s)."
    )
    if len(shown) == MAX_LANES:
        text += f" The first {MAX_LANES} are shown."
    return Chart(
        "time-line", "Time line of devices", text, spec, {"bars": table}, _bars_height(shown)
    )


STATUS_COLOURS = {
    "complete": "$blue",
    "running": "$accent",
    "stopped": "$grey",
    "failed": "$red",
    "idle": "$gap",
}
"""How trials ended -> their colour."""


def status_colours(order: Sequence[str]) -> dict[str, Any]:
    return {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(order), "range": [STATUS_COLOURS[kind] for kind in order]},
    }


def scaling_chart(measured: Mapping[str, Columns]) -> Chart:
    """Samples per second by workers; `measured` by mode, with `workers`, `speed`, `fitted`."""
    table: dict[str, list[Any]] = {"workers": [], "speed": [], "kind": [], "how": []}

    def add(workers: Sequence[int], speeds: Sequence[float], kind: str, how: str) -> None:
        table["workers"] += workers
        table["speed"] += speeds
        table["kind"] += [kind] * len(workers)
        table["how"] += [how] * len(workers)

    for mode, found in measured.items():
        add(found["workers"], found["speed"], mode, "measured")
        add(found["workers"], found["fitted"], mode, "fitted")
    first = next(iter(measured.values()))
    each = first["speed"][0] / first["workers"][0]
    counts = sorted(set(table["workers"]))
    add(counts, [each * count for count in counts], "ideal", "fitted")
    colours = {"strong": "$blue", "weak": "$accent", "ideal": "$grey"}
    kinds = [kind for kind in colours if kind in table["kind"]]
    colour = {"domain": kinds, "range": [colours[kind] for kind in kinds]}
    dash = {"domain": ["measured", "fitted"], "range": [[1, 0], [5, 4]]}
    spec = {
        **data_source("speeds"),
        "mark": {"type": "line", "point": True, "tooltip": True},
        "encoding": {
            "x": quantitative("workers", "workers", axis={"values": counts, "format": "d"}),
            "y": quantitative("speed", "samples/s", scale={"zero": True}),
            "color": {"field": "kind", "type": "nominal", "title": None, "scale": colour},
            "strokeDash": {
                "field": "how",
                "type": "nominal",
                "title": None,
                "scale": dash,
                "legend": {"symbolType": "stroke", "symbolSize": 300, "symbolStrokeColor": "$ink"},
            },
        },
    }
    text = "Samples per second by number of workers, as measured and as the fitted model has it."
    return Chart("scaling", "Scaling", text, spec, {"speeds": table})
