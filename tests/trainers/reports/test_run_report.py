"""The page of a run, and the history that is read for it from the run's folder."""

import json
import math
import re
from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from cluster.cost.ledger import Ledger, LedgerEntry
from trainers.reports.charts import idle_spans
from trainers.reports.history import RunHistory, Series, Span, busy_spans, read_histories
from trainers.reports.page import render_html
from trainers.reports.run_report import run_page, step_parts
from trainers.run_folder import TRACKING
from trainers.tracking.operation_log import OperationLog


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two workers with metrics of every kind; the name of one of them is HTML."""
    folder = tmp_path / "best"
    log = OperationLog(folder / TRACKING)
    params = {"workload": "vision", "note": "</script><script>alert(1)</script>"}
    start = {"key": "best", "params": params, "tags": {"heliostat.kind": "train"}, "parent": None}
    log.append({"do": "start", "id": "1", **start, "at": 1_000_000})
    rows = [("train/loss", 2.0 / step, step, 1_000_000 + step) for step in range(1, 6)]
    rows += [("val/loss", [2.5, math.nan, 0.5][n], 2 * n + 1, 1_000_010) for n in range(3)]
    rows += [("test/<b>", 0.25, 5, 1_000_010)]
    for step in (2, 4):
        parts = {"data": 0.1, "compute": 0.3}
        rows += [("perf/step_s", 0.4, step, 1_000_010)]
        rows += [(f"perf/{part}_s", s * step, step, 1_000_010) for part, s in parts.items()]
        rows += [(f"perf/{part}_share", s / 0.4, step, 1_000_010) for part, s in parts.items()]
    forecast = {"wall_s": 60.0, "low_s": 50.0, "high_s": 75.0, "actual_s": 66.0}
    rows += [(f"forecast/{name}", value, 5, 1_000_010) for name, value in forecast.items()]
    for workers, speed in ((1, 100.0), (2, 180.0)):
        for name in ("samples_per_s", "fitted_samples_per_s"):
            rows += [(f"scaling/strong/{name}", speed, workers, 1_000_010)]
    rows += [("cost_usd", 0.125, 9, 1_000_020)]
    log.append({"do": "log", "run": "best", "rows": rows})
    log.append({"do": "made", "key": "best", "id": "abc"})
    tags = {"heliostat.price": "$1/h (a price list)"}
    ended = {"do": "finish", "run": "best", "status": "FINISHED", "tags": tags, "at": 1_060_000}
    log.append(ended)
    log.close()
    ledger = Ledger(folder / "ledger.jsonl")
    for worker in range(2):
        used = {"device": f"vm/cpu/{worker}", "covers": "cpu"}
        times = (1000.0 + worker, 1030.0 + worker, 30.0)
        device = f"vm/cpu/{worker}"
        entry = LedgerEntry(
            f"w{worker}/{device}", "best", "energy", *times, "vm", device, None, used
        )
        ledger.append([entry])
    ledger.close()
    return folder


def test_the_history_is_as_it_was_logged(folder: Path) -> None:
    record = read_histories(folder)["best"]
    assert (record.status, record.run_id) == ("FINISHED", "abc")
    assert record.last_update_ms - record.started_ms == 60_000
    assert list(record.series["train/loss"].steps) == [1, 2, 3, 4, 5]
    assert record.latest("train/loss") == 0.4
    assert record.latest("nothing") is None
    assert math.isnan(record.series["val/loss"].values[1])


def test_costs_that_come_after_the_end_do_not_move_it(folder: Path) -> None:
    """A sweep's trials are charged when all have ended, and again when it is resumed."""
    log = OperationLog(folder / TRACKING)
    log.append({"do": "log", "run": "best", "rows": [("cost_usd", 0.25, 10, 9_000_000)]})
    log.append({"do": "finish", "run": "best", "status": "FINISHED", "tags": {}, "at": 9_000_001})
    log.close()
    record = read_histories(folder)["best"]
    assert record.last_update_ms - record.started_ms == 60_000
    assert record.latest("cost_usd") == 0.25


def test_a_run_that_goes_on_has_not_ended(folder: Path) -> None:
    """A trial that failed, or was stopped by a scheduler, and is started again."""
    log = OperationLog(folder / TRACKING)
    for tags in ({"heliostat.reason": "KeyError"}, {"heliostat.stopped": "asha"}):
        log.append({"do": "finish", "run": "best", "status": "FAILED", "tags": tags, "at": 9})
    assert read_histories(folder)["best"].tags["heliostat.reason"] == "KeyError"
    log.append({"do": "resume", "run": "best", "tags": {"note": "again"}})
    log.close()
    record = read_histories(folder)["best"]
    assert (record.status, record.tags["note"]) == ("RUNNING", "again")
    assert {"heliostat.price", "heliostat.kind"} <= record.tags.keys()
    assert not {"heliostat.reason", "heliostat.stopped"} & record.tags.keys()


def test_devices_have_lanes_and_idle_times(folder: Path) -> None:
    found = busy_spans(folder, read_histories(folder))
    first, second = "vm cpu, 1", "vm cpu, 2"
    assert found == [Span(first, "best", 1000, 1030), Span(second, "best", 1001, 1031)]
    idle = idle_spans([*found, Span(first, "best", 1030.5, 1031)])
    assert [(gap.lane, gap.begin, gap.end) for gap in idle] == [
        (first, 1030, 1030.5),
        (second, 1000, 1001),
    ]


def test_the_page_has_a_section_for_each_kind_of_metric(folder: Path) -> None:
    page = run_page(folder)
    assert [section.title for section in page.sections] == [
        "Summary",
        "Learning curves",
        "Where the time goes",
        "Scaling",
        "Forecast and actual",
        "Energy and cost",
        "All metrics",
        "How it was made",
    ]
    charts = {chart.name: chart for chart in page.charts}
    assert charts.keys() == {"curve-loss", "step-time", "time-line", "scaling"}
    parts = charts["step-time"].datasets["parts"]
    ms = dict(zip(zip(parts["row"], parts["part"], strict=True), parts["ms"], strict=True))
    assert ms == pytest.approx(
        {
            ("1 to 2", "data"): 200,
            ("1 to 2", "compute"): 600,
            ("3 to 4", "data"): 400,
            ("3 to 4", "compute"): 1200,
        }
    )
    speeds = charts["scaling"].datasets["speeds"]
    ideal = [s for s, kind in zip(speeds["speed"], speeds["kind"], strict=True) if kind == "ideal"]
    assert ideal == [100, 200]


def test_step_times_are_weighted_by_the_steps_that_a_report_covers() -> None:
    """Nine steps of 1 s, then one of 11 s, in which a part appears for the first time."""
    run = RunHistory("run", {}, {}, 0, 0)
    for name, steps, values in (
        ("perf/step_s", [9, 10], [1.0, 11.0]),
        ("perf/compute_s", [9, 10], [1.0, 6.0]),
        ("perf/compute_share", [9, 10], [1.0, 6 / 11]),
        ("perf/save_s", [10], [5.0]),
        ("perf/save_share", [10], [5 / 11]),
    ):
        run.series[name] = Series(steps, values)
    assert step_parts(run) == pytest.approx({"compute": 1.5, "save": 0.5})
    assert step_parts(run, first=9) == {"compute": 6.0, "save": 5.0}
    assert step_parts(run, last=9) == {"compute": 1.0}


def test_text_of_the_run_is_escaped(folder: Path) -> None:
    text = render_html(run_page(folder))
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert "<b>" not in text
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names)), "two elements have one id"
    data = re.search(r'id="drawn">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    [loss] = [c for c in json.loads(data[1])["charts"] if c["name"] == "curve-loss"]
    assert None in loss["tables"]["points"]["y"], "NaN is no JSON"


def test_a_folder_without_tracking_gives_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nothing was tracked yet"):
        read_histories(tmp_path)
