"""The energy meter of one worker, which reports to the tracker from a thread of its own.

It reports every `BILLING_INTERVAL_S`, so that no training step waits for it. `driver_meter`
collects the reports.
"""

import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from cluster.cost.billing import BILLING_INTERVAL_S, UsageReport
from cluster.cost.energy_meter import EnergyMeter, usages_to_data
from cluster.cost.power_sources import (
    AmdSmi,
    CpuEstimate,
    Nvml,
    PowerSource,
    Rapl,
    Reading,
    TraceReplay,
)
from trainers.devices import Device

logger = logging.getLogger(__name__)

POWER_TRACE_ENV_VAR = "HELIOSTAT_POWER_TRACE"
"""Environment variable of the command: a recorded power trace that replaces the devices' own."""


class WorkerMeter:
    """A context that meters one worker of the run `key` from its start to its end.

    The first worker of a node meters the devices of all workers there. Every worker estimates
    its own CPUs if these have no energy counter.
    """

    def __init__(
        self,
        tracker: Any,
        key: str,
        hardware: Device,
        local_rank: int = 0,
        trace: str | None = None,
    ) -> None:
        """`trace`: path of a recorded trace (`TraceReplay`) that replaces the node's devices."""
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
        self._thread = threading.Thread(target=self._report_until_done, daemon=True, name="meter")

    def __enter__(self) -> "WorkerMeter":
        self._report()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        self._done.set()
        self._thread.join(BILLING_INTERVAL_S)
        last_report = self._report(ended=True)
        ray.wait([last_report], timeout=BILLING_INTERVAL_S)  # this process may end right after
        for source, problem in self._meter.problems.items():
            logger.warning("meter: %s: %s", source, problem)

    def _report_until_done(self) -> None:
        while not self._done.wait(BILLING_INTERVAL_S):
            self._report()

    def _report(self, ended: bool = False) -> Any:
        with self._lock:
            self._meter.sample()
            self._number += 1
            report = UsageReport(
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
        return self._tracker.report_usage.remote(report)


def _power_sources(
    hardware: Device, local_rank: int, gpu_share: float, cpus: float
) -> tuple[list[PowerSource], list[Reading]]:
    """The sources that may measure a worker's devices, and the devices that surely exist."""
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
    expected = [Reading(each, "gpu", "nvml_counter", limit_w=limit_w) for each in uuids]
    return sources, expected


def _can_read(source: PowerSource) -> bool:
    try:
        return bool(source.read())
    except OSError:
        return False
