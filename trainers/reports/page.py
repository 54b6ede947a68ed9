"""A report as one HTML file that needs nothing else, and its charts as PNG files.

The file opens from a disk, without a network: Vega, which draws the charts, is in it, and its own
policy forbids it to load anything. Tables are plain HTML, and a script sorts them.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from cluster.base.files import write_atomic
from trainers.reports.charts import (
    CONFIG,
    PALETTES,
    VEGA_LITE_VERSION,
    Chart,
    finite_or_none,
    write_png,
)

PAGE_FILE = "index.html"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'"
)
"""Of the page: Vega compiles its expressions, nothing is fetched."""


@dataclass(frozen=True)
class StatCard:
    """A number to be seen first."""

    label: str
    value: str
    source: str = ""
    """Where it is from."""


@dataclass(frozen=True)
class DataTable:
    """A table. Cells are numbers, None for unknown, or words."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    selects_trial: bool = False
    """Whether the first column, of whole numbers, picks the trial that charts bring out."""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence["str | Sequence[StatCard] | DataTable | Chart"]
    """Words, tiles, tables and charts, in their order."""


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    sections: Sequence[Section]

    @property
    def charts(self) -> list[Chart]:
        blocks = (block for section in self.sections for block in section.blocks)
        return [block for block in blocks if isinstance(block, Chart)]


def write_report(page: Page, folder: Path) -> Path:
    """The page and a PNG of each chart in `folder`; returns the page's path."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for chart in page.charts:
        write_png(chart, folder / f"{chart.name}.png")
    write_atomic(folder / PAGE_FILE, render_html(page))
    return folder / PAGE_FILE


def render_html(page: Page) -> str:
    import vl_convert

    charts = [_chart_data(chart) for chart in page.charts]
    drawn = {"charts": charts, "palettes": PALETTES, "config": CONFIG}
    vega = vl_convert.javascript_bundle(None, VEGA_LITE_VERSION)  # type: ignore[arg-type]  # None: all of it
    links = "".join(
        f'<a href="#{_anchor(section.title)}">{escape(section.title)}</a>'
        for section in page.sections
    )
    body = "".join(_section(section) for section in page.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(page.title)}</title>
<style>
{_part("page.css")}
{_colours()}
</style>
</head>
<body>
<header>
<h1>{escape(page.title)}</h1>
<p>{escape(page.subtitle)}</p>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
<script type="application/json" id="drawn">{_in_script(json.dumps(drawn, allow_nan=False))}</script>
<script>{_in_script(vega)}</script>
<script>{_part("page.js")}</script>
</body>
</html>
"""


def _part(name: str) -> str:
    return (files("trainers.reports") / "page_parts" / name).read_text(encoding="utf-8")


def _in_script(text: str) -> str:
    """The same text where `</script` would end it too early."""
    return re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE)


def _colours() -> str:
    """The palettes as CSS variables."""

    def variables(name: str) -> str:
        return "".join(f"--{k}: {v}; " for k, v in PALETTES[name].items() if isinstance(v, str))

    light, dark = (f":root {{ {variables(name)}}}" for name in ("light", "dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n@media print {{ {light} }}"


def _anchor(title: str) -> str:
    return f"section-{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}"


def _section(section: Section) -> str:
    anchor = _anchor(section.title)
    body = "".join(_block(block) for block in _gridded(section.blocks))
    return (
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(section.title)}</h2>'
        f"{body}</section>\n"
    )


def _gridded(blocks: Iterable[Any]) -> Iterable[Any]:
    """Charts that follow one another come side by side where there is room."""
    for are_charts, group in groupby(blocks, key=lambda block: isinstance(block, Chart)):
        if are_charts:
            yield tuple(group)
        else:
            yield from group


def _block(block: Any) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, DataTable):
        return _table(block)
    if isinstance(block[0], Chart):
        return f'<div class="charts">{"".join(map(_figure, block))}</div>'
    return f'<dl class="tiles">{"".join(map(_tile, block))}</dl>'


def _tile(tile: StatCard) -> str:
    source = f"<dd class=source>{escape(tile.source)}</dd>" if tile.source else ""
    return f"<div><dt>{escape(tile.label)}</dt><dd>{escape(tile.value)}</dd>{source}</div>"


def _figure(chart: Chart) -> str:
    name, title = chart.name, escape(chart.title)
    least = f"min-width: {chart.min_width}px; " if chart.min_width else ""
    scrolled = f' tabindex="0" role="region" aria-label="{title}"' if least else ""
    return (
        f'<figure aria-labelledby="{name}-title" aria-describedby="{name}-text">'
        f'<h3 id="{name}-title">{title}</h3>'
        f'<div class="scroll"{scrolled}><div class="chart" id="{name}" '
        f'style="{least}height: {chart.height + 110}px"></div></div>'
        f'<figcaption id="{name}-text">{escape(chart.description)}</figcaption></figure>'
    )


def _table(sheet: DataTable) -> str:
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(column)}</button></th>'
        for column in sheet.columns
    )
    rows = "".join(
        f"<tr>{''.join(_cell(cell, sheet.selects_trial and not n) for n, cell in enumerate(row))}</tr>"
        for row in sheet.rows
    )
    caption = escape(sheet.caption)
    return (
        f'<div class="scroll table" tabindex="0" role="region" aria-label="{caption}">'
        f'<table id="{sheet.name}"><caption><span>{caption}</span></caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(cell: Any, picks: bool) -> str:
    """With the whole number in `data-v`, by which it is sorted."""
    if picks:
        button = f'<button type="button" class="pick" aria-pressed="false">{cell:04d}</button>'
        return f'<th scope="row" data-v="{cell}">{button}</th>'
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return f'<td data-v="{cell!r}">{format_number(cell)}</td>'
    if cell is None:
        return '<td class="unknown">unknown</td>'
    return f'<td class="words">{escape(str(cell))}</td>'


def format_number(number: float) -> str:
    """A number for people."""
    if isinstance(number, int):
        return f"{number:,}"
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:,.0f}"


def _chart_data(chart: Chart) -> dict[str, Any]:
    tables = {
        name: {column: _run_length_encoded(values) for column, values in table.items()}
        for name, table in chart.datasets.items()
    }
    words = {"name": chart.name, "text": chart.description}
    return {**words, "height": chart.height, "spec": chart.spec, "tables": tables}


def _run_length_encoded(values: Sequence[Any]) -> Any:
    """A column, with what repeats said once: {"runs": [value, count, value, count, ...]}."""
    values = [_rounded(value) for value in values]
    runs = [[value, sum(1 for _ in group)] for value, group in groupby(values)]
    if 3 * len(runs) > len(values):
        return values
    return {"runs": [item for run in runs for item in run]}


def _rounded(value: Any) -> Any:
    """More than six digits cannot be seen in a chart; tables have them all."""
    return finite_or_none(float(f"{value:.6g}")) if isinstance(value, float) else value
