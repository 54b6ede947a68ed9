"""The report of a run, and the parts that it shares with the report of a sweep."""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from cluster.cost.budget import duration_text, usd_text
from cluster.cost.energy_meter import joules_text
from trainers.reports import charts
from trainers.reports.history import RunHistory, Series, busy_spans, read_histories
from trainers.reports.page import DataTable, Page, Section, StatCard, format_number
from trainers.reports.vega import Chart, Columns, with_unit

SPLITS = ("train", "val", "test")
PERFORMANCE_METRICS = ("samples_per_s", "tokens_per_s", "mfu", "goodput", "peak_memory_bytes")
"""Metrics of `perf/` that are drawn over the steps."""
MAX_STEP_RANGES = 12
"""Rows of the chart of step times, each for a range of the run's steps."""
MAX_POINTS = 4000
"""Points of a curve: a screen has fewer dots."""
COSTS = {
    "cost_usd": ("cost", "US$", "price"),
    "cost_idle_usd": ("of it for idle nodes", "US$", "price"),
    "energy_j": ("energy", "J", "energy"),
    "energy_low_j": ("energy, at least", "J", "energy_method"),
    "energy_high_j": ("energy, at most", "J", "energy_method"),
    "kg_co2e": ("carbon", "kg CO2e", "carbon"),
}
"""Metric -> its label, its unit, and the tag with its source."""


def run_page(folder: Path) -> Page:
    """The report of the run in `folder`. Raises SpecError where nothing was tracked yet."""
    histories = read_histories(folder)
    run = histories[folder.name]
    spans = busy_spans(folder, histories)
    time_charts = [*step_time_charts([run], "steps"), *performance_charts(run)]
    if spans:
        time_charts.append(charts.timeline_chart(spans, {run.key: end_status(run)}))
    sections = [
        Section("Summary", [summary_cards(run)]),
        Section("Learning curves", list(learning_curves(run))),
        Section("Where the time goes", time_charts),
        Section("Scaling", list(scaling_blocks(run))),
        Section("Forecast and actual", list(forecast_blocks(run))),
        Section("Energy and cost", list(costs_table(run))),
        Section("All metrics", [metrics_table(run)]),
        Section("How it was made", list(provenance(run))),
    ]
    return Page(run.key, subtitle(run), [section for section in sections if section.blocks])


def subtitle(run: RunHistory) -> str:
    """A line: the kind of run, its workload, its begin, its end, and MLflow's id."""
    kind = run.tags.get("heliostat.kind", "run")
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.started_ms / 1000))
    reason = run.tags.get("heliostat.reason")
    ended = f"{run.status}{f': {reason}' if reason else ''}"
    mlflow_run = f"MLflow run {run.run_id}" if run.run_id else "not in MLflow yet"
    return f"{kind} of {run.params.get('workload')}, begun {began}, {ended}; {mlflow_run}"


def end_status(run: RunHistory) -> str:
    """How a run or trial ended: a key of `charts.STATUS_COLOURS`."""
    if run.status == "FINISHED":
        return "stopped" if "heliostat.stopped" in run.tags else "complete"
    return {"RUNNING": "running", "FAILED": "failed"}.get(run.status, "stopped")


def summary_cards(run: RunHistory) -> Sequence[StatCard]:
    metrics = run.latest_values
    evaluated = [name for name in metrics if name.startswith(("val/", "test/"))]
    cards = [StatCard(name, format_number(metrics[name]), "newest value") for name in evaluated]
    return [*cards, wall_time_card(run), *cost_cards(run)]


def wall_time_card(run: RunHistory) -> StatCard:
    seconds = (run.last_update_ms - run.started_ms) / 1000
    return StatCard("wall time", duration_text(seconds), "from the start to the last update")


def cost_cards(run: RunHistory) -> Iterator[StatCard]:
    """A card for each of cost, energy and carbon that was logged."""
    texts = {"cost_usd": usd_text, "energy_j": joules_text, "kg_co2e": _carbon_text}
    for name, text in texts.items():
        label, _, tag = COSTS[name]
        value = run.latest(name)
        if value is not None:
            yield StatCard(label, text(value), run.tags.get(f"heliostat.{tag}", ""))


def _carbon_text(kg: float) -> str:
    return f"{kg:.4g} kg CO2e" if kg >= 0.1 else f"{kg * 1000:.4g} g CO2e"


def metrics_table(run: RunHistory) -> DataTable:
    """The newest value of each metric, as on MLflow's page of a run."""
    rows = [
        (name, series.values[-1], series.steps[-1]) for name, series in sorted(run.series.items())
    ]
    return DataTable("metrics", "Newest value of every metric", ("metric", "value", "step"), rows)


def learning_curves(run: RunHistory) -> Iterator[Chart]:
    """A chart for each metric of training and evaluation, with its splits."""
    families: dict[str, dict[str, Series]] = {}
    for name, series in run.series.items():
        split, _, metric = name.partition("/")
        if split in SPLITS and name != "train/epoch":
            families.setdefault(metric, {})[split] = series
    for metric, by_split in families.items():
        if all(len(series.values) < 2 for series in by_split.values()):
            continue
        ends = ", ".join(f"{split} {format_number(s.values[-1])}" for split, s in by_split.items())
        yield curve_over_steps(metric, by_split, f"{metric} over the steps. At the end: {ends}.")


def curve_over_steps(metric: str, by_kind: Mapping[str, Series], text: str) -> Chart:
    drawn = {kind: downsample(series, MAX_POINTS) for kind, series in by_kind.items()}
    if any(len(drawn[kind].steps) < len(by_kind[kind].steps) for kind in by_kind):
        text += f" An even grid of {MAX_POINTS:,} points of each is drawn."
    points: Columns = {
        "x": [step for series in drawn.values() for step in series.steps],
        "y": [value for series in drawn.values() for value in series.values],
        "kind": [kind for kind, series in drawn.items() for _ in series.steps],
    }
    name = f"curve-{metric.replace('/', '-').replace('_', '-')}"
    return charts.line_chart(name, with_unit(metric), "step", {"points": points}, text)


def downsample(series: Series, max_points: int) -> Series:
    """An even grid of at most `max_points` points, with the first and the last one."""
    count = len(series.steps)
    if count <= max_points:
        return series
    kept = [round(n * (count - 1) / (max_points - 1)) for n in range(max_points)]
    return Series([series.steps[n] for n in kept], [series.values[n] for n in kept])


def performance_charts(run: RunHistory) -> Iterator[Chart]:
    for name in PERFORMANCE_METRICS:
        series = run.series.get(f"perf/{name}")
        if series and len(series.values) > 1:
            text = f"perf/{name} over the steps. At the end: {format_number(series.values[-1])}."
            yield curve_over_steps(f"perf/{name}", {"run": series}, text)


def step_time_charts(runs: Sequence[RunHistory], row_title: str) -> Iterator[Chart]:
    """The time of a step by its parts; a row for each run, or each range of steps of one run."""
    if len(runs) == 1:
        rows = [(label, parts) for label, parts in _step_ranges(runs[0]) if parts]
    else:
        named = [(run.key.rpartition("/")[2], step_parts(run)) for run in runs]
        rows = [(name, parts) for name, parts in named if parts]
    if rows:
        yield charts.step_time_chart(rows, row_title)


def step_parts(run: RunHistory, first: int = 0, last: int | None = None) -> dict[str, float]:
    """Part of a step -> its mean seconds over the steps after `first` and up to `last`.

    Each report of `perf/` is a mean over the steps since the report before it, so it is weighted
    by their number.
    """
    steps = run.series["perf/step_s"].steps if "perf/step_s" in run.series else []
    weights = {
        step: step - before
        for before, step in pairwise([0, *steps])
        if step > first and (last is None or step <= last)
    }
    found = {}
    for name, series in run.series.items():
        part = name.removeprefix("perf/").removesuffix("_s")
        if name != f"perf/{part}_s" or f"perf/{part}_share" not in run.series:
            continue
        pairs = zip(series.steps, series.values, strict=True)
        values = [weights[step] * value for step, value in pairs if step in weights]
        if values:
            found[part] = sum(values) / sum(weights.values())
    return found


def _step_ranges(run: RunHistory) -> Iterator[tuple[str, dict[str, float]]]:
    steps = run.series["perf/step_s"].steps if "perf/step_s" in run.series else []
    ends = downsample(Series(steps, [0.0] * len(steps)), MAX_STEP_RANGES).steps
    for first, last in pairwise([0, *ends]):
        yield f"{first + 1} to {last}", step_parts(run, first, last)


def scaling_blocks(run: RunHistory) -> Iterator[Chart | str]:
    """The measurements of `heliostat scaling`, in the folder of such a study."""
    measured = {}
    for mode in ("strong", "weak"):
        speed = run.series.get(f"scaling/{mode}/samples_per_s")
        fitted = run.series.get(f"scaling/{mode}/fitted_samples_per_s")
        if speed and fitted:
            table: Columns = {
                "workers": list(speed.steps),
                "speed": list(speed.values),
                "fitted": list(fitted.values),
            }
            measured[mode] = table
    if measured:
        yield charts.scaling_chart(measured)
    if "heliostat.recommended_workers" in run.tags:
        yield f"Recommended workers: {run.tags['heliostat.recommended_workers']}."


def forecast_blocks(run: RunHistory) -> Iterator[str | DataTable]:
    """The forecast of the run's wall time, and the actual time."""
    names = {"wall_s": "forecast", "low_s": "at least", "high_s": "at most"}
    names["actual_s"] = "actual"
    known = {text: run.latest(f"forecast/{name}") for name, text in names.items()}
    if "heliostat.forecast" in run.tags:
        yield run.tags["heliostat.forecast"]
    if known["forecast"] is not None:
        rows = list(known.items())
        yield DataTable("forecast", "Wall time of the run", ("", "time (s)"), rows)


def costs_table(run: RunHistory) -> Iterator[DataTable]:
    if not any(name in run.series for name in COSTS):
        return
    rows = [
        (label, run.latest(name), unit, run.tags.get(f"heliostat.{tag}", ""))
        for name, (label, unit, tag) in COSTS.items()
    ]
    columns = ("quantity", "amount", "unit", "source")
    yield DataTable("costs", "Energy, cost and carbon, with their sources", columns, rows)


def provenance(run: RunHistory) -> Iterator[str | DataTable]:
    commit = run.tags.get("mlflow.source.git.commit")
    if commit:
        changed = run.tags.get("heliostat.git.changed") == "true"
        yield f"Code: commit {commit}{', with changes that are not in it' if changed else ''}."
    rows = [(path, "" if value is None else str(value)) for path, value in run.params.items()]
    yield DataTable("spec", "The spec, with all defaults", ("field", "value"), rows)
