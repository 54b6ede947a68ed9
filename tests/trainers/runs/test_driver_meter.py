"""Runs that are metered and stopped at a budget, on the real Ray Train and MLflow."""

import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.base.errors import SpecError
from cluster.cost.ledger import read_entries, total_costs
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.run_folder import CHECKPOINTS, LEDGER
from trainers.runs.driver_meter import DriverMeter
from trainers.runs.execution import run_to_end
from trainers.runs.run import Run, new_run, resumed_run
from trainers.runs.worker_meter import POWER_TRACE_ENV_VAR
from trainers.tracking.mlflow_run import start_tracking

TRACE_ROWS = """t_s,device,covers,method,counter_j,power_w
0,GPU-a,gpu,power_integrated,,3600000
"""
"""A kilowatt-hour every second."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metered")


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE_ROWS)
    monkeypatch.setenv(POWER_TRACE_ENV_VAR, str(path))


def settings(storage: Path, uri: str, **more: Any) -> list[str]:
    values = {
        "storage": storage,
        "tracking.uri": uri,
        "train.epochs": "null",
        "model.width": 4,
        "model.blocks": [1, 1],
        "cost.usd_per_h": 36,
        "cost.g_co2e_per_kwh": 500,
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return [f"{name}={value}" for name, value in values.items()]


def train(one: Run) -> tuple[Any, dict[str, Any]]:
    return run_to_end(one, lambda *_: None, threading.Event())


def tracker_exists(name: str) -> bool:
    """Whether the failed run's tracker is still there; it ends with its last handle."""
    gc.collect()
    try:
        ray.get_actor(name)
    except ValueError:
        return False
    return True


def test_a_spent_budget_saves_and_stops_the_run_and_can_be_raised(
    storage: Path,
    ray_cluster: str,
    mlflow_server: str,
    trace: None,
    wait_until: Callable[..., None],
) -> None:
    """With two workers on one device of a recorded trace, which is counted once."""
    import mlflow

    values = settings(storage, mlflow_server, train__steps=10**6, budget__kwh=3, scale__workers=2)
    one = new_run("digits", values, "budget", None)
    outcome, tracked = train(one)
    assert not outcome.complete
    assert outcome.step > 0
    assert tracked["reason"].startswith("budget.kwh reached: ")
    assert tracked["reason"].endswith(" of 3 kWh")
    newest = Checkpoints(one.folder / CHECKPOINTS).latest()
    assert newest is not None
    assert newest.name.endswith(f"{outcome.step:08d}")

    ledger = total_costs(read_entries(one.folder / LEDGER))
    found = mlflow.MlflowClient(mlflow_server).get_run(tracked["run_id"])
    assert found.info.status == "KILLED"
    assert found.data.tags["heliostat.reason"] == tracked["reason"]
    assert found.data.tags["heliostat.energy_method"] == "power_integrated"
    assert found.data.tags["heliostat.energy_estimated"] == "false"
    assert found.data.tags["heliostat.price"] == "$36/h (cost.usd_per_h)"
    shown = found.data.metrics
    assert shown["energy_j"] == pytest.approx(ledger.energy.joules, rel=1e-6)
    assert shown["energy_j"] >= 3 * 3.6e6
    assert shown["kg_co2e"] == pytest.approx(shown["energy_j"] / 3.6e6 * 0.5, rel=1e-6)
    assert shown["cost_usd"] == pytest.approx((ledger.busy_s + ledger.idle_s) / 100, rel=1e-6)
    assert 0 < shown["cost_idle_usd"] < shown["cost_usd"]

    with pytest.raises(SpecError, match=r"budget.kwh: .* is spent; go on with --set budget.kwh="):
        train(resumed_run("budget", storage, []))
    wait_until(lambda: not tracker_exists("budget"))
    more = (ledger.kwh or 0) + 1
    again, became = train(resumed_run("budget", storage, [f"budget.kwh={more}"]))
    assert again.step > outcome.step
    assert became["reason"].startswith("budget.kwh reached: ")
    total = total_costs(read_entries(one.folder / LEDGER))
    assert (total.kwh or 0) >= more
    assert total.wall_s > ledger.wall_s


def test_estimated_energy_is_marked_as_an_estimate(
    storage: Path, ray_cluster: str, mlflow_server: str
) -> None:
    """This machine's CPUs are measured if RAPL can be read, otherwise estimated."""
    import mlflow

    values = settings(storage, mlflow_server, train__steps=3)
    outcome, tracked = train(new_run("digits", values, "estimate", None))
    assert outcome.complete
    found = mlflow.MlflowClient(mlflow_server).get_run(tracked["run_id"])
    method = found.data.tags["heliostat.energy_method"]
    assert method in ("tdp_util_estimate", "rapl")
    estimated = method == "tdp_util_estimate"
    assert json.loads(found.data.tags["heliostat.energy_estimated"]) is estimated
    assert (found.data.metrics["energy_measured_share"] == 0) is estimated
    assert found.data.metrics["energy_j"] > 0
    assert ("an estimate (" in tracked["account"]["energy"]) is estimated


def test_a_budget_without_a_price_is_refused(
    storage: Path, ray_cluster: str, mlflow_server: str
) -> None:
    values = settings(storage, mlflow_server, budget__usd=5, cost__usd_per_h="null")
    with pytest.raises(SpecError, match=r"^budget.usd: price of .* unknown: .*usd_per_h$"):
        train(new_run("digits", values, "unpriced", None))


def test_the_billing_thread_may_tick_at_the_end(
    ray_cluster: str, mlflow_server: str, storage: Path
) -> None:
    run = new_run("digits", settings(storage, mlflow_server), "ticks", None)
    meter = DriverMeter(run.folder, run.spec, start_tracking(run.folder, run.spec, run.spec_data))
    done, failures = threading.Event(), list[Exception]()

    def bill() -> None:
        while not done.is_set():
            try:
                meter.tick(force=True)
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=bill) for _ in range(3)]
    for thread in threads:
        thread.start()
    totals, _ = meter.finish()
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert total_costs(read_entries(run.folder / LEDGER)) == totals
