"""Accelerators, rented machines and their prices; each row names its source.

The rows are in `data/accelerators.csv`, whose figures are those of one chip as it is sold, and in
`data/prices.csv`, a snapshot of cloud prices. The standard library's csv module reads them: pyarrow
takes longer to import than all 160 rows take to read.
"""

import csv
import datetime
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

from cluster.base.errors import SpecError

T = TypeVar("T")

PRICES_CSV = Path(__file__).parent / "data" / "prices.csv"

_MEMORY_TOLERANCE = 0.15
"""Vendors count memory in GB or GiB, and drivers reserve some; a partition has half or less."""


@dataclass(frozen=True)
class Accelerator:
    """One device as its driver counts them. Some chips hold several devices."""

    name: str
    vendor: str
    ray_accelerator_type: str
    """Ray's name, as in `scale.accelerator`. Several kinds of device can share one."""
    ray_resource: str
    """The Ray resource that counts it: GPU, TPU, HPU or neuron_cores."""
    memory_bytes: int
    bandwidth_bytes_per_s: float
    peak_flop_per_s: float | None
    """Dense bf16, without sparsity. Devices without bf16: fp16 or fp32, as `note` says."""
    power_w: float | None
    """Largest sustained power (TDP)."""
    devices_per_chip: int
    """Devices that the driver shows for one chip."""
    driver_name: str
    """The full name that the driver reports; empty when unknown."""
    source: str
    """Source of the figures."""
    confidence: str
    """high, medium or low."""
    note: str

    def peak_text(self) -> str:
        """Peak FLOP/s and its source, as text."""
        if self.peak_flop_per_s is None:
            return f"peak unknown ({self.source})"
        return f"{self.peak_flop_per_s / 1e12:.4g} TFLOP/s at its peak ({self.source})"


@dataclass(frozen=True)
class Instance:
    """An instance type of a provider in one region."""

    provider: str
    """aws, gcp, azure, lambda, nebius, runpod, or `own` for the user's machines."""
    region: str
    name: str
    """The provider's name for it, such as g5.xlarge."""
    accelerator: str
    """Display name of its accelerator; empty without one."""
    ray_accelerator_type: str
    accelerators: int
    """Number of accelerators."""
    accelerator_memory_bytes: int | None
    """Memory of each accelerator."""
    vcpus: float
    memory_bytes: int
    usd_per_h: float | None
    """On demand, without storage and traffic; None when unknown."""
    spot_usd_per_h: float | None
    """Median over the zones of the snapshot, or the only price there is."""
    spot_min_usd_per_h: float | None
    """Price in the cheapest zone of the snapshot."""
    source: str
    date: datetime.date | None
    """Date of the prices; None when the source does not say."""
    note: str

    @property
    def key(self) -> str:
        """Its name in messages and in the user's price file."""
        return f"{self.provider}/{self.region}/{self.name}"

    def usd(self, spot: bool) -> float | None:
        """Price per hour; None when unknown."""
        return self.spot_usd_per_h if spot else self.usd_per_h


@cache
def instances(path: Path = PRICES_CSV) -> tuple[Instance, ...]:
    """All instances in the price list at `path`, by default the bundled snapshot.

    Raises SpecError with one line that names the file, the row and the column.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return tuple(_read_instance(row, f"{path}:{reader.line_num}") for row in reader)


def find_instance(provider: str, name: str, region: str | None = None) -> Instance | None:
    """The instance with this provider and name, in this region if possible; None if unknown.

    The price in another region is better than none: regions differ by tens of percent, providers by
    multiples. The result names its region.
    """
    found = [each for each in instances() if (each.provider, each.name) == (provider, name)]
    return next((each for each in found if each.region == region), found[0] if found else None)


def is_in_region(zone: str, region: str) -> bool:
    """Whether a provider's `zone` is `region` itself or a part of it.

    Zones are us-east-1a (AWS), us-east4-c (GCP) and US-KS-2 (RunPod). A prefix is not enough:
    Azure has eastus and eastus2, and GCP europe-west1 and europe-west12.
    """
    return re.fullmatch(re.escape(region) + r"([a-z]|-.+)?", zone) is not None


def _read_instance(row: dict[str, str], where: str) -> Instance:
    def figure(column: str, read: Callable[[str], T]) -> T | None:
        text = row.get(column) or ""
        try:
            return read(text) if text else None
        except ValueError:
            raise SpecError(f"{where}: {column} cannot be {text!r}") from None

    def needed(column: str, read: Callable[[str], T]) -> T:
        found = figure(column, read)
        if found is None:
            raise SpecError(f"{where}: {column} is missing")
        return found

    gpu_memory = figure("accelerator_mem_gb", _positive)
    low, median = (figure(f"spot_usd_h_{which}", _positive) for which in ("min", "median"))
    return Instance(
        provider=needed("provider", str),
        region=needed("region", str),
        name=needed("instance_type", str),
        accelerator=row["accelerator"],
        ray_accelerator_type=row["ray_accelerator_type"],
        accelerators=needed("accelerator_count", int),
        accelerator_memory_bytes=None if gpu_memory is None else round(gpu_memory * 1e9),
        vcpus=needed("vcpus", _positive),
        memory_bytes=round(needed("memory_gib", _positive) * 2**30),
        usd_per_h=needed("ondemand_usd_h", _positive),
        spot_usd_per_h=low if median is None else median,
        spot_min_usd_per_h=low,
        source=needed("source", str),
        date=figure("snapshot_date", datetime.date.fromisoformat),
        note=row["note"],
    )


def _positive(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number > 0):
        raise ValueError
    return number


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """All devices in the catalogue."""
    with (Path(__file__).parent / "data" / "accelerators.csv").open(newline="") as file:
        return tuple(_read_accelerator(row) for row in csv.DictReader(file))


def find_accelerator(name: str, memory_bytes: int | None) -> Accelerator | None:
    """The device with this full name (`torch.cuda.get_device_name`) and memory; None if unknown.

    Both must match. Ray's name is not enough: an A100 has 40 or 80 GB, an H100 756 or 989 TFLOP/s;
    and a MIG partition may have the name of the whole device.
    """
    if not name or memory_bytes is None:
        return None
    for device in accelerators():
        share = memory_bytes / device.memory_bytes
        if name == device.driver_name and abs(share - 1) <= _MEMORY_TOLERANCE:
            return device
    return None


def ray_resource(accelerator_type: str) -> str:
    """The Ray resource that counts this type of `scale.accelerator`; GPU for an unknown type."""
    known = {device.ray_accelerator_type: device.ray_resource for device in accelerators()}
    return known.get(accelerator_type, "GPU")


def _read_accelerator(row: dict[str, str]) -> Accelerator:
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
