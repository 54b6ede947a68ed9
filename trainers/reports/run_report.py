"""The report of a run, and the parts that the report of a sweep has too."""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from cluster.cost.budget import duration_text, usd_text
from cluster.cost.energy_meter import joules_text
from trainers.reports import charts
from trainers.reports.charts import Chart, Columns
from trainers.reports.history import RunHistory, Series, busy_spans, read_histories
from trainers.reports.page import DataTable, Page, Section, StatCard, format_number

SPLITS = ("train", "val", "test")
PERFORMANCE_METRICS = ("samples_per_s", "tokens_per_s", "mfu", "goodput", "peak_memory_bytes")
"""Of `perf/`, what is drawn over the steps."""
MAX_STEP_RANGES = 12
"""Rows into which the steps of a run are put together."""
MAX_POINTS = 4000
"""Of a curve that stands alone: a screen has fewer dots."""
COSTS = {
    "cost_usd": ("cost", "US$", "price"),
    "cost_idle_usd": ("of it for idle nodes", "US$", "price"),
    "energy_j": ("energy", "J", "energy"),
    "energy_low_j": ("energy, at the least", "J", "energy_method"),
    "energy_high_j": ("energy, at the most", "J", "energy_method"),
    "kg_co2e": ("carbon", "kg CO2e", "carbon"),
}
"""Metric -> what it is, its unit, and the tag that says where it is from."""


def run_page(folder: Path) -> Page:
    """The report of the run in `folder`. Raises SpecError where nothing was tracked yet."""
    found = read_histories(folder)
    record = found[folder.name]
    timeline = busy_spans(folder, found)
    kinds = {record.key: end_status(record)}
    time_charts = [*step_time_charts([record], "steps"), *performance_charts(record)]
    if timeline:
        time_charts.append(charts.timeline_chart(timeline, kinds))
    sections = [
        Section("Summary", [summary_cards(record)]),
        Section("Learning curves", list(learning_curves(record))),
        Section("Where the time goes", time_charts),
        Section("Scaling", list(scaling_blocks(record))),
        Section("Forecast and actual", list(forecast_blocks(record))),
        Section("Energy and cost", list(costs_table(record))),
        Section("All metrics", [metrics_table(record)]),
        Section("How it was made", list(provenance(record))),
    ]
    return Page(record.key, subtitle(record), [each for each in sections if each.blocks])


def subtitle(record: RunHistory) -> str:
    """What the report is about, in a line."""
    kind = record.tags.get("heliostat.kind", "run")
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.started_ms / 1000))
    reason = record.tags.get("heliostat.reason")
    ended = f"{record.status}{f': {reason}' if reason else ''}"
    told = f"MLflow run {record.run_id}" if record.run_id else "not in MLflow yet"
    return f"{kind} of {record.params.get('workload')}, begun {began}, {ended}; {told}"


def end_status(record: RunHistory) -> str:
    """How a run or trial ended, as `charts.KINDS` names it."""
    if record.status == "FINISHED":
        return "stopped" if "heliostat.stopped" in record.tags else "complete"
    return {"RUNNING": "running", "FAILED": "failed"}.get(record.status, "stopped")


def summary_cards(record: RunHistory) -> Sequence[StatCard]:
    metrics = record.latest_values
    evaluated = [name for name in metrics if name.startswith(("val/", "test/"))]
    tiles = [StatCard(name, format_number(metrics[name]), "newest value") for name in evaluated]
    return [*tiles, wall_time_card(record), *cost_cards(record)]


def wall_time_card(record: RunHistory) -> StatCard:
    seconds = (record.last_update_ms - record.started_ms) / 1000
    return StatCard("wall time", duration_text(seconds), "from its start to what it told last")


def cost_cards(record: RunHistory) -> Iterator[StatCard]:
    """What is known of them."""
    texts = {"cost_usd": usd_text, "energy_j": joules_text, "kg_co2e": _carbon_text}
    for name, text in texts.items():
        label, _, tag = COSTS[name]
        value = record.latest(name)
        if value is not None:
            yield StatCard(label, text(value), record.tags.get(f"heliostat.{tag}", ""))


def _carbon_text(kg: float) -> str:
    return f"{kg:.4g} kg CO2e" if kg >= 0.1 else f"{kg * 1000:.4g} g CO2e"


def metrics_table(record: RunHistory) -> DataTable:
    """All metrics of a run, as MLflow shows them first."""
    rows = [
        (name, series.values[-1], series.steps[-1])
        for name, series in sorted(record.series.items())
    ]
    return DataTable("metrics", "Newest value of every metric", ("metric", "value", "step"), rows)


def learning_curves(record: RunHistory) -> Iterator[Chart]:
    """A chart for each metric of training and evaluation, with its splits."""
    families: dict[str, dict[str, Series]] = {}
    for name, series in record.series.items():
        split, _, what = name.partition("/")
        if split in SPLITS and name != "train/epoch":
            families.setdefault(what, {})[split] = series
    for what, by_split in families.items():
        if all(len(series.values) < 2 for series in by_split.values()):
            continue
        ends = ", ".join(f"{split} {format_number(s.values[-1])}" for split, s in by_split.items())
        yield curve_over_steps(what, by_split, f"{what} over the steps. At the end: {ends}.")


def curve_over_steps(what: str, by_kind: Mapping[str, Series], text: str) -> Chart:
    thinned = {kind: downsample(series, MAX_POINTS) for kind, series in by_kind.items()}
    if any(len(thinned[kind].steps) < len(by_kind[kind].steps) for kind in by_kind):
        text += f" An even grid of {MAX_POINTS:,} points of each is drawn."
    table: Columns = {
        "x": [step for series in thinned.values() for step in series.steps],
        "y": [value for series in thinned.values() for value in series.values],
        "kind": [kind for kind, series in thinned.items() for _ in series.steps],
    }
    title = charts.with_unit(what)
    name = f"curve-{what.replace('/', '-').replace('_', '-')}"
    return charts.line_chart(name, title, "step", {"points": table}, text)


def downsample(series: Series, max_points: int) -> Series:
    """An even grid of at most so many points, the last one always."""
    count = len(series.steps)
    if count <= max_points:
        return series
    kept = [round(n * (count - 1) / (max_points - 1)) for n in range(max_points)]
    return Series([series.steps[n] for n in kept], [series.values[n] for n in kept])


def performance_charts(record: RunHistory) -> Iterator[Chart]:
    for name in PERFORMANCE_METRICS:
        series = record.series.get(f"perf/{name}")
        if series and len(series.values) > 1:
            text = f"perf/{name} over the steps. At the end: {format_number(series.values[-1])}."
            yield curve_over_steps(f"perf/{name}", {"run": series}, text)


def step_time_charts(found: Sequence[RunHistory], what: str) -> Iterator[Chart]:
    """The parts of a step: of one run by its steps, of several as a row each."""
    if len(found) == 1:
        rows = [(label, parts) for label, parts in _step_ranges(found[0]) if parts]
    else:
        named = [(record.key.rpartition("/")[2], step_parts(record)) for record in found]
        rows = [(name, parts) for name, parts in named if parts]
    if rows:
        yield charts.step_time_chart(rows, what)


def step_parts(record: RunHistory, first: int = 0, last: int | None = None) -> dict[str, float]:
    """Part of a step -> its mean seconds over what was logged after step `first`, up to `last`."""
    found = {}
    for name, series in record.series.items():
        part = name.removeprefix("perf/").removesuffix("_s")
        if f"perf/{part}_share" not in record.series:
            continue
        pairs = zip(series.steps, series.values, strict=True)
        values = [v for step, v in pairs if step > first and (last is None or step <= last)]
        if name == f"perf/{part}_s" and values:
            found[part] = sum(values) / len(values)
    return found


def _step_ranges(record: RunHistory) -> Iterator[tuple[str, dict[str, float]]]:
    steps = record.series["perf/step_s"].steps if "perf/step_s" in record.series else []
    ends = downsample(Series(steps, [0.0] * len(steps)), MAX_STEP_RANGES).steps
    for first, last in pairwise([0, *ends]):
        yield f"{first + 1} to {last}", step_parts(record, first, last)


def scaling_blocks(record: RunHistory) -> Iterator[Chart | str]:
    """What `heliostat scaling` measured, where this is its folder."""
    measured = {}
    for mode in ("strong", "weak"):
        speed = record.series.get(f"scaling/{mode}/samples_per_s")
        fitted = record.series.get(f"scaling/{mode}/fitted_samples_per_s")
        if speed and fitted:
            table: Columns = {
                "workers": speed.steps,
                "speed": speed.values,
                "fitted": fitted.values,
            }
            measured[mode] = table
    if measured:
        yield charts.scaling_chart(measured)
    if "heliostat.recommended_workers" in record.tags:
        yield f"Recommended workers: {record.tags['heliostat.recommended_workers']}."


def forecast_blocks(record: RunHistory) -> Iterator[str | DataTable]:
    """What `heliostat plan` said of this run, and what became of it."""
    names = {"wall_s": "forecast", "low_s": "at the least", "high_s": "at the most"}
    names["actual_s"] = "actual"
    known = {text: record.latest(f"forecast/{name}") for name, text in names.items()}
    if "heliostat.forecast" in record.tags:
        yield record.tags["heliostat.forecast"]
    if known["forecast"] is not None:
        rows = list(known.items())
        yield DataTable("forecast", "Wall time of the run", ("", "time (s)"), rows)


def costs_table(record: RunHistory) -> Iterator[DataTable]:
    if not any(name in record.series for name in COSTS):
        return
    rows = [
        (label, record.latest(name), unit, record.tags.get(f"heliostat.{tag}", ""))
        for name, (label, unit, tag) in COSTS.items()
    ]
    columns = ("what", "amount", "unit", "source")
    yield DataTable("costs", "Energy, cost and carbon, and where each is from", columns, rows)


def provenance(record: RunHistory) -> Iterator[str | DataTable]:
    commit = record.tags.get("mlflow.source.git.commit")
    if commit:
        changed = record.tags.get("heliostat.git.changed") == "true"
        yield f"Code: commit {commit}{', with changes that are not in it' if changed else ''}."
    rows = [(path, "" if value is None else str(value)) for path, value in record.params.items()]
    yield DataTable("spec", "The spec, with all defaults", ("field", "value"), rows)
