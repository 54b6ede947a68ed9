"""A sweep's budget: the cost of each trial, and whether another one fits the budget."""

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.config import write_yaml
from cluster.base.errors import SpecError
from cluster.cost.budget import BudgetSpec
from cluster.cost.ledger import Ledger, LedgerEntry, read_entries, total_costs
from cluster.cost.node_rates import NodeRate
from trainers.run_folder import LEDGER
from trainers.runs.worker_meter import POWER_TRACE_ENV_VAR
from tuning import sweep as sweeps
from tuning.spaces.rungs import first_rung_epochs
from tuning.spaces.space import SchedulerSpec, SweepRunSpec
from tuning.trials import budget as budgets
from tuning.trials.budget import SweepBudget, budget_shortfall
from tuning.trials.trial import LAST_RESULT_FILE, Sweep


def totals_of(usd: float) -> Any:
    return total_costs([LedgerEntry("a", "s", "busy", 0, 0, 60, usd=usd)])


def test_a_trial_starts_only_if_its_first_rung_fits_the_budget() -> None:
    """40 epochs cost $4 so far, so an epoch costs 10 cents."""
    budget = BudgetSpec(usd=5)
    assert (
        budget_shortfall(budget, totals_of(4), epochs_done=40, committed_epochs=0, first_rung=10)
        is None
    )
    reason = budget_shortfall(
        budget, totals_of(4), epochs_done=40, committed_epochs=1, first_rung=10
    )
    assert (
        reason == "budget.usd: $4.00 of $5.00 spent; a trial's first rung takes about 20.0% of it"
    )
    assert (
        budget_shortfall(budget, totals_of(4.9), epochs_done=0, committed_epochs=1, first_rung=10)
        is None
    ), "nothing is known yet"
    assert (
        budget_shortfall(
            BudgetSpec(), totals_of(4), epochs_done=40, committed_epochs=1, first_rung=10
        )
        is None
    )


RATE = NodeRate(3600, "$3600/h", None, "", 1.0)


def resumed_budget(
    tmp_path: Path, budget: BudgetSpec, rate: NodeRate = RATE, **scheduler: Any
) -> SweepBudget:
    """The budget of a resumed sweep whose two trials took ten epochs in 10 s, for $10 and $40."""
    data = {
        "workload": "vision",
        "budget": budget,
        "sweep": {"parameters": {"optimizer.lr": {"uniform": [0, 1]}}, "scheduler": scheduler},
    }
    spec = SweepRunSpec.model_validate(data)
    ledger = Ledger(tmp_path / LEDGER)
    for number, usd in enumerate((10, 40)):
        key = f"{tmp_path.name}/{number:04d}"
        ledger.append([LedgerEntry(key, key, "busy", 0, 0, 10, usd=usd)])
        folder = tmp_path / "trials" / f"{number:04d}"
        folder.mkdir(parents=True)
        (folder / LAST_RESULT_FILE).write_text('{"epoch": 10, "device_s": 10}')
    rates = SimpleNamespace(all_used=lambda: [rate])
    metering: Any = SimpleNamespace(
        ledger=ledger, limit_reached=None, tick=lambda: None, rates=rates
    )
    return SweepBudget(
        Sweep({}, spec.sweep, tmp_path, tmp_path), spec, metering, epochs_per_trial=20
    )


def test_a_resumed_sweep_knows_the_earlier_costs_of_its_trials(tmp_path: Path) -> None:
    """20 epochs for $50: $4 are left of $54, and a first rung of one epoch costs $2.50."""
    budget = resumed_budget(tmp_path, BudgetSpec(usd=54))
    assert budget.can_start_trial()
    budget.on_trial_event("start", 2, {})
    assert not budget.can_start_trial()
    assert budget.reason == (
        "budget.usd: $50.00 of $54.00 spent; a trial's first rung takes about 4.6% of it"
    )


def test_the_cost_of_an_epoch_is_that_of_its_device_time(tmp_path: Path) -> None:
    """On average $2.50; for a trial without charges, at the average cost per second."""
    budget = resumed_budget(tmp_path, BudgetSpec(), resource="usd")
    assert budget.cost_per_epoch(0, {"epoch": 10, "device_s": 10}) == 1, "nothing is known yet"
    budget.tick()
    assert budget.cost_per_epoch(0, {"epoch": 10, "device_s": 10}) == pytest.approx(1 / 2.5)
    assert budget.cost_per_epoch(1, {"epoch": 10, "device_s": 10}) == pytest.approx(4 / 2.5)
    assert budget.cost_per_epoch(2, {"epoch": 1, "device_s": 3}) == pytest.approx(3)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["start", "result", "result", "stop", "charge", "charge", "tick"]),
        st.integers(0, 4),
        st.floats(0.1, 9),
    ),
    max_size=40,
)


@given(events=EVENTS, engine=st.booleans())
def test_the_running_sums_of_costs_are_those_over_all_trials(
    events: list[tuple[str, int, float]], engine: bool
) -> None:
    """Trials that are charged at some time, run on and end; each sum is taken in a plain loop."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        now = [100.0]
        patched.setattr(budgets.time, "monotonic", lambda: now[0])
        budget = resumed_budget(Path(folder), BudgetSpec(), resource="usd")
        ledger, key = budget.metering.ledger, Path(folder).name
        done = {0: [10.0, 10.0], 1: [10.0, 10.0]}
        usd = {0: 10.0, 1: 40.0}
        since: dict[int, float] = {}
        prices: dict[int, float] = {}
        for event, number, amount in events:
            now[0] += 1
            epoch, device_s = done.get(number, [0.0, 0.0])
            if event == "charge":
                account = f"{key}/{'engine' if engine else f'{number:04d}'}"
                usd[number] = usd.get(number, 0.0) + amount
                total = sum(usd.values()) if engine else usd[number]
                ledger.append([LedgerEntry(account, account, "busy", 0, 0, now[0], usd=total)])
            elif event == "tick":
                budget.tick()
                for n, (_, seconds) in done.items():
                    if usd.get(n) and seconds:
                        prices[n] = usd[n] / (seconds + now[0] - since.get(n, now[0]))
            else:
                if event == "result":
                    done[number] = [epoch + amount, device_s + 2 * amount]
                else:
                    done.setdefault(number, [0.0, 0.0])
                result = dict(zip(("epoch", "device_s"), done[number], strict=True))
                budget.on_trial_event(event, number, result)
                since[number] = now[0]
                if event == "stop":
                    del since[number]
        fused = engine and f"{key}/engine" in budget.metering.ledger.totals_by_run()
        budget.tick()
        for n, (_, seconds) in done.items():
            if usd.get(n) and seconds:
                prices[n] = usd[n] / (seconds + now[0] - since.get(n, now[0]))
        epochs = sum(done[n][0] for n in (done if fused else prices))
        seconds = sum(done[n][1] for n in (done if fused else prices))
        cost = sum(prices[n] * done[n][1] for n in prices)
        if fused:
            cost = seconds
        for n in (*done, 9):
            price = 1.0 if fused else prices.get(n, cost / seconds)
            expected = price * 3 / 2 / (cost / epochs)
            found = budget.cost_per_epoch(n, {"epoch": 2, "device_s": 3})
            assert found == pytest.approx(expected, rel=1e-9)


def test_a_cost_per_epoch_takes_no_longer_with_10_000_trials(tmp_path: Path) -> None:
    budget = resumed_budget(tmp_path, BudgetSpec(usd=1e9), resource="usd")
    key = tmp_path.name
    for number in range(10_000):
        account = f"{key}/{number:04d}"
        budget.metering.ledger.append([LedgerEntry(account, account, "busy", 0, 0, 10, usd=1)])
        budget.on_trial_event("stop", number, {"epoch": 10, "device_s": 10})
    budget.tick()
    began = time.process_time()
    for _ in range(1000):
        budget.cost_per_epoch(5, {"epoch": 10, "device_s": 10})
        assert budget.can_start_trial()
    assert time.process_time() - began < 0.5, "it was 17 ms each"


def test_trials_cannot_be_compared_by_dollars_without_a_price(tmp_path: Path) -> None:
    unpriced = replace(RATE, usd_per_h=None, price_source="price of a unknown")
    line = r"sweep\.scheduler\.resource: price of a unknown; set cost\.usd_per_h"
    with pytest.raises(SpecError, match=line):
        resumed_budget(tmp_path, BudgetSpec(), unpriced, resource="usd")


@pytest.mark.parametrize(("name", "epochs"), [("asha", 2), ("median", 2), ("pbt", 3), ("none", 20)])
def test_each_scheduler_has_its_first_rung(name: str, epochs: float) -> None:
    spec = SchedulerSpec(name=name, grace_epochs=2, every_epochs=3)  # type: ignore[arg-type]
    assert first_rung_epochs(spec, 20) == epochs
    assert first_rung_epochs(spec, 1) == 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("fuse", "kwh"), [("off", 40), pytest.param(2, 100, marks=pytest.mark.slow)]
)
def test_a_sweep_stops_at_its_budget_and_each_trial_has_its_cost(
    tmp_path: Path,
    ray_cluster: str,
    mlflow_server: str,
    monkeypatch: pytest.MonkeyPatch,
    fuse: Any,
    kwh: float,
) -> None:
    """The power trace has a kilowatt-hour every second, whatever the device.

    A trial in a process that ends within one billing interval may have joules and no dollars.
    """
    trace = tmp_path / "trace.csv"
    row = "0,GPU-a,gpu,power_integrated,,3600000"
    trace.write_text(f"t_s,device,covers,method,counter_j,power_w\n{row}\n")
    monkeypatch.setenv(POWER_TRACE_ENV_VAR, str(trace))
    data = {
        "workload": "vision",
        "storage": str(tmp_path),
        "data": {"source": "digits", "size": 8, "channels": 1, "classes": 10},
        "model": {"width": 4, "blocks": [1], "augment": 0.0},
        "train": {"epochs": 1, "global_batch": 128},
        "sweep": {
            "parameters": {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}},
            "scheduler": {"name": "asha", "resource": "joule"},
            "metric": "val/loss",
            "trials": 10_000,
            "concurrency": 2,
            "fuse": fuse,
        },
        "tracking": {"uri": mlflow_server},
        "cost": {"usd_per_h": 36},
        "budget": {"kwh": kwh},
    }
    write_yaml(data, tmp_path / "tiny.yaml")
    sweep = sweeps.new_sweep(str(tmp_path / "tiny.yaml"), [], None)
    board, tracked = sweeps.run_to_end(sweep, lambda *_: None)
    assert 0 < len(board.ended) < 10_000
    assert tracked["reason"].startswith("budget.kwh")
    total = total_costs(read_entries(sweep.folder / LEDGER))
    client = mlflow.MlflowClient(mlflow_server)
    parent = client.get_run(tracked["run_id"])
    assert parent.info.status == "KILLED"
    assert parent.data.tags["heliostat.reason"] == tracked["reason"]
    assert parent.data.metrics["cost_usd"] == pytest.approx(total.usd, rel=1e-6)
    trials = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    costs = [run.data.metrics for run in trials if "energy_j" in run.data.metrics]
    assert len(costs) >= len(board.ended)
    priced = [found["cost_usd"] for found in costs if "cost_usd" in found]
    assert priced
    assert min(priced) > 0
    assert sum(found["energy_j"] for found in costs) <= (total.energy.joules or 0) * 1.000001
    assert sum(priced) <= (total.usd or 0)


def test_only_the_budget_of_a_sweep_can_change(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("workload: vision\n")
    (tmp_path / "environment.json").write_text('{"kind": "sweep"}')
    with pytest.raises(SpecError, match=r"train.epochs=3: cannot change in a sweep that has begun"):
        sweeps.resumed_sweep(str(tmp_path), tmp_path, ["train.epochs=3"])
