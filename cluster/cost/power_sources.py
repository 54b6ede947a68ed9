"""What the devices of a node say about the power that they draw, each source in its own way.

Counters of energy come first: their difference is what was used, however seldom one looks.
NVML's and AMD SMI's need no privilege; RAPL can be read by root alone on most systems
(CVE-2020-8694), and is not there on virtual machines. Without any there is an estimate, which
says that it is one. NVML was tried against its real library without a GPU, AMD SMI was not tried.
"""

import csv
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

Method = Literal["nvml_counter", "amdsmi_counter", "rapl", "power_integrated", "tdp_util_estimate"]
MEASURED_METHODS: frozenset[str] = frozenset(
    ("nvml_counter", "amdsmi_counter", "rapl", "power_integrated")
)
Covers = Literal["gpu", "cpu", "dram", "host"]

IDLE_SHARE = (0.10, 0.25)
"""What a GPU draws when idle, as a share of its limit: the range over data-centre GPUs."""
UTILISATION_ERROR = 0.30
"""How far power may lie from idle plus utilisation times the rest, as a share of it."""
CPU_W_PER_THREAD = (1.9, 3.0, 4.7)
"""Least, middle and most watts per hardware thread of a server's CPU at work: design power over
threads of EPYC 7B12 (240 W, 128), EPYC 7R13 (225 W, 96) and Xeon 8375C (300 W, 64), and between
the two. Design powers are those of codecarbon 3.3.2's table (MIT)."""
CPU_IDLE_SHARE = 0.1
"""Share of that which a thread takes that is reserved but idle, as codecarbon has it."""


@dataclass(frozen=True)
class Reading:
    """What is known of one device at one moment: a counter, else power."""

    device: str
    """Its UUID: the same for all processes that share it."""
    covers: Covers
    method: Method
    counter_j: float | None = None
    """Joules since some moment in the past; only differences mean anything."""
    wraparound_j: float | None = None
    """At which value the counter starts again; None where it does not."""
    power_w: float | None = None
    low_w: float | None = None
    high_w: float | None = None
    """Between which the power is, where it is estimated."""
    limit_w: float | None = None
    """The most that it may draw: what is left to estimate from when its driver goes."""
    run_share: float = 1.0
    """The part of it that is the run's."""


class PowerSource(Protocol):
    """Something that can say what devices of this node draw."""

    def read(self) -> list[Reading]:
        """Every device now, within some ms. May raise anything: a driver can go at any time."""


class Nvml:
    """NVIDIA's devices by their UUIDs (GPU-...), through nvidia-ml-py."""

    def __init__(self, uuids: Collection[str], share: float = 1.0) -> None:
        """`share` of each device is the run's, and is charged so much of it."""
        self._uuids, self._share = sorted(set(uuids)), share
        self._nvml: Any = None

    def read(self) -> list[Reading]:
        if self._nvml is None:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
        return [replace(self._device(uuid), run_share=self._share) for uuid in self._uuids]

    def _device(self, uuid: str) -> Reading:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

        def milli(ask: Callable[[Any], int]) -> float | None:
            try:
                return ask(handle) / 1000
            except nvml.NVMLError_NotSupported:  # older than Volta, or a part of a device (MIG)
                return None

        limit_w = milli(nvml.nvmlDeviceGetEnforcedPowerLimit)
        counter_j = milli(nvml.nvmlDeviceGetTotalEnergyConsumption)
        if counter_j is not None:
            return Reading(uuid, "gpu", "nvml_counter", counter_j, limit_w=limit_w)
        power_w = milli(nvml.nvmlDeviceGetPowerUsage)
        if power_w is not None:
            return Reading(uuid, "gpu", "power_integrated", power_w=power_w, limit_w=limit_w)
        used = nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        return estimate_from_utilisation(uuid, limit_w, used)


class AmdSmi:
    """AMD's devices by their UUIDs, through amdsmi, which comes with ROCm."""

    def __init__(self, uuids: Collection[str], share: float = 1.0) -> None:
        """`share` of each device is the run's, and is charged so much of it."""
        self._share, self._uuids = share, {_bare_uuid(uuid): uuid for uuid in uuids}
        self._smi: Any = None

    def read(self) -> list[Reading]:
        if self._smi is None:
            import amdsmi

            amdsmi.amdsmi_init()
            self._smi = amdsmi
        return list(self._devices())

    def _devices(self) -> Iterator[Reading]:
        for handle in self._smi.amdsmi_get_processor_handles():
            uuid = self._uuids.get(_bare_uuid(str(self._smi.amdsmi_get_gpu_device_uuid(handle))))
            if uuid is not None:
                found = self._smi.amdsmi_get_energy_count(handle)
                joules = found["energy_accumulator"] * found["counter_resolution"] / 1e6
                yield Reading(uuid, "gpu", "amdsmi_counter", joules, run_share=self._share)


def _bare_uuid(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-").replace("-", "")


class Rapl:
    """CPU packages and their memory, by Linux's powercap files; Intel's and AMD's."""

    def __init__(self, host: str, share: float, root: Path = Path("/sys/class/powercap")) -> None:
        """`share` of the host's CPUs is the run's, and is charged so much of them."""
        self._host, self._share, self._root = host, share, root

    def read(self) -> list[Reading]:
        """Raises PermissionError where only root may look."""
        return [
            Reading(
                device=f"{self._host}/{zone.name}",
                covers="dram" if name == "dram" else "cpu",
                method="rapl",
                counter_j=int((zone / "energy_uj").read_text()) / 1e6,
                wraparound_j=int((zone / "max_energy_range_uj").read_text()) / 1e6,
                run_share=self._share,
            )
            for zone in sorted(self._root.glob("intel-rapl:*"))
            # Other zones are parts of a package, or the package once more by another interface.
            if (name := (zone / "name").read_text().strip()) == "dram" or name.startswith("package")
        ]


class CpuEstimate:
    """The CPUs that a process has, by the time that it computes on them."""

    def __init__(
        self,
        host: str,
        cpus: float,
        clock: Callable[[], float],
        cpu_s: Callable[[], float] = lambda: sum(os.times()[:4]),
    ) -> None:
        """`cpus` threads are reserved; `cpu_s` are the CPU-seconds spent so far."""
        self._host, self._cpus, self._clock, self._cpu_s = host, cpus, clock, cpu_s
        self._last = (clock(), cpu_s())

    def read(self) -> list[Reading]:
        (before, spent), now = self._last, (self._clock(), self._cpu_s())
        self._last = now
        busy = (now[1] - spent) / (now[0] - before) if now[0] > before else 0.0
        threads = CPU_IDLE_SHARE * self._cpus + (1 - CPU_IDLE_SHARE) * busy
        low, middle, high = (watts * threads for watts in CPU_W_PER_THREAD)
        device = f"{self._host}/cpu/{os.getpid()}"
        return [Reading(device, "cpu", "tdp_util_estimate", power_w=middle, low_w=low, high_w=high)]


class TraceReplay:
    """A recorded trace in place of devices: CSV with t_s, device, covers, method, and counter_j
    or power_w. The newest row of each device counts; a row with neither is a device that is gone.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        with path.open(newline="") as file:
            self._rows = sorted(csv.DictReader(file), key=lambda row: float(row["t_s"]))
        self._clock, self._start = clock, clock()

    def read(self) -> list[Reading]:
        now = self._clock() - self._start
        newest = {row["device"]: row for row in self._rows if float(row["t_s"]) <= now}
        return [found for row in newest.values() if (found := self._reading(row)) is not None]

    @staticmethod
    def _reading(row: dict[str, Any]) -> Reading | None:
        counter, power = row.get("counter_j"), row.get("power_w")
        if not counter and not power:
            return None
        return Reading(
            row["device"],
            row["covers"],
            row["method"],
            counter_j=float(counter) if counter else None,
            power_w=float(power) if power else None,
            limit_w=float(row["limit_w"]) if row.get("limit_w") else None,
        )


def estimate_from_utilisation(
    device: str, limit_w: float | None, utilisation: float | None
) -> Reading:
    """A GPU's power from the share of time in which it computes; unknown without its limit.

    Without that share, all between idle and its limit is possible.
    """
    if limit_w is None:
        return Reading(device, "gpu", "tdp_util_estimate")
    low, high = IDLE_SHARE[0] * limit_w, limit_w
    if utilisation is None:
        middle = (low + high) / 2
    else:
        idle = sum(IDLE_SHARE) / 2 * limit_w
        middle = idle + (limit_w - idle) * utilisation
        low = max(low, middle * (1 - UTILISATION_ERROR))
        high = min(high, middle * (1 + UTILISATION_ERROR))
    return Reading(
        device,
        "gpu",
        "tdp_util_estimate",
        power_w=middle,
        low_w=low,
        high_w=high,
        limit_w=limit_w,
    )
