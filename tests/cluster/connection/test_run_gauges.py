"""Metrics of a real run at Ray's own exporter, and the dashboard that shows them."""

import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from cluster.base.config import write_yaml
from cluster.connection import run_gauges
from cluster.connection.run_gauges import GAUGES, RunGauges
from cluster.node.prometheus_server import GRAFANA_DASHBOARD

DURING_A_RUN = {
    "heliostat_step_seconds",
    "heliostat_samples_per_second",
    "heliostat_goodput_ratio",
    "heliostat_trials",
}


def scrape() -> str:
    """The metrics that all nodes of the shared Ray export."""
    import ray

    texts = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            texts.append(answer.read().decode())
    return "\n".join(texts)


def values(text: str, run: str) -> dict[str, float]:
    """Gauge -> value of a run."""
    found = re.finditer(r'^ray_(heliostat_\w+)\{.*\brun="(.*?)".*\} (\S+)$', text, re.MULTILINE)
    return {match[1]: float(match[3]) for match in found if match[2] == run}


def test_a_run_exports_what_the_dashboard_shows(
    heliostat: Any, spirals_source: str, wait_until: Callable[..., None]
) -> None:
    """The run goes on until its metrics have been exported."""
    (heliostat.folder / "spirals.py").write_text(spirals_source)
    spec = {
        "workload": "spirals:Spirals",
        "train": {"steps": 10_000_000, "global_batch": 20, "evaluate_every_epochs": 100},
    }
    write_yaml(spec, heliostat.folder / "s.yaml")
    process = heliostat.start("train", "s.yaml", "--name", "seen")
    try:
        wait_until(lambda: values(scrape(), "seen").keys() >= DURING_A_RUN)
        text = scrape()
    finally:
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 130, output
    seen = values(text, "seen")
    assert 0 < seen["heliostat_goodput_ratio"] <= 1
    assert seen["heliostat_trials"] == 1
    rate = 20 / seen["heliostat_step_seconds"]
    assert seen["heliostat_samples_per_second"] == pytest.approx(rate, rel=0.01)
    in_text = set(re.findall(r"^(ray_\w+)[{ ]", text, re.MULTILINE))
    unknown = queried_metrics() - {f"ray_{name}" for name in GAUGES} - in_text
    assert not unknown, "the dashboard shows metrics that are not exported"


def queried_metrics() -> set[str]:
    """The metrics in the dashboard's queries."""
    return set(re.findall(r"\bray_\w+", GRAFANA_DASHBOARD.read_text()))


def test_the_dashboard_shows_every_gauge() -> None:
    assert queried_metrics() >= {f"ray_{name}" for name in GAUGES}
    board = json.loads(GRAFANA_DASHBOARD.read_text())
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in board["panels"]}) == len(places)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Gauge -> value, as set for the only run."""
    found: dict[str, float] = {}

    def set_gauge(name: str, value: float, run: str) -> None:
        assert name in GAUGES
        assert run == "sweep"
        found[name] = value

    monkeypatch.setattr(run_gauges, "set_gauge", set_gauge)
    return found


def test_rates_of_running_trials_are_summed(exported: dict[str, float]) -> None:
    gauges = RunGauges()
    for trial, rate in (("0000", 100.0), ("0001", 300.0)):
        rows = [("perf/samples_per_s", rate, 1, 0), ("perf/step_s", 10 / rate, 1, 0)]
        gauges.record(f"sweep/{trial}", rows)
    assert exported["heliostat_trials"] == 2
    assert exported["heliostat_samples_per_second"] == 400
    assert exported["heliostat_step_seconds"] == pytest.approx((0.1 + 0.1 / 3) / 2)
    gauges.finish("sweep/0000")
    assert (exported["heliostat_trials"], exported["heliostat_samples_per_second"]) == (1, 300)
    gauges.finish("sweep/0001")
    assert (exported["heliostat_trials"], exported["heliostat_samples_per_second"]) == (0, 0)


def test_watts_and_dollars_per_hour_are_rates_of_totals(exported: dict[str, float]) -> None:
    gauges = RunGauges()
    gauges.record("sweep", [("energy_j", 1000.0, 30, 30_000), ("cost_usd", 0.10, 30, 30_000)])
    assert "heliostat_watts" not in exported  # one point has no growth
    gauges.record("sweep/0000", [("energy_j", 7.0, 40, 40_000)])  # included in the sweep's total
    gauges.record("sweep", [("energy_j", 4000.0, 60, 60_000), ("cost_usd", 0.13, 60, 60_000)])
    assert exported["heliostat_watts"] == pytest.approx(100)
    assert exported["heliostat_usd_per_hour"] == pytest.approx(3.6)
    assert exported["heliostat_usd"] == pytest.approx(0.13)
