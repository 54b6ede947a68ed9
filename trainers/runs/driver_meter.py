"""The bill of a run or sweep while it runs, written beside its driver.

The driver collects the reports of the workers' meters from the tracker, looks up the nodes and
their prices, writes the ledger in the run's folder, and stops the run at its budget.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.base.labels import INSTANCE
from cluster.connection.ray_internals import free_resources_by_node, placement_groups
from cluster.cost.billing import BILLING_INTERVAL_S, Biller, NodeAllocation
from cluster.cost.budget import check_budget, duration_text, reached_limit, usd_text
from cluster.cost.catalog import Instance, instances
from cluster.cost.ledger import CostTotals, Ledger
from cluster.cost.live_prices import with_live_prices
from cluster.cost.node_rates import CostSpec, NodeRate, node_rate
from cluster.cost.user_prices import UserPrices, read_user_prices
from trainers.run_folder import LEDGER
from trainers.spec import RunSpec
from trainers.tracking.operation_log import MetricPoint, now_ms

logger = logging.getLogger(__name__)

LOG_EVERY_S = 30.0
"""Seconds between two points of the cost in MLflow."""


class RateCache:
    """Prices and emissions of a run's nodes, each looked up once."""

    def __init__(self, cost: CostSpec, user: UserPrices, known: tuple[Instance, ...]) -> None:
        self._cost, self._user, self._known = cost, user, known
        self._by_node: dict[str, NodeRate] = {}

    def of(self, node: NodeAllocation) -> NodeRate:
        """The rate of a node. Raises SpecError if a price label of the node is no number."""
        if node.id not in self._by_node:
            self._by_node[node.id] = node_rate(
                node.host, node.labels, self._cost, self._user, self._known
            )
        return self._by_node[node.id]

    def all_used(self) -> list[NodeRate]:
        """All rates that were looked up."""
        return list(self._by_node.values())


class DriverMeter:
    """The bill of a run or sweep, beside its driver. Threads may call `tick` and `finish`."""

    def __init__(self, folder: Path, spec: RunSpec, tracker: Any) -> None:
        """Raises SpecError if a budget cannot be kept or is spent already."""
        import ray

        self._key, self._budget, self._tracker = folder.name, spec.budget, tracker
        self._lock = threading.RLock()
        self._finished = False
        nodes = ray_nodes()
        known = instances()
        if any(INSTANCE in node.labels for node in nodes):  # no other node's price is looked up
            known, _ = with_live_prices(known)
        self.rates = RateCache(spec.cost, read_user_prices(), known)
        self.ledger = Ledger(folder / LEDGER)
        self._biller = Biller(
            self._key, self.ledger, self.rates.of, ray.get_runtime_context().get_node_id()
        )
        rates = {node.host: self.rates.of(node) for node in nodes}
        check_budget(spec.budget, self.ledger.totals(), rates)
        self._next_tick_s = self._next_log_s = 0.0
        self._logged_step = 0
        self.limit_reached: str | None = None
        """One line on the budget limit that is reached."""

    def wrap_progress(
        self, on_progress: Callable[..., None], stop: threading.Event
    ) -> Callable[..., None]:
        """`on_progress` that also charges the time since its last call, and sets `stop` at the
        budget.
        """

        def metered(*progress: Any) -> None:
            on_progress(*progress)
            if self.tick():
                stop.set()

        return metered

    def tick(self, force: bool = False) -> str | None:
        """Charge the time since the last tick if that is due. Returns `limit_reached`."""
        with self._lock:
            return self._tick(force)

    def _tick(self, force: bool) -> str | None:
        import ray

        now_s = time.monotonic()
        if self._finished or (now_s < self._next_tick_s and not force):
            return self.limit_reached
        self._next_tick_s = now_s + BILLING_INTERVAL_S
        try:
            self._biller.tick(ray_nodes(), ray.get(self._tracker.take_usage_reports.remote()))
        except OSError as error:  # the entries are kept in memory, and written at the next tick
            logger.warning("the ledger cannot be written: %s", error)
        totals = self.ledger.totals()
        self.limit_reached = self.limit_reached or reached_limit(self._budget, totals)
        if now_s >= self._next_log_s or force:
            self._next_log_s = now_s + LOG_EVERY_S
            self._logged_step = max(self._logged_step + 1, round(totals.wall_s))
            self.log_metrics(self._key, account_metrics(totals))
        return self.limit_reached

    def log_metrics(self, run: str, values: Mapping[str, float]) -> None:
        """Log cost metrics to MLflow.

        The x axis is billed seconds, because repeated steps are dropped from a series.
        """
        at_ms = now_ms()
        points = [
            MetricPoint(name, value, self._logged_step, at_ms) for name, value in values.items()
        ]
        self._tracker.log_points.remote(run, points)

    def finish(self) -> tuple[CostTotals, dict[str, str]]:
        """Charge the rest and close the ledger. Returns the totals, and MLflow tags on them."""
        with self._lock:  # a sweep's billing thread may be in a tick
            self._tick(force=True)
            self._finished = True
            totals = self.ledger.totals()
            try:
                self.ledger.close()
            except OSError as error:
                logger.warning("the ledger cannot be written: %s", error)
            return totals, self.tags(totals)

    def tags(self, totals: CostTotals) -> dict[str, str]:
        """MLflow tags that say where the numbers come from."""
        energy = totals.energy
        prices = sorted({rate.price_source for rate in self.rates.all_used()})
        carbon = sorted({rate.carbon_source for rate in self.rates.all_used()})
        return {
            "heliostat.energy": str(energy),
            "heliostat.energy_method": energy.method,
            "heliostat.energy_coverage": energy.coverage,
            "heliostat.energy_estimated": str(energy.estimated).lower(),
            "heliostat.price": "; ".join(prices),
            "heliostat.carbon": "; ".join(carbon),
        }

    def summary_lines(self, totals: CostTotals) -> dict[str, str]:
        """The totals for a terminal: name -> amount and where it comes from."""
        tags = self.tags(totals)
        cost = "unknown"
        if totals.usd is not None:
            cost = f"{usd_text(totals.usd)}, {usd_text(totals.idle_usd or 0.0)} of it idle"
            if totals.unpriced_s:
                cost += f", and {duration_text(totals.unpriced_s)} of nodes without a price"
        carbon = "unknown" if totals.kg_co2e is None else f"{totals.kg_co2e * 1000:.4g} g CO2e"
        if totals.kg_co2e is not None and totals.unknown_carbon:
            carbon += " and an unknown amount"
        return {
            "cost": f"{cost} ({tags['heliostat.price']})",
            "energy": tags["heliostat.energy"],
            "carbon": f"{carbon} ({tags['heliostat.carbon']})",
        }


def account_metrics(totals: CostTotals) -> dict[str, float]:
    """MLflow metrics of the totals, without those that are unknown."""
    energy = totals.energy
    found = {"cost_usd": totals.usd, "cost_idle_usd": totals.idle_usd}
    found |= {"energy_j": energy.joules, "kg_co2e": totals.kg_co2e}
    if energy.joules is not None:
        found |= {
            "energy_low_j": energy.low_j,
            "energy_high_j": energy.high_j,
            "energy_measured_share": energy.measured_share,
        }
    return {name: value for name, value in found.items() if value is not None}


def ray_nodes() -> list[NodeAllocation]:
    """The nodes of the cluster now, with their reserved resources."""
    import ray

    free = free_resources_by_node()
    own = _reserved_by_this_job()
    return [
        NodeAllocation(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            labels=node["Labels"],
            total=node["Resources"],
            reserved=_reserved(node["Resources"], free.get(node["NodeID"])),
            own_reserved=own.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _reserved_by_this_job() -> dict[str, dict[str, float]]:
    """Node id -> resources that placement groups of this Ray job (Train's, Tune's) reserve."""
    import ray

    job_id = ray.get_runtime_context().get_job_id()
    reserved: dict[str, dict[str, float]] = {}
    for group in placement_groups():
        if group.job_id != job_id or group.state != "CREATED":
            continue
        for node_id, resources in group.bundles:
            node = reserved.setdefault(node_id, {})
            for name, amount in resources.items():
                node[name] = node.get(name, 0.0) + amount
    return reserved


def _reserved(total: Mapping[str, float], free: Mapping[str, float] | None) -> dict[str, float]:
    """Reserved CPUs and GPUs of a node; empty if Ray does not know yet of a new node."""
    if free is None:
        return {}
    return {name: total[name] - free.get(name, 0.0) for name in ("CPU", "GPU") if name in total}
