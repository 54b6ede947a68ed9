"""The page of a sweep: its numbers are those of MLflow, and it is accessible."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from cluster.base.config import read_yaml
from heliostat.main import main
from trainers.run_folder import TRACKING
from trainers.tracking.tracker import flush
from tuning.reports.sweep_report import sweep_page
from tuning.trials.trial import Sweep

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")
sys.path.append(BENCHMARKS)
browsers, made = importlib.import_module("browser"), importlib.import_module("report")
sys.path.remove(BENCHMARKS)

needs_browser = pytest.mark.skipif(not browsers.CHROMIUM, reason="chromium is not installed")
TRIALS = 9


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep of made-up numbers, with MLflow and with its report."""
    folder = tmp_path_factory.mktemp("report")
    uri = f"sqlite:///{folder}/mlflow.db"
    sweep: Sweep = made.made_up(folder, "wide", TRIALS, 10, f"tracking.uri={uri}")
    tracking = read_yaml(sweep.folder / "spec.yaml")["tracking"]
    flush(sweep.folder / TRACKING, uri, tracking["experiment"])
    assert main(["report", str(sweep.folder)]) == 0
    return sweep


@pytest.fixture(scope="module")
def mlflow_runs(sweep: Sweep) -> dict[str, Any]:
    """MLflow's runs by name."""
    client = mlflow.MlflowClient(sweep.spec_data["tracking"]["uri"])
    [experiment] = client.search_experiments(filter_string="name != 'Default'")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.fixture(scope="module")
def tab(sweep: Sweep) -> Iterator[Any]:
    with browsers.browser() as tab:
        tab.resize(1280, 900)
        tab.open(sweep.folder / "report" / "index.html")
        tab.run("report.drawAll()")
        yield tab


def test_the_page_and_its_charts_are_logged_to_mlflow(
    sweep: Sweep, mlflow_runs: dict[str, Any]
) -> None:
    client = mlflow.MlflowClient(sweep.spec_data["tracking"]["uri"])
    kept = {item.path for item in client.list_artifacts(mlflow_runs["wide"].info.run_id, "report")}
    charts = {f"report/{chart.name}.png" for chart in sweep_page(sweep.folder).charts}
    assert kept == charts | {"report/index.html"}
    assert len(charts) >= 12
    for chart in charts:
        assert (sweep.folder / chart).read_bytes().startswith(b"\x89PNG")
    assert (sweep.folder / "report" / "index.html").stat().st_size < 5e6


@needs_browser
def test_charts_are_drawn_without_errors_or_requests(sweep: Sweep, tab: Any) -> None:
    assert tab.complaints == []
    assert {address.partition(":")[0] for address in tab.requests} == {"file"}
    assert len(tab.requests) == 1
    places = "[...document.querySelectorAll('.chart')]"
    drawn = tab.run(f"{places}.filter(c => c.querySelector('svg, canvas')).map(c => c.id)")
    assert drawn == [chart.name for chart in sweep_page(sweep.folder).charts]


READ_TABLE = """[...document.querySelectorAll("#leaderboard tbody tr")].map(row =>
    [...row.cells].map(cell => cell.dataset.v ?? cell.textContent))"""
HEADS = """[...document.querySelectorAll("#leaderboard thead th")].map(cell => cell.textContent)"""


@needs_browser
def test_its_numbers_are_those_of_mlflow(tab: Any, mlflow_runs: dict[str, Any]) -> None:
    heads, rows = tab.run(HEADS), tab.run(READ_TABLE)
    assert len(rows) == TRIALS - 1, "the trial that failed has no place"
    columns = {
        "val/loss": "metric val/loss",
        "cost_usd (US$)": "metric cost_usd",
        "energy_j (J)": "metric energy_j",
        "optimizer.lr": "param optimizer.lr",
        "model.width": "param model.width",
    }
    for row in rows:
        run = mlflow_runs[f"wide-{int(row[0]):04d}"].data
        cells = dict(zip(heads, row, strict=True))
        stopped = "heliostat.stopped" in run.tags
        assert cells["ended"] == ("stopped" if stopped else "complete")
        for column, source in columns.items():
            kind, name = source.split(" ")
            known = run.metrics[name] if kind == "metric" else run.params[name]
            assert float(cells[column]) == float(known), column
    losses = [float(row[1]) for row in rows]
    assert losses == sorted(losses)


@needs_browser
def test_its_curves_are_those_of_mlflow(
    tab: Any, sweep: Sweep, mlflow_runs: dict[str, Any]
) -> None:
    points = tab.run("report.views.get('curves-val-loss').data('points')")
    client = mlflow.MlflowClient(sweep.spec_data["tracking"]["uri"])
    for number in range(TRIALS - 1):
        history = client.get_metric_history(
            mlflow_runs[f"wide-{number:04d}"].info.run_id, "val/loss"
        )
        drawn = [point["value"] for point in points if point["trial"] == number]
        assert drawn == pytest.approx([metric.value for metric in history], rel=1e-5)


@needs_browser
def test_keys_sort_the_table_and_select_a_trial(tab: Any) -> None:
    def focused() -> str:
        return str(tab.run("document.activeElement.textContent"))

    tab.run("document.querySelector('#leaderboard').parentElement.focus()")
    for _ in range(2):
        tab.press("Tab")
    assert focused() == "val/loss"
    column = (
        "[...document.querySelectorAll('#leaderboard tbody tr')].map(r => +r.cells[1].dataset.v)"
    )
    for order, sign in (("ascending", 1), ("descending", -1)):
        tab.press("Enter", "\r")
        assert tab.run("document.activeElement.parentElement.ariaSort") == order
        values = [sign * value for value in tab.run(column)]
        assert values == sorted(values)
    while not re.fullmatch(r"\d{4}", focused()):
        tab.press("Tab")
    number = int(focused())
    tab.press("Enter", "\r")
    assert tab.run("document.activeElement.ariaPressed") == "true"
    seen = tab.run(PICKED)
    assert len(seen) > 5
    assert set(seen) == {number}


PICKED = """Promise.all([...report.views.values()]
    .filter((view) => "picked" in view.getState().signals)
    .map((view) => view.runAsync().then(() => view.signal("picked"))))"""

CONTRASTS = """(() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((v) => {
      v = v / 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const contrast = (color) => {
    const [a, b] = [paper, light(color)].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const kinds = "h1, h2, p, dt, dd, a, td, figcaption, caption, th button";
  const words = [...document.querySelectorAll(kinds)];
  const found = words.map((word) => contrast(getComputedStyle(word).color));
  for (const text of document.querySelectorAll("svg text"))
    if (text.textContent) found.push(contrast(getComputedStyle(text).fill));
  return [paper, Math.min(...found)];
})()"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_can_be_read_on_a_phone_and_in_the_dark(sweep: Sweep, tab: Any, dark: bool) -> None:
    """4.5 is the contrast that WCAG 2.2 asks for text (1.4.3)."""
    tab.resize(390, 844, dark)
    tab.open(sweep.folder / "report" / "index.html")
    tab.run("report.drawAll()")
    paper, contrast = tab.run(CONTRASTS)
    assert (paper < 0.1) == dark
    assert contrast >= 4.5
    width, window = tab.run("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= window, "it is scrolled sideways"
    assert tab.complaints == []


@needs_browser
def test_screen_readers_get_a_description_of_every_chart(tab: Any, sweep: Sweep) -> None:
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]

    def named(role: str) -> list[str]:
        return [
            node["name"]["value"]
            for node in nodes
            if not node["ignored"] and node["role"]["value"] == role
        ]

    charts = sweep_page(sweep.folder).charts
    assert named("figure") == [chart.title for chart in charts]
    described = " ".join(named("graphics-document") + named("image") + named("img"))
    described += " ".join(json.dumps(n.get("description", {}).get("value", "")) for n in nodes)
    for chart in charts:
        assert chart.description in described
    assert "wide" in named("heading")


def test_without_mlflow_the_page_is_written_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], free_port: int
) -> None:
    uri = f"http://127.0.0.1:{free_port}"
    small = made.made_up(tmp_path, "alone", 1, 2, f"tracking.uri={uri}")
    assert main(["report", str(small.folder)]) == 0
    output = capsys.readouterr().out
    assert "not in MLflow: " in output
    assert len(output.splitlines()) == 2
    page = (small.folder / "report" / "index.html").read_text()
    assert "No trial was evaluated yet." in page
    assert "trial 0000 failed: made up" in page


def test_an_unknown_name_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "nosuch"]) == 2
    assert "nosuch: no such run or sweep" in capsys.readouterr().err
