"""What a run costs while it runs: a meter in each worker, and the bill beside the driver.

Meters send what their devices have used so far to the tracker, every `PERIOD_S`, from a thread
of their own: no step waits for one. The driver fetches that, knows which nodes are there and
what they cost, writes the ledger in the run's folder, and stops the run at its budget.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.base.labels import INSTANCE
from cluster.cost.billing import BILLING_INTERVAL_S, Biller, NodeAllocation, UsageReport
from cluster.cost.budget import check_budget, duration_text, reached_limit, usd_text
from cluster.cost.catalog import Instance, instances
from cluster.cost.energy_meter import EnergyMeter, usages_to_data
from cluster.cost.ledger import CostTotals, Ledger
from cluster.cost.live_prices import with_live_prices
from cluster.cost.node_rates import CostSpec, NodeRate, node_rate
from cluster.cost.power_sources import (
    AmdSmi,
    CpuEstimate,
    Nvml,
    PowerSource,
    Rapl,
    Reading,
    TraceReplay,
)
from cluster.cost.user_prices import UserPrices, read_user_prices
from trainers.devices import Device
from trainers.spec import RunSpec
from trainers.tracking.operation_log import MetricPoint, now_ms

LEDGER = "ledger.jsonl"
POWER_TRACE_ENV_VAR = "HELIOSTAT_POWER_TRACE"
"""Environment of the command: a recorded trace of power in place of what the devices say."""
LOG_EVERY_S = 30.0
"""Seconds between two points of the cost in MLflow."""


class WorkerMeter:
    """Meters one worker, as a context: from its begin to its end, for the run `key`.

    The first worker of a node meters the devices of all that are there; each estimates its own
    CPUs where these have no counter.
    """

    def __init__(
        self,
        tracker: Any,
        key: str,
        hardware: Device,
        local_rank: int = 0,
        trace: str | None = None,
    ) -> None:
        """`trace` is a recorded one (`cluster.cost.power_sources.TraceReplay`) in place of the node's devices."""
        import ray

        context = ray.get_runtime_context()
        self._tracker, self._key, self._node = tracker, key, context.get_node_id()
        self._reserved = {k: float(v) for k, v in context.get_assigned_resources().items()}
        self._session, self._number = uuid.uuid4().hex[:12], 0
        self._begin, self._start_s = time.time(), time.monotonic()
        share = min(1.0, self._reserved.get("GPU", 1.0) or 1.0)
        cpus = self._reserved.get("CPU", 0.0)
        sources, expected = _power_sources(hardware, local_rank, share, cpus)
        if trace is not None:
            sources = [TraceReplay(Path(trace), time.monotonic)] if local_rank == 0 else []
            expected = []
        self._meter = EnergyMeter(sources, time.monotonic, expected)
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._send_all, daemon=True, name="meter")

    def __enter__(self) -> "WorkerMeter":
        self._send()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        self._done.set()
        self._thread.join(BILLING_INTERVAL_S)
        ray.wait(
            [self._send(ended=True)], timeout=BILLING_INTERVAL_S
        )  # this process may go at once
        for source, problem in self._meter.problems.items():
            print(f"meter: {source}: {problem}", flush=True)

    def _send_all(self) -> None:
        while not self._done.wait(BILLING_INTERVAL_S):
            self._send()

    def _send(self, ended: bool = False) -> Any:
        with self._lock:
            self._meter.sample()
            self._number += 1
            post = UsageReport(
                session=self._session,
                run=self._key,
                node=self._node,
                reserved=self._reserved,
                number=self._number,
                begin=self._begin,
                seconds=time.monotonic() - self._start_s,
                usages=usages_to_data(self._meter.usages),
                ended=ended,
            )
        return self._tracker.report_usage.remote(post)


def _power_sources(
    hardware: Device, local_rank: int, gpu_share: float, cpus: float
) -> tuple[list[PowerSource], list[Reading]]:
    """What can tell about a worker's devices, and which devices there are for certain."""
    host, clock = socket.gethostname(), time.monotonic
    sources: list[PowerSource] = []
    rapl = Rapl(host, cpus / (os.cpu_count() or 1))
    if not _can_read(rapl):
        sources.append(CpuEstimate(host, cpus, clock))
    if local_rank:
        return sources, []
    sources.append(rapl)
    uuids = hardware.uuids()
    if not uuids:
        return sources, []
    rated = hardware.catalog_entry()
    limit_w = rated.power_w if rated else None
    sources += [Nvml(uuids, share=gpu_share), AmdSmi(uuids, share=gpu_share)]
    known = [Reading(each, "gpu", "nvml_counter", limit_w=limit_w) for each in uuids]
    return sources, known


def _can_read(source: PowerSource) -> bool:
    try:
        return bool(source.read())
    except OSError:
        return False


class RateCache:
    """What the nodes of a run cost and emit, each looked up once."""

    def __init__(self, cost: CostSpec, own: UserPrices, known: tuple[Instance, ...]) -> None:
        self._cost, self._own, self._known = cost, own, known
        self._by_node: dict[str, NodeRate] = {}

    def of(self, node: NodeAllocation) -> NodeRate:
        """Raises SpecError where a label of the node's is no price."""
        if node.id not in self._by_node:
            self._by_node[node.id] = node_rate(
                node.host, node.labels, self._cost, self._own, self._known
            )
        return self._by_node[node.id]

    def all_used(self) -> list[NodeRate]:
        """All that were looked up."""
        return list(self._by_node.values())


class DriverMeter:
    """The bill of a run or sweep, beside its driver. Not thread-safe, but for `account`."""

    def __init__(self, folder: Path, spec: RunSpec, tracker: Any) -> None:
        """Raises SpecError where a budget cannot be kept or is spent already."""
        import ray

        self._key, self._budget, self._tracker = folder.name, spec.budget, tracker
        nodes = ray_nodes()
        known = instances()
        if any(INSTANCE in node.labels for node in nodes):  # else nobody would look them up
            known, _ = with_live_prices(known)
        self.rates = RateCache(spec.cost, read_user_prices(), known)
        self.ledger = Ledger(folder / LEDGER)
        self._bill = Biller(
            self._key, self.ledger, self.rates.of, ray.get_runtime_context().get_node_id()
        )
        rates = {node.host: self.rates.of(node) for node in nodes}
        check_budget(spec.budget, self.ledger.totals(), rates)
        self._next_s = self._next_shown_s = 0.0
        self._shown = 0
        self.limit_reached: str | None = None
        """Which limit of the budget is reached, in a line."""

    def wrap_progress(
        self, on_progress: Callable[..., None], stop: threading.Event
    ) -> Callable[..., None]:
        """A watcher that tells `watch` all, charges the time, and sets `stop` at the budget."""

        def both(*told: Any) -> None:
            on_progress(*told)
            if self.tick():
                stop.set()

        return both

    def tick(self, force: bool = False) -> str | None:
        """Charge the time since the last tick if it is due; which limit is reached, in a line."""
        import ray

        now = time.monotonic()
        if now < self._next_s and not force:
            return self.limit_reached
        self._next_s = now + BILLING_INTERVAL_S
        self._bill.tick(ray_nodes(), ray.get(self._tracker.take_usage_reports.remote()))
        account = self.ledger.totals()
        self.limit_reached = self.limit_reached or reached_limit(self._budget, account)
        if now >= self._next_shown_s or force:
            self._next_shown_s = now + LOG_EVERY_S
            self._shown = max(self._shown + 1, round(account.wall_s))
            self.log_metrics(self._key, account_metrics(account))
        return self.limit_reached

    def log_metrics(self, run: str, values: Mapping[str, float]) -> None:
        """Tell MLflow, by the second of the bill: at a step that is done again, a series would
        stand still.
        """
        at = now_ms()
        points = [MetricPoint(name, value, self._shown, at) for name, value in values.items()]
        self._tracker.log_points.remote(run, points)

    def finish(self) -> tuple[CostTotals, dict[str, str]]:
        """Charge the rest; what it came to, and that as tags of MLflow."""
        self.tick(force=True)
        account = self.ledger.totals()
        self.ledger.close()
        return account, self.tags(account)

    def tags(self, account: CostTotals) -> dict[str, str]:
        """Where the figures are from, as tags of MLflow."""
        energy = account.energy
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

    def summary_lines(self, account: CostTotals) -> dict[str, str]:
        """The account for people: name -> what it came to, with where that is from."""
        tags = self.tags(account)
        cost = "unknown"
        if account.usd is not None:
            cost = f"{usd_text(account.usd)}, {usd_text(account.idle_usd or 0.0)} of it idle"
            if account.unpriced_s:
                cost += f", and {duration_text(account.unpriced_s)} of nodes without a price"
        carbon = "unknown" if account.kg_co2e is None else f"{account.kg_co2e * 1000:.4g} g CO2e"
        if account.kg_co2e is not None and account.unknown_carbon:
            carbon += " and what is unknown"
        return {
            "cost": f"{cost} ({tags['heliostat.price']})",
            "energy": tags["heliostat.energy"],
            "carbon": f"{carbon} ({tags['heliostat.carbon']})",
        }


def account_metrics(account: CostTotals) -> dict[str, float]:
    """What MLflow is told of an account; what is unknown is not there."""
    energy = account.energy
    found = {"cost_usd": account.usd, "cost_idle_usd": account.idle_usd}
    found |= {"energy_j": energy.joules, "kg_co2e": account.kg_co2e}
    if energy.joules is not None:
        found |= {
            "energy_low_j": energy.low_j,
            "energy_high_j": energy.high_j,
            "energy_measured_share": energy.measured_share,
        }
    return {name: value for name, value in found.items() if value is not None}


def ray_nodes() -> list[NodeAllocation]:
    """The nodes that are there now, and what of them is reserved."""
    import ray
    from ray._private.state import available_resources_per_node

    free: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    ours = _reserved_by_this_job()
    return [
        NodeAllocation(
            id=node["NodeID"],
            host=node["NodeManagerHostname"],
            labels=node["Labels"],
            total=node["Resources"],
            reserved=_reserved(node["Resources"], free.get(node["NodeID"])),
            own_reserved=ours.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _reserved_by_this_job() -> dict[str, dict[str, float]]:
    """Node -> what placement groups of this Ray job reserve there: of Ray Train and Ray Tune."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job = ray.get_runtime_context().get_job_id()
    found: dict[str, dict[str, float]] = {}
    for packed in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(packed)
        if group.creator_job_id.hex() != job or group.state != PlacementGroupTableData.CREATED:
            continue
        for bundle in group.bundles:
            node = found.setdefault(bundle.node_id.hex(), {})
            for name, amount in bundle.unit_resources.items():
                node[name] = node.get(name, 0.0) + amount
    return found


def _reserved(has: Mapping[str, float], free: Mapping[str, float] | None) -> dict[str, float]:
    """What is reserved of a node; nothing where it is too new for Ray to say."""
    if free is None:
        return {}
    return {name: has[name] - free.get(name, 0.0) for name in ("CPU", "GPU") if name in has}
