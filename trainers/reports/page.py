"""A report as one HTML file that needs no other, and its charts as PNG files.

The file opens from a disk, without a network: it contains Vega, which draws the charts, and its
content security policy forbids it to load anything. Tables are plain HTML, and a script sorts them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from cluster.base.files import write_atomic
from trainers.reports.vega import (
    CONFIG,
    PALETTES,
    VEGA_LITE_VERSION,
    Chart,
    finite_or_none,
    write_png,
)

PAGE_FILE = "index.html"
PAGE_PARTS = Path(__file__).parent / "page_parts"
TEMPLATE = "page.html.jinja"
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'"
)
"""Nothing is fetched. `unsafe-eval` is there since Vega compiles its expressions."""


@dataclass(frozen=True)
class StatCard:
    """A number at the top of the page."""

    label: str
    value: str
    source: str = ""
    """Where the number comes from."""


@dataclass(frozen=True)
class DataTable:
    """A table. Cells are numbers, None for unknown, or text."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    selects_trial: bool = False
    """Whether the first column, of whole numbers, selects the trial that charts highlight."""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence["str | Sequence[StatCard] | DataTable | Chart"]
    """Paragraphs, cards, tables and charts, in their order."""


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
    """Write the page and a PNG file of each chart to `folder`; returns the page's path."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for chart in page.charts:
        write_png(chart, folder / f"{chart.name}.png")
    write_atomic(folder / PAGE_FILE, render_html(page))
    return folder / PAGE_FILE


def render_html(page: Page) -> str:
    """The page as HTML; all its text is escaped by jinja2."""
    import jinja2
    import vl_convert
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(PAGE_PARTS)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters |= {
        "anchor": _anchor,
        "format_number": format_number,
        "typed_blocks": _typed_blocks,
    }
    charts = [_chart_data(chart) for chart in page.charts]
    vega = vl_convert.javascript_bundle(None, VEGA_LITE_VERSION)  # type: ignore[arg-type]  # None: all of it
    return environment.get_template(TEMPLATE).render(
        page=page,
        policy=CONTENT_SECURITY_POLICY,
        palettes=PALETTES,
        css=Markup(_part("page.css")),
        drawn={"charts": charts, "palettes": PALETTES, "config": CONFIG},
        vega=Markup(_in_script(vega)),
        script=Markup(_part("page.js")),
    )


def _part(name: str) -> str:
    return (PAGE_PARTS / name).read_text(encoding="utf-8")


def _in_script(code: str) -> str:
    """JavaScript without `</script` in its strings, which would end the script element."""
    return re.sub("</(?=script)", r"<\\/", code, flags=re.IGNORECASE)


def _anchor(title: str) -> str:
    return f"section-{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}"


def _typed_blocks(blocks: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Each block with its kind for the template; successive charts are one block."""
    for is_charts, group in groupby(blocks, key=lambda block: isinstance(block, Chart)):
        if is_charts:
            yield "charts", list(group)
            continue
        for block in group:
            if isinstance(block, str):
                yield "text", block
            elif isinstance(block, DataTable):
                yield "table", block
            else:
                yield "cards", block


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
    """A column; if much of it repeats, as {"runs": [value, count, value, count, ...]}."""
    values = [_rounded(value) for value in values]
    runs = [[value, sum(1 for _ in group)] for value, group in groupby(values)]
    if 3 * len(runs) > len(values):
        return values
    return {"runs": [item for run in runs for item in run]}


def _rounded(value: Any) -> Any:
    """Six digits: a chart cannot show more, and tables have all of them."""
    return finite_or_none(float(f"{value:.6g}")) if isinstance(value, float) else value
