"""Sources of power and energy readings of a node's devices.

Energy counters are preferred: the difference of two readings is exact, however far they are apart.
NVML and AMD SMI need no privilege. On most systems only root can read RAPL (CVE-2020-8694), and
virtual machines do not have it. Without a counter or a power sensor the reading is an estimate, and
is marked as one. NVML was tested against its real library without a GPU, AMD SMI was not tested.
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
"""Idle power of data-centre GPUs as a fraction of their power limit: lowest and highest."""
UTILISATION_ERROR = 0.30
"""Relative error of the estimate idle power + utilisation * (limit - idle power)."""
CPU_W_PER_THREAD = (1.9, 3.0, 4.7)
"""Lowest, middle and highest watts per busy hardware thread of a server's CPU: design power over
threads of EPYC 7B12 (240 W, 128), EPYC 7R13 (225 W, 96) and Xeon 8375C (300 W, 64), and between
the two. Design powers are those of codecarbon 3.3.2's table (MIT)."""
CPU_IDLE_SHARE = 0.1
"""Power of a reserved but idle thread as a fraction of a busy one, as in codecarbon."""


@dataclass(frozen=True)
class Reading:
    """The state of one device at one moment: an energy counter, otherwise its power."""

    device: str
    """Its UUID, which all processes that share the device see."""
    covers: Covers
    method: Method
    counter_j: float | None = None
    """Joules since an arbitrary moment; only differences have a meaning."""
    wraparound_j: float | None = None
    """The value at which the counter starts again at 0; None if it does not."""
    power_w: float | None = None
    low_w: float | None = None
    high_w: float | None = None
    """Bounds of the power, where it is estimated."""
    limit_w: float | None = None
    """The device's power limit. If its driver fails later, the estimate is based on this."""
    run_share: float = 1.0
    """The fraction of the device that the run uses and pays for."""


class PowerSource(Protocol):
    """Reads the power or energy of devices of this node."""

    def read(self) -> list[Reading]:
        """Readings of all devices, within milliseconds. May raise anything: drivers can fail."""


class Nvml:
    """NVIDIA's devices by their UUIDs (GPU-...), through nvidia-ml-py."""

    def __init__(self, uuids: Collection[str], share: float = 1.0) -> None:
        """The run is charged `share` of each device's energy."""
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
            except nvml.NVMLError_NotSupported:  # older than Volta, or a MIG partition
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
    """AMD's devices by their UUIDs, through amdsmi, which is part of ROCm."""

    def __init__(self, uuids: Collection[str], share: float = 1.0) -> None:
        """The run is charged `share` of each device's energy."""
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
    """CPU packages and their memory (Intel and AMD), through Linux's powercap files."""

    def __init__(self, host: str, share: float, root: Path = Path("/sys/class/powercap")) -> None:
        """The run is charged `share` of the energy of the host's CPUs."""
        self._host, self._share, self._root = host, share, root

    def read(self) -> list[Reading]:
        """Raises PermissionError where only root can read."""
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
            # Other zones are parts of a package, or the same package through another interface.
            if (name := (zone / "name").read_text().strip()) == "dram" or name.startswith("package")
        ]


class CpuEstimate:
    """Estimates the power of a process's CPUs from the CPU time that it uses."""

    def __init__(
        self,
        host: str,
        cpus: float,
        clock: Callable[[], float],
        cpu_s: Callable[[], float] = lambda: sum(os.times()[:4]),
    ) -> None:
        """`cpus` hardware threads are reserved; `cpu_s` returns the CPU seconds used so far."""
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
    """Replays a recorded trace: CSV with t_s, device, covers, method, and counter_j or power_w.

    The newest row of each device counts; a row with neither value is a device that has vanished.
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
    """Estimate a GPU's power from its utilisation (0 to 1); unknown without its power limit.

    Without the utilisation, any power between idle and the limit is possible.
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
