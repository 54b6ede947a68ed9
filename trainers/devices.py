"""The device that a worker computes on: its name, its memory, the precisions that it supports.

One small class for each family of accelerators; a family's packages are imported only where they
are installed. Only the CPU class has been run: the others follow the documentation of PyTorch and
of the vendors. Apple's GPUs are not supported: they have no float64, in which losses are summed.

To add a family: subclass `Device`, and list the class in `FAMILIES`.
"""

import importlib.util
import os
import platform
import resource
import sys
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cluster.base.errors import SpecError
from cluster.cost.catalog import Accelerator, find_accelerator, ray_resource


class DeviceMemory(NamedTuple):
    """Bytes of a device's memory; None where they are not known."""

    total: int | None
    free: int | None
    """Bytes that no process uses now."""
    peak: int | None
    """The most bytes that this process' tensors, on a CPU the process itself, have used at once."""


class Device:
    """The one device of a process; calls PyTorch's module for its family, such as `torch.cuda`."""

    def __init__(self, index: int = 0) -> None:
        """The `index`-th of the devices that the process sees."""
        self.index = index

    type: ClassVar[str]
    """PyTorch's device type."""
    ray_resource_name: ClassVar[str | None]
    """The Ray resource that counts these devices; None for a CPU."""
    backend: ClassVar[str]
    """The `torch.distributed` backend for tensors on these devices."""

    @staticmethod
    def is_available() -> bool:
        """Whether this process can use such a device; may raise where a driver is broken."""
        raise NotImplementedError

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.type)

    @property
    def device(self) -> torch.device:
        """PyTorch's device of its tensors."""
        return torch.device(self.type, self.index)

    @property
    def name(self) -> str:
        """Its full name, from the driver."""
        return str(self._module.get_device_name())

    @property
    def precisions(self) -> tuple[str, ...]:
        """The values of `train.precision` that it supports."""
        return ("fp32", "bf16")

    def uuids(self) -> tuple[str, ...]:
        """The UUIDs of all such devices that the process sees, as in the driver's energy counters.

        Empty where PyTorch does not report them.
        """
        return ()

    def memory(self) -> DeviceMemory:
        free, total = self._module.mem_get_info()
        return DeviceMemory(total, free, self._module.max_memory_allocated())

    def catalog_entry(self) -> Accelerator | None:
        """Its entry in the catalogue of accelerators, if it has one."""
        return find_accelerator(self.name, self.memory().total)

    def select(self) -> None:
        """Make it PyTorch's current device of this process."""
        if hasattr(self._module, "set_device"):
            self._module.set_device(self.index)

    def seed(self, seed: int) -> None:
        """Seed PyTorch's generator of this device."""
        self._module.manual_seed(seed)

    def rng_state(self) -> Tensor:
        """The state of PyTorch's generator of this device."""
        state: Tensor = self._module.get_rng_state()
        return state

    def synchronize(self) -> None:
        """Block until all work queued on it is done."""
        self._module.synchronize()


class Cpu(Device):
    """The cores of this machine. bf16, fp16 and fp8 give right results; few CPUs get faster."""

    type, ray_resource_name, backend = "cpu", None, "gloo"
    precisions = ("fp32", "fp64", "bf16", "fp16", "fp8")
    device = torch.device("cpu")
    name = platform.processor() or platform.machine()

    @staticmethod
    def is_available() -> bool:
        return True

    def memory(self) -> DeviceMemory:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return DeviceMemory(
            _sysconf_bytes("SC_PHYS_PAGES"), _sysconf_bytes("SC_AVPHYS_PAGES"), peak
        )

    def select(self) -> None:
        pass

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return torch.default_generator.get_state()

    def synchronize(self) -> None:
        pass


class Cuda(Device):
    """NVIDIA's GPUs. Not tested on one."""

    type, ray_resource_name, backend = "cuda", "GPU", "nccl"

    @staticmethod
    def is_available() -> bool:
        return torch.version.hip is None and torch.cuda.is_available()

    @property
    def precisions(self) -> tuple[str, ...]:
        """By compute capability: bf16 since Ampere (8.0), fp8 since Ada (8.9)."""
        capability = torch.cuda.get_device_capability()
        newer = {"bf16": capability >= (8, 0), "fp8": capability >= (8, 9)}
        return ("fp32", "fp64", "fp16", *(name for name, can in newer.items() if can))

    def uuids(self) -> tuple[str, ...]:
        count = torch.cuda.device_count()
        return tuple(f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count))


class Rocm(Device):
    """AMD's GPUs. PyTorch calls them cuda, and their library RCCL nccl. Not tested on one."""

    type, ray_resource_name, backend = "cuda", "GPU", "nccl"

    @staticmethod
    def is_available() -> bool:
        return torch.version.hip is not None and torch.cuda.is_available()

    def uuids(self) -> tuple[str, ...]:
        count = torch.cuda.device_count()
        return tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(count))

    @property
    def precisions(self) -> tuple[str, ...]:
        """By architecture: bf16 since MI100 and RDNA 3, fp8 since MI300."""
        name = torch.cuda.get_device_properties(0).gcnArchName
        bf16 = name.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
        newer = {"bf16": bf16, "fp8": name.startswith(("gfx94", "gfx95"))}
        return ("fp32", "fp64", "fp16", *(name for name, can in newer.items() if can))


class Xpu(Device):
    """Intel's GPUs. Not tested on one."""

    type, ray_resource_name, backend = "xpu", "GPU", "xccl"

    @staticmethod
    def is_available() -> bool:
        return torch.xpu.is_available()

    @property
    def precisions(self) -> tuple[str, ...]:
        fp64 = ("fp64",) if torch.xpu.get_device_properties().has_fp64 else ()
        return ("fp32", "bf16", "fp16", *fp64)


class Hpu(Device):
    """Intel Gaudi, through the package habana_frameworks. Not tested on one."""

    type, ray_resource_name, backend = "hpu", "HPU", "hccl"

    @staticmethod
    def is_available() -> bool:
        if importlib.util.find_spec("habana_frameworks") is None:
            return False
        hpu = importlib.import_module("habana_frameworks.torch.hpu")
        return bool(hpu.is_available())


class Tpu(Device):
    """Google's TPUs, through the package torch_xla. Not tested on one.

    The name comes from an environment variable of Google's machines, as in `TPU v5litepod`.
    """

    type, ray_resource_name, backend = "xla", "TPU", "xla"
    platform: ClassVar[str] = "TPU"
    """The family's name in torch_xla."""

    @classmethod
    def is_available(cls) -> bool:
        if importlib.util.find_spec("torch_xla") is None:
            return False
        runtime = importlib.import_module("torch_xla.runtime")
        return str(runtime.device_type()) == cls.platform

    @property
    def _module(self) -> Any:
        return importlib.import_module("torch_xla.core.xla_model")

    @property
    def name(self) -> str:
        return f"TPU {os.environ.get('TPU_ACCELERATOR_TYPE', '').partition('-')[0]}".rstrip()

    def memory(self) -> DeviceMemory:
        try:
            found = self._module.get_memory_info(self.device)
            total = found["bytes_limit"]
            return DeviceMemory(total, total - found["bytes_used"], found.get("peak_bytes_used"))
        except (RuntimeError, KeyError):  # not every runtime reports memory
            return DeviceMemory(None, None, None)

    def seed(self, seed: int) -> None:
        self._module.set_rng_state(seed)

    def rng_state(self) -> Tensor:
        return torch.tensor(self._module.get_rng_state())

    def synchronize(self) -> None:
        importlib.import_module("torch_xla").sync(wait=True)


class Neuron(Tpu):
    """A core of AWS Trainium or Inferentia, through torch_xla. Not tested on one."""

    ray_resource_name, platform, name = "neuron_cores", "NEURON", "AWS NeuronCore"


FAMILIES: tuple[type[Device], ...] = (Cuda, Rocm, Xpu, Hpu, Tpu, Neuron)


def local_device(accelerator: str, index: int = 0) -> Device:
    """The device of a process to which Ray has assigned at most one accelerator.

    The `index`-th accelerator that the process sees. `accelerator` is `scale.accelerator`; auto
    falls back to the CPU. Raises SpecError if an accelerator is required and PyTorch finds none.
    """
    if accelerator != "cpu":
        wanted = None if accelerator == "auto" else ray_resource(accelerator)
        for family in FAMILIES:
            if wanted in (None, family.ray_resource_name) and _is_available(family):
                return family(index)
        if wanted is not None:
            raise SpecError(
                f"scale.accelerator: this worker has no {accelerator} that PyTorch "
                f"{torch.__version__} can use"
            )
    return Cpu()


def _is_available(family: type[Device]) -> bool:
    try:
        return family.is_available()
    except Exception:
        return False


def _sysconf_bytes(pages: str) -> int | None:
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on every system
        return None
