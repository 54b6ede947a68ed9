"""The device of each family: selection, name, memory, seed and supported precisions."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster.base.errors import SpecError
from trainers.devices import FAMILIES, Cpu, Cuda, Device, Hpu, Neuron, Rocm, Tpu, Xpu, local_device

PROC = Path("/proc/self/status")


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> type:
    """Makes a machine with devices of one family only."""

    class Only:
        def __init__(self, family: type[Device] | None) -> None:
            for each in FAMILIES:
                monkeypatch.setattr(
                    each, "is_available", staticmethod(lambda it=each: it is family)
                )

    return Only


class TestWhichDevice:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_auto_takes_the_accelerator(self, only: type, family: type[Device]) -> None:
        only(family)
        assert type(local_device("auto")) is family

    def test_auto_falls_back_to_the_cpu(self, only: type) -> None:
        only(None)
        assert type(local_device("auto")) is Cpu

    def test_cpu_is_the_cpu_even_with_an_accelerator(self, only: type) -> None:
        only(Cuda)
        assert type(local_device("cpu")) is Cpu

    @pytest.mark.parametrize(
        ("accelerator", "family"),
        [
            ("gpu", Cuda),
            ("gpu", Rocm),
            ("gpu", Xpu),
            ("H100", Cuda),
            ("AMD-Instinct-MI300X-OAM", Rocm),
            ("TPU-V5P", Tpu),
            ("Intel-GAUDI", Hpu),
            ("aws-neuron-core", Neuron),
        ],
    )
    def test_an_accelerator_type_selects_its_family(
        self, only: type, accelerator: str, family: type[Device]
    ) -> None:
        only(family)
        assert type(local_device(accelerator)) is family

    @pytest.mark.parametrize(
        ("accelerator", "there"), [("gpu", None), ("H100", Tpu), ("TPU-V4", Cuda)]
    )
    def test_a_missing_device_is_reported_in_one_line(
        self, only: type, accelerator: str, there: type[Device] | None
    ) -> None:
        only(there)
        with pytest.raises(SpecError, match=rf"^scale.accelerator: .* no {accelerator} [^\n]*$"):
            local_device(accelerator)

    def test_a_broken_driver_counts_as_no_device(
        self, only: type, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        only(None)

        def broken() -> bool:
            raise RuntimeError("driver too old")

        monkeypatch.setattr(Cuda, "is_available", staticmethod(broken))
        assert type(local_device("auto")) is Cpu

    def test_nothing_is_imported_for_absent_families(self) -> None:
        assert not [family for family in (Hpu, Tpu, Neuron) if family.is_available()]
        assert not {"torch_xla", "habana_frameworks"} & sys.modules.keys()

    def test_amd_and_nvidia_are_told_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for hip, family in ((None, Cuda), ("7.2", Rocm)):
            monkeypatch.setattr(torch.version, "hip", hip)
            assert type(local_device("gpu")) is family

    def test_torch_and_ray_know_the_names(self) -> None:
        resources = {family.ray_resource_name for family in FAMILIES}
        assert resources == {"GPU", "TPU", "HPU", "neuron_cores"}
        for family in (Cpu, Cuda, Xpu):
            assert torch.distributed.get_default_backend_for_device(family.type) == family.backend


class TestCpu:
    @pytest.mark.skipif(not PROC.exists(), reason="needs Linux's /proc")
    def test_memory_is_that_of_the_kernel(self) -> None:
        status = dict(line.split(":", 1) for line in PROC.read_text().splitlines())
        memory = Cpu().memory()
        assert memory.peak == pytest.approx(1024 * int(status["VmHWM"].split()[0]), rel=0.05)
        assert 0 < memory.free < memory.total
        assert memory.peak < memory.total

    def test_a_seed_or_a_state_repeats_the_random_numbers(self) -> None:
        device = Cpu()
        device.seed(7)
        state = device.rng_state()
        first = torch.rand(3, device=device.device)
        device.seed(7)
        assert torch.equal(torch.rand(3, device=device.device), first)
        torch.set_rng_state(state)
        assert torch.equal(torch.rand(3, device=device.device), first)
        device.synchronize()

    def test_has_no_catalog_entry(self) -> None:
        assert Cpu().catalog_entry() is None
        assert Cpu().name


class TestPrecisions:
    @pytest.mark.parametrize(
        ("capability", "precisions"),
        [
            ((7, 0), {"fp32", "fp64", "fp16"}),  # V100
            ((7, 5), {"fp32", "fp64", "fp16"}),  # T4
            ((8, 0), {"fp32", "fp64", "fp16", "bf16"}),  # A100
            ((8, 6), {"fp32", "fp64", "fp16", "bf16"}),  # RTX 3090
            ((8, 9), {"fp32", "fp64", "fp16", "bf16", "fp8"}),  # L4
            ((9, 0), {"fp32", "fp64", "fp16", "bf16", "fp8"}),  # H100
            ((12, 0), {"fp32", "fp64", "fp16", "bf16", "fp8"}),  # RTX 5090
        ],
    )
    def test_of_nvidia_by_compute_capability(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precisions: set[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        assert set(Cuda().precisions) == precisions

    @pytest.mark.parametrize(
        ("architecture", "bf16", "fp8"),
        [
            ("gfx906:sramecc+:xnack-", False, False),  # MI50
            ("gfx1030", False, False),  # RX 6800
            ("gfx90a:sramecc+:xnack-", True, False),  # MI250X
            ("gfx942:sramecc+:xnack-", True, True),  # MI300X
            ("gfx950:sramecc+:xnack-", True, True),  # MI355X
        ],
    )
    def test_of_amd_by_architecture(
        self, monkeypatch: pytest.MonkeyPatch, architecture: str, bf16: bool, fp8: bool
    ) -> None:
        properties = SimpleNamespace(gcnArchName=architecture)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        assert ("bf16" in Rocm().precisions, "fp8" in Rocm().precisions) == (bf16, fp8)
