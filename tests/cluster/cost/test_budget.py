"""Billing of runs, and budgets that stop them, with a clock that the test moves."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import validate
from cluster.base.errors import SpecError
from cluster.cost.billing import (
    BILLING_INTERVAL_S,
    METER_TIMEOUT_S,
    Biller,
    NodeAllocation,
    UsageReport,
)
from cluster.cost.budget import BudgetSpec, check_budget, duration_text, reached_limit, usd_text
from cluster.cost.energy_meter import EnergyMeter, EnergyUsage, usages_to_data
from cluster.cost.ledger import CostTotals, Ledger, total_costs
from cluster.cost.node_rates import CostSpec, NodeRate, node_rate
from cluster.cost.power_sources import TraceReplay
from cluster.cost.user_prices import UserPrices

RATE = NodeRate(36.0, "$36/h", 500.0, "500 g", 1.2)
"""One cent per second."""


@dataclass
class World:
    """Nodes of four CPUs, meters on them, and the bill of one run."""

    path: Path
    rate: Callable[[NodeAllocation], NodeRate] = lambda node: RATE
    now: float = 5000.0
    nodes: dict[str, NodeAllocation] = field(default_factory=dict)
    posts: dict[str, UsageReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.node("head")
        self.start()

    def start(self) -> None:
        """A new process continues the same ledger."""
        self.ledger = Ledger(self.path)
        clock = self.clock
        self.bill = Biller("run", self.ledger, self.rate, "head", clock, lambda: clock() + 1e9)
        self.posts.clear()

    def clock(self) -> float:
        return self.now

    def node(self, name: str, used: float = 0.0, ours: float = 0.0) -> None:
        """Sets a node on which `used` CPUs are reserved, `ours` of them by the run."""
        self.nodes[name] = NodeAllocation(
            name, name, {}, {"CPU": 4.0}, {"CPU": used}, {"CPU": ours}
        )

    def work(self, name: str, cpus: float, run: str = "run", **more: Any) -> None:
        """A meter on a node sends a report."""
        session = f"{run}@{name}"
        number = self.posts[session].number + 1 if session in self.posts else 0
        more = {"seconds": 0.0, "usages": [], **more}
        self.posts[session] = UsageReport(session, run, name, {"CPU": cpus}, number, 0.0, **more)

    def tick(self, seconds: float = BILLING_INTERVAL_S) -> CostTotals:
        self.now += seconds
        self.bill.tick(self.nodes.values(), self.posts.values())
        return self.ledger.totals()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "ledger.jsonl")


def test_the_only_user_of_a_node_pays_all_of_it(world: World) -> None:
    world.node("head", used=1)
    world.work("head", 1)
    found = world.tick(100)
    assert (found.busy_s, found.idle_s, found.wall_s) == (25, 75, 100)
    assert found.usd == pytest.approx(1.00)
    assert found.idle_usd == pytest.approx(0.75)


def test_users_of_a_node_share_its_price(world: World) -> None:
    world.node("head", used=2)  # one of them somebody else's
    world.work("head", 1)
    found = world.tick(100)
    assert (found.busy_s, found.idle_s) == (25, 25)


def test_starting_workers_are_idle_until_their_meters_report(world: World) -> None:
    world.node("gpu", used=4, ours=2)  # beside somebody else's
    found = world.tick(10)
    assert (found.busy_s, found.idle_s) == (0, 10 + 5)
    world.work("gpu", 2)
    found = world.tick(10)
    assert (found.busy_s, found.idle_s) == (5, 20 + 5)


def test_a_node_is_charged_from_its_start_until_it_is_gone(world: World) -> None:
    world.tick(10)
    world.node("gpu")  # comes up at 10 s, is used at 40 s, its worker is gone at 60 s
    world.tick(10)
    world.tick(20)
    world.node("gpu", used=4)
    world.work("gpu", 4)
    world.tick(0)
    assert world.ledger.totals().idle_s == 40 + 20
    world.tick(METER_TIMEOUT_S)
    world.node("gpu")
    found = world.tick(20)
    assert found.busy_s == METER_TIMEOUT_S
    assert found.idle_s == (40 + METER_TIMEOUT_S + 20) + (20 + 20)
    world.node("gpu", used=4)  # somebody else's
    assert world.tick(10).idle_s == found.idle_s + 10
    del world.nodes["gpu"]
    assert world.tick(10).idle_s == found.idle_s + 20


def test_the_cost_of_restarts_adds_up(world: World) -> None:
    world.node("head", used=4)
    for _ in range(5):
        world.work("head", 4)
        world.tick(7)
        world.ledger.close()
        world.now += 1000  # nobody works on the run
        world.start()
    found = world.ledger.totals()
    assert (found.busy_s, found.wall_s) == (35, 35)
    assert found.usd == pytest.approx(0.35)


def test_trials_pay_for_their_parts_and_the_sweep_for_the_rest(world: World) -> None:
    world.node("head", used=3)
    world.work("head", 1, run="run/0000")
    world.work("head", 2, run="run/0001")
    world.tick(100)
    paid = world.ledger.totals_by_run()
    costs = {run: paid[run].usd for run in ("run/0000", "run/0001", "run")}
    assert costs == pytest.approx({"run/0000": 0.25, "run/0001": 0.50, "run": 0.25})


def test_a_run_that_ends_between_ticks_pays_only_for_its_seconds(world: World) -> None:
    world.work("head", 2, run="run/0000", seconds=1.5, ended=True)
    world.work("head", 4, run="run/0001", seconds=0.0)
    world.tick(2)
    world.work("head", 4, run="run/0001", seconds=2.5, ended=True)
    for _ in range(2):
        world.tick(2)
    paid = {run: found.busy_s for run, found in world.ledger.totals_by_run().items()}
    assert paid == pytest.approx(
        {"run/0000": 0.75 * 2 / 2.75, "run/0001": 2 * 2 / 2.75 + 2, "run": 0}
    )


@pytest.mark.parametrize("limit", ["usd", "kwh", "kg_co2e", "wall"])
def test_a_budget_stops_the_run_within_one_interval(
    world: World, tmp_path: Path, limit: str
) -> None:
    """With a recorded trace of 1800 W, and limits that are reached after 600 s."""
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "t_s,device,covers,method,counter_j,power_w\n0,GPU-a,gpu,power_integrated,,1800\n"
    )
    meter = EnergyMeter([TraceReplay(trace, world.clock)], world.clock)
    limits = {"usd": 6.0, "kwh": 0.3, "kg_co2e": 0.3 * 1.2 * 0.5, "wall": "10m"}
    budget = validate(BudgetSpec, {limit: limits[limit]})
    world.node("head", used=4)
    began, found = world.now, world.tick(0)
    while (reason := reached_limit(budget, found)) is None:
        assert world.now - began < 700
        meter.sample()
        world.work("head", 4, usages=usages_to_data(meter.usages))
        found = world.tick(1.7)
    assert 600 <= world.now - began <= 600 + 2 * BILLING_INTERVAL_S
    words = {
        "usd": "$6.00 of $6.00",
        "kwh": "0.3 kWh of 0.3 kWh",
        "kg_co2e": "0.18 kg CO2e of 0.18 kg CO2e",
        "wall": "10 min of 10 min",
    }
    assert reason.startswith(f"budget.{limit} reached: ")
    assert reason.split(" of ")[1] == words[limit].split(" of ")[1]
    with pytest.raises(SpecError, match=f"is spent; go on with --set budget.{limit}=MORE"):
        check_budget(budget, found, {"head": RATE})
    check_budget(BudgetSpec(usd=60), found, {"head": RATE})


def test_a_budget_that_cannot_be_measured_is_refused() -> None:
    nothing = total_costs([])
    laptop = node_rate("laptop", {}, CostSpec(), UserPrices())
    with pytest.raises(SpecError) as caught:
        check_budget(BudgetSpec(usd=5), nothing, {"laptop": laptop})
    assert str(caught.value) == (
        "budget.usd: price of laptop unknown: no label, no row in your price file; "
        "set cost.usd_per_h"
    )
    with pytest.raises(SpecError, match=r"budget.kg_co2e: .* set cost.g_co2e_per_kwh"):
        check_budget(BudgetSpec(kg_co2e=5), nothing, {"laptop": laptop})
    check_budget(BudgetSpec(kwh=5, wall=5), nothing, {"laptop": laptop})


def test_a_budget_whose_amount_becomes_unknown_stops_the_run(world: World) -> None:
    world.rate = lambda node: replace(RATE, usd_per_h=None, g_co2e_per_kwh=None)
    world.start()
    blind = EnergyUsage("GPU-a", "gpu", seconds=10, unknown_s=10)
    world.work("head", 4, usages=usages_to_data([blind]))
    found = world.tick()
    assert found.usd is None
    assert "have no price" in (reached_limit(BudgetSpec(usd=5), found) or "")
    assert "100% of the time is unknown" in (reached_limit(BudgetSpec(kwh=5), found) or "")
    assert reached_limit(BudgetSpec(wall=60), found) is None
    seen = EnergyUsage("GPU-a", "gpu", seconds=10, by_method={"nvml_counter": 50.0})
    world.work("head", 4, usages=usages_to_data([seen]))
    assert "carbon" in (reached_limit(BudgetSpec(kg_co2e=5), world.tick()) or "")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(90, 90), ("90m", 5400), ("1h 30m", 5400), ("2d", 172_800), ("1.5h", 5400)],
)
def test_wall_accepts_the_users_units(text: object, seconds: float) -> None:
    assert validate(BudgetSpec, {"wall": text}).wall == seconds


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        ({"usd": -5}, "budget.usd: must be greater than 0 (got -5)"),
        (
            {"wall": "soon"},
            "budget.wall: must be seconds, or text such as 90m, 1h30m or 2d (got 'soon')",
        ),
        ({"eur": 5}, "budget.eur: unknown key (known: usd, kwh, kg_co2e, wall)"),
    ],
)
def test_mistakes(budget: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        validate(BudgetSpec, budget, "budget.")
    assert str(caught.value) == problem


def test_amounts_as_text() -> None:
    assert [usd_text(usd) for usd in (0, 0.00123, 50, 1234.5)] == [
        "$0.00",
        "$0.0012",
        "$50.00",
        "$1,234.50",
    ]
    assert [duration_text(s) for s in (2.5, 600, 5430)] == ["2.5 s", "10 min", "1 h 30 min"]
