"""Devices by the name and memory that their driver reports, and instances with their prices."""

import csv
import tomllib
from pathlib import Path

import pytest
import ray.util.accelerators.accelerators as ray_accelerators
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

import cluster.cost.catalog
from cluster.base.errors import SpecError
from cluster.cost.catalog import (
    PRICES_CSV,
    accelerators,
    find_accelerator,
    find_instance,
    instances,
    is_in_region,
    ray_resource,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "memory_bytes", "found"),
    [
        ("NVIDIA A100-SXM4-80GB", 85_899_345_920, "A100-80GB-SXM"),
        ("NVIDIA A100-SXM4-40GB", 42_949_672_960, "A100-40GB-SXM"),
        ("NVIDIA H100 80GB HBM3", 85_520_809_984, "H100-SXM"),
        ("NVIDIA H100 PCIe", 85_520_809_984, "H100-PCIe"),
        ("NVIDIA H200", 150_100_000_000, "H200-SXM"),
        ("NVIDIA GeForce RTX 4090", 25_386_352_640, "RTX-4090"),
        ("NVIDIA L4", 24_152_899_584, "L4"),
        ("NVIDIA L40S", 48_305_799_168, "L40S"),
        ("Tesla T4", 15_642_329_088, "T4"),
        ("AMD Instinct MI300X", 196_592 * 2**20, "MI300X"),
        ("AMD Instinct MI250X", 64 * GIB, "MI250X"),
    ],
)
def test_a_device_is_found_by_full_name_and_memory(
    name: str, memory_bytes: int, found: str
) -> None:
    device = find_accelerator(name, memory_bytes)
    assert device is not None
    assert device.name == found


@pytest.mark.parametrize(
    ("name", "memory_bytes"),
    [
        ("A100", 80 * GIB),  # Ray's name for four kinds of device
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40 * GIB),
        ("NVIDIA A100-SXM4-80GB", 40 * GIB),  # half of one
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * GIB),
        ("NVIDIA H200 NVL", 140 * GIB),  # 835 TFLOP/s, not 989
        ("x86_64", 64 * GIB),
    ],
)
def test_an_unknown_device_is_not_guessed(name: str, memory_bytes: int | None) -> None:
    assert find_accelerator(name, memory_bytes) is None


def test_figures_are_per_device_in_base_units() -> None:
    h100 = find_accelerator("NVIDIA H100 80GB HBM3", 80 * GIB)
    assert h100 is not None
    assert h100.peak_flop_per_s == 989e12
    assert (h100.memory_bytes, h100.bandwidth_bytes_per_s) == (80e9, 3.35e12)
    assert h100.power_w == 700
    half = find_accelerator("AMD Instinct MI250X", 64 * GIB)  # the driver shows two for each chip
    assert half is not None
    assert (half.peak_flop_per_s, half.memory_bytes) == (191.5e12, 64e9)
    assert (half.power_w, half.devices_per_chip) == (280, 2)


def test_every_device_has_a_source() -> None:
    assert len(accelerators()) > 50
    for device in accelerators():
        assert device.source
        assert device.confidence in {"high", "medium", "low"}
        assert device.memory_bytes >= 4e9
        assert device.peak_flop_per_s is None or 1e12 < device.peak_flop_per_s < 1e16
        assert device.power_w is None or 50 <= device.power_w <= 2000


def test_no_two_devices_share_name_and_memory() -> None:
    named = [device for device in accelerators() if device.driver_name]
    assert len(named) > 40
    for device in named:
        assert find_accelerator(device.driver_name, device.memory_bytes) == device


def test_accelerator_types_are_rays() -> None:
    """Ray derives NVIDIA's types from the driver's name, and has a list of the others."""
    listed = {value for value in vars(ray_accelerators).values() if isinstance(value, str)}
    made = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type
    for device in accelerators():
        if device.vendor == "NVIDIA":
            assert device.ray_accelerator_type == made(device.driver_name)
        else:
            assert device.ray_accelerator_type in listed


def test_tables_and_launch_files_are_installed_with_the_package() -> None:
    home = Path(cluster.cost.catalog.__file__).parents[2]
    pyproject = tomllib.loads((home / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["cluster"]
    installed = {path for pattern in patterns for path in (home / "cluster").glob(pattern)}
    tables = home / "cluster" / "cost" / "data"
    launch_files = home / "cluster" / "definition" / "launch"
    dashboard = home / "cluster" / "node" / "grafana.json"
    assert installed == {*tables.iterdir(), *launch_files.iterdir(), dashboard}


@pytest.mark.parametrize(
    ("accelerator_type", "resource"),
    [
        ("H100", "GPU"),
        ("TPU-V5P", "TPU"),
        ("Intel-GAUDI", "HPU"),
        ("aws-neuron-core", "neuron_cores"),
        ("P100", "GPU"),
    ],
)
def test_ray_resource_of_a_type(accelerator_type: str, resource: str) -> None:
    assert ray_resource(accelerator_type) == resource


def test_every_price_has_a_source() -> None:
    assert len(instances()) > 100
    assert {each.provider for each in instances()} >= {"aws", "gcp", "azure", "lambda", "nebius"}
    for each in instances():
        assert each.source
        assert each.usd_per_h is not None
        if each.spot_usd_per_h is not None:
            assert each.spot_min_usd_per_h is not None
            assert each.spot_min_usd_per_h <= each.spot_usd_per_h < each.usd_per_h


def test_an_instance_is_in_base_units() -> None:
    p5 = find_instance("aws", "p5.48xlarge", "us-east-1")
    assert p5 is not None
    assert (p5.usd(spot=False), p5.usd(spot=True), p5.spot_min_usd_per_h) == (
        55.04,
        16.8795,
        11.2543,
    )
    assert (p5.accelerators, p5.ray_accelerator_type, p5.vcpus) == (8, "H100", 192)
    assert (p5.memory_bytes, p5.accelerator_memory_bytes) == (2048 * GIB, 80e9)
    elsewhere = find_instance("aws", "p5.48xlarge", "eu-west-1")
    assert elsewhere == p5, "a price of another region says which"
    assert find_instance("aws", "p99.huge") is None


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("ondemand_usd_h", "-0.526", "ondemand_usd_h cannot be '-0.526'"),
        ("ondemand_usd_h", "nan", "ondemand_usd_h cannot be 'nan'"),
        ("ondemand_usd_h", "", "ondemand_usd_h is missing"),
        ("spot_usd_h_min", "0", "spot_usd_h_min cannot be '0'"),
        ("vcpus", "many", "vcpus cannot be 'many'"),
        ("snapshot_date", "2026", "snapshot_date cannot be '2026'"),
    ],
)
def test_a_wrong_price_is_reported_with_file_and_row(
    tmp_path: Path, column: str, value: str, problem: str
) -> None:
    with PRICES_CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[3][column] = value
    path = tmp_path / "prices.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(SpecError) as caught:
        instances(path)
    assert str(caught.value) == f"{path}:5: {problem}"


@pytest.mark.parametrize(
    ("zone", "region"),
    [
        ("us-east-1", "us-east-1"),
        ("us-east-1a", "us-east-1"),
        ("us-west-2-lax-1a", "us-west-2"),
        ("us-east4-c", "us-east4"),
        ("US-KS-2", "US"),
    ],
)
def test_a_zone_is_in_its_region(zone: str, region: str) -> None:
    assert is_in_region(zone, region)


@pytest.mark.parametrize(
    ("zone", "region"),
    [("eastus2", "eastus"), ("europe-west12-b", "europe-west1"), ("us-east-1", "us-east-1a")],
)
def test_a_region_is_not_in_another_whose_name_it_begins_with(zone: str, region: str) -> None:
    assert not is_in_region(zone, region)
