"""The charts of a run, and those that the report of a sweep has too."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainers.reports.history import Span
from trainers.reports.vega import Chart, Columns, choose_scale, data_source, quantitative

PART_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")
"""Colours for parts of a whole, told apart by the colour-blind too (Paul Tol, "bright")."""
SPLIT_COLOURS = {"train": "$grey", "val": "$blue", "test": "$accent", "run": "$blue"}
"""Split -> the colour of its curve."""
MAX_LANES = 60
"""Lanes of a timeline that can still be read."""
STATUS_COLOURS = {
    "complete": "$blue",
    "running": "$accent",
    "stopped": "$grey",
    "failed": "$red",
    "idle": "$gap",
}
"""Status of a run or trial -> its colour."""


def line_chart(name: str, title: str, x: str, datasets: Mapping[str, Columns], text: str) -> Chart:
    """Lines of one metric by `kind`, from the dataset `points` with `x`, `y` and `kind`."""
    points = datasets["points"]
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
        name, title, text, {"mark": mark, "encoding": encoding, **data_source("points")}, datasets
    )


def step_time_chart(rows: Sequence[tuple[str, Mapping[str, float]]], row_title: str) -> Chart:
    """Bars of a step's parts, in seconds; a row is a run, or a range of its steps."""
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
            "y": {"field": "row", "type": "nominal", "title": row_title, "sort": None},
            "x": quantitative("ms", "time of a step (ms)", stack="zero"),
            "color": colour,
            "order": {"field": "order"},
        },
    }
    total = sum(table["ms"])
    sums = {p: sum(found.get(p, 0.0) for _, found in rows) * 1e3 / total for p in parts}
    largest = ", ".join(f"{p} {s:.0%}" for p, s in sorted(sums.items(), key=lambda i: -i[1])[:3])
    text = f"Mean time of a training step by part. Over all of them: {largest}."
    return Chart(
        "step-time", "Where a step's time goes", text, spec, {"parts": table}, _bars_height(rows)
    )


def _bars_height(rows: Sequence[Any]) -> int:
    """Height in pixels of a chart with a bar for each row."""
    return 30 + 22 * len(rows)


def idle_spans(spans: Sequence[Span]) -> list[Span]:
    """The idle times of each lane between the first begin and the last end of all spans."""
    begin, end = min(span.begin for span in spans), max(span.end for span in spans)
    found = []
    for lane in dict.fromkeys(span.lane for span in spans):
        until = begin
        for span in [s for s in spans if s.lane == lane]:
            if span.begin > until:
                found.append(Span(lane, "idle", until, span.begin))
            until = max(until, span.end)
        if end > until:
            found.append(Span(lane, "idle", until, end))
    return found


def timeline_chart(spans: Sequence[Span], statuses: Mapping[str, str]) -> Chart:
    """Which run or trial each lane worked on, and when; `statuses` maps keys to how they ended."""
    start = min(span.begin for span in spans)
    idle = idle_spans(spans)
    duration = max(span.end for span in spans) - start
    unit, seconds = ("h", 3600) if duration > 7200 else ("min", 60) if duration > 120 else ("s", 1)
    shown = list(dict.fromkeys(span.lane for span in spans))[:MAX_LANES]
    bars = [span for span in [*spans, *idle] if span.lane in shown]
    table: Columns = {
        "place": [bar.lane for bar in bars],
        "trial": [bar.key for bar in bars],
        "kind": [statuses.get(bar.key, "idle") for bar in bars],
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
    total = duration * len({span.lane for span in spans})
    text = (
        f"Which device worked on what, and when. Between the first begin and the last end "
        f"{lost / total if total else 0:.0%} of the time was idle ({lost:,.0f} of {total:,.0f} s)."
    )
    if len(shown) == MAX_LANES:
        text += f" The first {MAX_LANES} are shown."
    return Chart(
        "time-line", "Time line of devices", text, spec, {"bars": table}, _bars_height(shown)
    )


def status_colours(order: Sequence[str]) -> dict[str, Any]:
    return {
        "field": "kind",
        "type": "nominal",
        "title": None,
        "scale": {"domain": list(order), "range": [STATUS_COLOURS[kind] for kind in order]},
    }


def scaling_chart(measured: Mapping[str, Columns]) -> Chart:
    """Samples per second by workers; `measured`: mode -> columns `workers`, `speed`, `fitted`."""
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
    text = "Samples per second by number of workers, measured and by the fitted model."
    return Chart("scaling", "Scaling", text, spec, {"speeds": table})
