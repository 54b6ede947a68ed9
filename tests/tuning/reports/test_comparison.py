"""Two sweeps in one page: the numbers of both, and only of sweeps that can be compared."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import read_yaml, write_yaml
from cluster.base.errors import SpecError
from heliostat.main import main
from trainers.reports.page import DataTable, Page
from tuning.reports.comparison import comparison_page
from tuning.trials.leaderboard import read_leaderboard
from tuning.trials.trial import Sweep

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")
sys.path.append(BENCHMARKS)
made = importlib.import_module("report")
sys.path.remove(BENCHMARKS)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> list[Sweep]:
    """A sweep of nine trials and one of six, with another learning rate's range."""
    folder = tmp_path_factory.mktemp("compare")
    other = "sweep.parameters.optimizer.lr.loguniform=[1e-3, 1e-2]"
    return [made.made_up(folder, "wide", 9, 6), made.made_up(folder, "narrow", 6, 6, other)]


@pytest.fixture(scope="module")
def page(sweeps: list[Sweep]) -> Page:
    return comparison_page([sweep.folder for sweep in sweeps])


def table(page: Page, name: str) -> DataTable:
    blocks = [block for section in page.sections for block in section.blocks]
    return next(b for b in blocks if isinstance(b, DataTable) and b.name == name)


def test_the_best_trials_of_both_are_ranked_together(page: Page, sweeps: list[Sweep]) -> None:
    """Independently: the boards of both, merged and sorted by hand."""
    expected = sorted(
        (result.value, sweep.key, f"{result.number:04d}")
        for sweep in sweeps
        for result in read_leaderboard(sweep).results
    )
    rows = table(page, "best").rows
    assert [(row[2], row[0], row[1]) for row in rows] == expected
    assert len(rows) == 8 + 5, "the last trial of each has failed"


def test_the_best_so_far_is_the_running_minimum(page: Page, sweeps: list[Sweep]) -> None:
    [chart] = [chart for chart in page.charts if chart.name == "best-over-trials"]
    points: dict[str, Any] = {key: list(column) for key, column in chart.datasets["best"].items()}
    for sweep in sweeps:
        own = [n for n, name in enumerate(points["sweep"]) if name == sweep.key]
        values = {r.number: r.value for r in read_leaderboard(sweep).results}
        seen = [values[points["trial"][n]] for n in own]
        assert [points["x"][n] for n in own] == list(range(1, len(values) + 1))
        assert [points["value"][n] for n in own] == [
            min(seen[: place + 1]) for place in range(len(seen))
        ]


def test_what_differs_is_listed_and_nothing_else(page: Page) -> None:
    rows = {row[0]: row[1:] for row in table(page, "differences").rows}
    assert rows.keys() == {
        "sweep.trials",
        "sweep.parameters.optimizer.lr.loguniform",
        "(wall time)",
    }
    assert rows["sweep.trials"] == ("9", "6")


def test_the_command_writes_one_page_with_its_charts(
    sweeps: list[Sweep], page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sweeps
    assert main(["report", str(first.folder), str(second.folder)]) == 0
    folder = first.folder / "report-with-narrow"
    assert "wide and narrow" in (folder / "index.html").read_text()
    assert "report-with-narrow/index.html: " in capsys.readouterr().out
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {chart.name for chart in page.charts}
    assert {"best-over-trials", "best-over-time", "sorted-values"} < names
    assert len(names) == len(page.charts)


def test_sweeps_of_other_metrics_and_runs_are_refused(sweeps: list[Sweep], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    data = read_yaml(sweeps[1].folder / "spec.yaml")
    data["sweep"] |= {"metric": "val/accuracy", "mode": "max"}
    write_yaml(data, other / "spec.yaml")
    (other / "trials").mkdir()
    run = tmp_path / "single"
    run.mkdir()
    write_yaml(data, run / "spec.yaml")
    with pytest.raises(SpecError, match=r"^single: is no sweep; only sweeps are compared"):
        comparison_page([sweeps[0].folder, run])
    with pytest.raises(SpecError) as error:
        comparison_page([sweeps[0].folder, other])
    assert str(error.value) == (
        "sweep.metric: wide is ranked by val/loss (min), and other by val/accuracy (max)"
    )
