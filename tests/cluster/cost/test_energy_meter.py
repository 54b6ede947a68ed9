"""Energy from recorded counters and powers, with a clock that the test moves."""

import csv
from pathlib import Path
from typing import Any

import pytest

from cluster.cost.energy_meter import (
    EnergyMeter,
    EnergyUsage,
    total_energy,
    usages_from_data,
    usages_to_data,
)
from cluster.cost.power_sources import (
    CPU_W_PER_THREAD,
    CpuEstimate,
    Nvml,
    Rapl,
    Reading,
    TraceReplay,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Told:
    """A source whose readings the test sets."""

    def __init__(self, *readings: Reading) -> None:
        self.readings: list[Reading] | None = list(readings)

    def read(self) -> list[Reading]:
        if self.readings is None:
            raise RuntimeError("Driver Not Loaded")
        return self.readings


def counter(joules: float, device: str = "GPU-a", **more: Any) -> Reading:
    return Reading(device, "gpu", "nvml_counter", joules, **more)


def only(meter: EnergyMeter) -> EnergyUsage:
    (usage,) = meter.usages
    return usage


def test_a_device_shared_by_two_ranks_counts_once() -> None:
    """Both when one source reads it twice, and when two sources read it."""
    clock, first, second = Clock(), Told(counter(100), counter(100)), Told(counter(100))
    meter = EnergyMeter([first, second], clock)
    clock.now += 2
    first.readings, second.readings = [counter(700), counter(700)], [counter(700)]
    meter.sample()
    assert only(meter).joules == 600
    found = total_energy(meter.usages)
    assert (found.method, found.coverage, found.measured_share) == ("nvml_counter", "gpu", 1)
    assert (found.low_j, found.high_j, found.unknown_share) == (600, 600, 0)
    assert not found.estimated


def test_nvml_fails_during_a_run_and_recovers() -> None:
    """The time without readings is estimated, with bounds, and is not counted twice."""
    clock, source = Clock(), Told(counter(0, limit_w=400))
    meter = EnergyMeter([source], clock)
    clock.now += 10
    source.readings = [counter(3000, limit_w=400)]
    meter.sample()
    source.readings = None
    clock.now += 10
    meter.sample()
    assert meter.problems == {"Told": "RuntimeError: Driver Not Loaded"}
    found = total_energy(meter.usages)
    assert found.estimated
    assert (found.low_j, found.high_j) == (3000 + 40 * 10, 3000 + 400 * 10)
    assert found.joules == pytest.approx(3000 + 220 * 10)
    assert found.measured_share == pytest.approx(3000 / 5200)
    assert found.method == "nvml_counter+tdp_util_estimate"
    assert "an estimate (3,400 J to 7,000 J; 58% measured)" in str(found)
    source.readings = [counter(9000, limit_w=400)]
    meter.sample()
    clock.now += 10
    source.readings = [counter(9500, limit_w=400)]
    meter.sample()
    assert meter.problems == {}
    assert only(meter).joules == pytest.approx(5200 + 500)


def test_time_without_a_reading_is_unknown_and_not_zero_joules() -> None:
    clock, source = Clock(), Told(counter(0))
    meter = EnergyMeter([source], clock)
    source.readings = None  # and no limit is known from which to estimate
    clock.now += 5
    meter.sample()
    assert total_energy(meter.usages).joules is None
    assert total_energy(meter.usages).unknown_share == 1
    assert str(total_energy(meter.usages)) == "unknown"
    assert total_energy([]).joules is None
    assert total_energy([]).method == "unknown"


def test_a_device_without_a_driver_is_estimated_from_its_limit_or_unknown() -> None:
    clock, silent = Clock(), Told()
    silent.readings = None
    expected = [
        Reading("GPU-a", "gpu", "nvml_counter", limit_w=300),
        Reading("GPU-b", "gpu", "nvml_counter"),
    ]
    meter = EnergyMeter([silent], clock, expected)
    clock.now += 10
    meter.sample()
    found = total_energy(meter.usages)
    assert (found.low_j, found.high_j) == (300, 3000)
    assert (found.unknown_share, found.measured_share) == (0.5, 0)


def test_a_clock_that_jumps_adds_no_energy() -> None:
    clock, source = Clock(), Told(Reading("GPU-a", "gpu", "power_integrated", power_w=200))
    meter = EnergyMeter([source], clock)
    clock.now += 10
    meter.sample()
    assert only(meter).joules == 2000
    clock.now -= 3600
    meter.sample()
    assert (only(meter).joules, only(meter).seconds) == (2000, 10)
    clock.now += 10
    meter.sample()
    assert only(meter).joules == 4000
    clock.now += 86_400  # as after a machine slept: one reading says nothing about a day
    meter.sample()
    assert (only(meter).joules, only(meter).unknown_s) == (4000, 86_400)


def test_power_is_integrated_between_readings() -> None:
    clock, source = Clock(), Told(Reading("GPU-a", "gpu", "power_integrated", power_w=100))
    meter = EnergyMeter([source], clock)
    clock.now += 4
    source.readings = [Reading("GPU-a", "gpu", "power_integrated", power_w=300)]
    meter.sample()
    assert (only(meter).low_j, only(meter).joules, only(meter).high_j) == (400, 800, 1200)


def test_a_counter_that_starts_again() -> None:
    """RAPL's wraps around. NVML's starts at 0 with a new driver, so the energy used is unknown."""
    clock, source = (
        Clock(),
        Told(Reading("h/rapl", "cpu", "rapl", 60, wraparound_j=64, run_share=0.25)),
    )
    nvml = Told(counter(1e6))
    meter = EnergyMeter([source, nvml], clock)
    clock.now += 1
    source.readings = [Reading("h/rapl", "cpu", "rapl", 36, wraparound_j=64, run_share=0.25)]
    nvml.readings = [counter(5)]
    meter.sample()
    cpu, gpu = meter.usages if meter.usages[0].covers == "cpu" else reversed(meter.usages)
    assert cpu.joules == 40 * 0.25
    assert (gpu.by_method, gpu.unknown_s) == ({}, 1)
    assert usages_from_data(usages_to_data(meter.usages)) == meter.usages


def test_rapl_files_of_linux(tmp_path: Path) -> None:
    """Packages and their memory count; parts of a package do not count again."""
    for zone, name in {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl-mmio:0": "package-0",
        "intel-rapl:1": "psys",
    }.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "energy_uj").write_text("5000000\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("262143328850\n")
    readings = Rapl("node", 0.5, tmp_path).read()
    assert [(r.device, r.covers) for r in readings] == [
        ("node/intel-rapl:0", "cpu"),
        ("node/intel-rapl:0:1", "dram"),
    ]
    assert {(r.counter_j, r.wraparound_j, r.run_share) for r in readings} == {
        (5, 262143.32885, 0.5)
    }
    assert Rapl("node", 0.5, tmp_path / "none").read() == []


def test_a_cpu_is_estimated_from_its_cpu_time() -> None:
    clock, spent = Clock(), [0.0]
    source = CpuEstimate("node", 4, clock, lambda: spent[0])
    meter = EnergyMeter([source], clock)
    clock.now += 10
    spent[0] += 20  # two of four threads
    meter.sample()
    threads = 0.1 * 4 + 0.9 * 2
    low, middle, high = (watts * threads * 10 for watts in CPU_W_PER_THREAD)
    found = total_energy(meter.usages)
    assert (found.low_j, found.joules, found.high_j) == pytest.approx((low, middle, high))
    assert found.estimated
    assert (found.method, found.coverage) == ("tdp_util_estimate", "cpu")


def test_a_recorded_trace_replaces_devices(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["t_s", "device", "covers", "method", "counter_j", "power_w", "limit_w"])
        writer.writerow([0, "GPU-a", "gpu", "nvml_counter", 10, "", 300])
        writer.writerow([0, "node", "host", "power_integrated", "", 500, ""])
        writer.writerow([5, "GPU-a", "gpu", "nvml_counter", 1510, "", 300])
        writer.writerow([9, "GPU-a", "gpu", "nvml_counter", "", "", ""])  # gone
    clock = Clock()
    meter = EnergyMeter([TraceReplay(path, clock)], clock)
    clock.now += 6
    meter.sample()
    assert {u.covers: u.joules for u in meter.usages} == {"gpu": 1500, "host": 3000}
    clock.now += 6
    meter.sample()
    found = total_energy(meter.usages)
    assert found.coverage == "gpu+host"
    assert found.low_j < (found.joules or 0) < found.high_j


def test_nvml_without_a_driver_is_reported_as_a_problem() -> None:
    """With the real library, on a machine that may have no GPU; no device has this UUID."""
    meter = EnergyMeter([Nvml(["GPU-00000000-0000-0000-0000-000000000000"])], Clock())
    assert meter.usages == []
    assert "NVML" in meter.problems["Nvml"]
