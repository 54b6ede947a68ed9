"""What kinds of accelerator there are: memory, speed, watts, each row with where that is from.

The rows are in `data/accelerators.csv`, whose figures are of one chip as it is sold. They are
read with the standard library's csv module: 60 rows need no faster reader, and pyarrow takes
longer to import than all of them take to read.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_MEMORY_TOLERANCE = 0.15
"""Vendors count memory in GB or GiB, and drivers keep some of it; partitions have half or less."""


@dataclass(frozen=True)
class Accelerator:
    """One device as its driver counts them: on some chips there are several, which share it."""

    name: str
    vendor: str
    ray_accelerator_type: str
    """What Ray calls it, as in `scale.accelerator`; it may mean several kinds of device."""
    ray_resource: str
    """The resource under which Ray counts it: GPU, TPU, HPU or neuron_cores."""
    memory_bytes: int
    bandwidth_bytes_per_s: float
    peak_flop_per_s: float | None
    """Dense bf16, without sparsity; where there is none, fp16 or fp32 as `note` says."""
    power_w: float | None
    """The most it draws for long."""
    devices_per_chip: int
    """Devices that the driver shows for one chip as sold."""
    driver_name: str
    """The full name that its driver gives it; empty when that is not known."""
    source: str
    """Where the figures are from."""
    confidence: str
    """high, medium or low."""
    note: str

    def note_of_peak(self) -> str:
        """Its peak for people, with the source."""
        if self.peak_flop_per_s is None:
            return f"peak unknown ({self.source})"
        return f"{self.peak_flop_per_s / 1e12:.4g} TFLOP/s at its peak ({self.source})"


@cache
def devices() -> tuple[Accelerator, ...]:
    """All devices of the catalogue."""
    with (Path(__file__).parent / "data" / "accelerators.csv").open(newline="") as file:
        return tuple(_device(row) for row in csv.DictReader(file))


def find_device(name: str, memory_bytes: int | None) -> Accelerator | None:
    """The device of this full name (`torch.cuda.get_device_name`) and memory; None if unknown.

    Both must fit. Ray's name for it does not say enough: an A100 has 40 or 80 GB, an H100 756 or
    989 TFLOP/s; and a part of a device (MIG) may bear the name of the whole.
    """
    if not name or memory_bytes is None:
        return None
    for device in devices():
        share = memory_bytes / device.memory_bytes
        if name == device.driver_name and abs(share - 1) <= _MEMORY_TOLERANCE:
            return device
    return None


def ray_resource(accelerator_type: str) -> str:
    """The resource under which Ray counts a type of `scale.accelerator`; GPU for an unknown one."""
    known = {device.ray_accelerator_type: device.ray_resource for device in devices()}
    return known.get(accelerator_type, "GPU")


def _device(row: dict[str, str]) -> Accelerator:
    share = 1 / int(row["devices_per_chip"])

    def figure(column: str, unit: float) -> float | None:
        return float(row[column]) * unit * share if row[column] else None

    memory, bandwidth = figure("mem_gb", 1e9), figure("mem_bw_tb_s", 1e12)
    assert memory is not None
    assert bandwidth is not None
    return Accelerator(
        name=row["name"],
        vendor=row["vendor"],
        ray_accelerator_type=row["ray_accelerator_type"],
        ray_resource=row["ray_resource"],
        memory_bytes=round(memory),
        bandwidth_bytes_per_s=bandwidth,
        peak_flop_per_s=figure("peak_dense_bf16_tflops", 1e12),
        power_w=figure("tdp_w", 1),
        devices_per_chip=int(row["devices_per_chip"]),
        driver_name=row["driver_name"],
        source=row["source"],
        confidence=row["confidence"],
        note=row["note"],
    )
