"""The device that a worker computes on: what it is, what it can do, what it holds.

One small class for each family of accelerators; nothing is imported for a family that is not
there. Tried on CPUs only: the other classes follow the documentation of PyTorch and of the
makers. Apple's GPUs are left out, for they have no float64, in which losses are summed.
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
    """Bytes of a device's memory; None where that cannot be known."""

    total: int | None
    free: int | None
    """What no process uses now."""
    peak: int | None
    """The most that this process' tensors have taken at once; on a CPU, that the process has."""


class Device:
    """The one device of a process, by PyTorch's module for its family, such as `torch.cuda`."""

    def __init__(self, index: int = 0) -> None:
        """The `index`-th of those that the process sees."""
        self.index = index

    type: ClassVar[str]
    """PyTorch's device type."""
    ray_resource_name: ClassVar[str | None]
    """The resource under which Ray counts such devices; None for a CPU."""
    backend: ClassVar[str]
    """The backend of `torch.distributed` that moves tensors between such devices."""

    @staticmethod
    def is_available() -> bool:
        """Whether this process can use one; may raise where a driver is broken."""
        raise NotImplementedError

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.type)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return torch.device(self.type, self.index)

    @property
    def name(self) -> str:
        """The full name that its driver gives it."""
        return str(self._module.get_device_name())

    @property
    def precisions(self) -> tuple[str, ...]:
        """Which values of `train.precision` it computes."""
        return ("fp32", "bf16")

    def uuids(self) -> tuple[str, ...]:
        """Of all such devices that the process sees, as the driver's own counters name them;
        empty where PyTorch does not tell.
        """
        return ()

    def memory(self) -> DeviceMemory:
        free, total = self._module.mem_get_info()
        return DeviceMemory(total, free, self._module.max_memory_allocated())

    def catalog_entry(self) -> Accelerator | None:
        """What the catalogue has about it."""
        return find_accelerator(self.name, self.memory().total)

    def select(self) -> None:
        """Make it the one that this process computes on, where nothing else is said."""
        if hasattr(self._module, "set_device"):
            self._module.set_device(self.index)

    def seed(self, seed: int) -> None:
        """Seed what dropout and the like draw from."""
        self._module.manual_seed(seed)

    def rng_state(self) -> Tensor:
        """The state of what dropout and the like draw from."""
        state: Tensor = self._module.get_rng_state()
        return state

    def set_random_state(self, state: Tensor) -> None:
        """Go on drawing from where `random_state` was taken."""
        self._module.set_rng_state(state)

    def synchronize(self) -> None:
        """Return when all that it was given is computed."""
        self._module.synchronize()


class Cpu(Device):
    """The cores of this machine. bf16, fp16 and fp8 give right results; few CPUs gain by them."""

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

    def set_random_state(self, state: Tensor) -> None:
        torch.default_generator.set_state(state)

    def synchronize(self) -> None:
        pass


class Cuda(Device):
    """NVIDIA. Not tried on one."""

    type, ray_resource_name, backend = "cuda", "GPU", "nccl"

    @staticmethod
    def is_available() -> bool:
        return torch.version.hip is None and torch.cuda.is_available()

    @property
    def precisions(self) -> tuple[str, ...]:
        """By compute capability: bf16 from Ampere (8.0) on, fp8 from Ada (8.9) on."""
        capability = torch.cuda.get_device_capability()
        newer = {"bf16": capability >= (8, 0), "fp8": capability >= (8, 9)}
        return ("fp32", "fp64", "fp16", *(name for name, can in newer.items() if can))

    def uuids(self) -> tuple[str, ...]:
        count = torch.cuda.device_count()
        return tuple(f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count))


class Rocm(Device):
    """AMD. PyTorch calls it cuda, and its library of collectives, RCCL, nccl. Not tried on one."""

    type, ray_resource_name, backend = "cuda", "GPU", "nccl"

    @staticmethod
    def is_available() -> bool:
        return torch.version.hip is not None and torch.cuda.is_available()

    def uuids(self) -> tuple[str, ...]:
        count = torch.cuda.device_count()
        return tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(count))

    @property
    def precisions(self) -> tuple[str, ...]:
        """By architecture: bf16 from MI100 and RDNA 3 on, fp8 from MI300 on."""
        name = torch.cuda.get_device_properties(0).gcnArchName
        bf16 = name.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
        newer = {"bf16": bf16, "fp8": name.startswith(("gfx94", "gfx95"))}
        return ("fp32", "fp64", "fp16", *(name for name, can in newer.items() if can))


class Xpu(Device):
    """Intel's GPUs. Not tried on one."""

    type, ray_resource_name, backend = "xpu", "GPU", "xccl"

    @staticmethod
    def is_available() -> bool:
        return torch.xpu.is_available()

    @property
    def precisions(self) -> tuple[str, ...]:
        fp64 = ("fp64",) if torch.xpu.get_device_properties().has_fp64 else ()
        return ("fp32", "bf16", "fp16", *fp64)


class Hpu(Device):
    """Intel Gaudi, by the package habana_frameworks. Not tried on one."""

    type, ray_resource_name, backend = "hpu", "HPU", "hccl"

    @staticmethod
    def is_available() -> bool:
        if importlib.util.find_spec("habana_frameworks") is None:
            return False
        hpu = importlib.import_module("habana_frameworks.torch.hpu")
        return bool(hpu.is_available())


class Tpu(Device):
    """Google's TPUs, by the package torch_xla. Not tried on one.

    Named by the variable that Google's machines set, as in `TPU v5litepod`.
    """

    type, ray_resource_name, backend = "xla", "TPU", "xla"
    platform: ClassVar[str] = "TPU"
    """What torch_xla calls the family."""

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
        except (RuntimeError, KeyError):  # not every runtime counts
            return DeviceMemory(None, None, None)

    def seed(self, seed: int) -> None:
        self._module.set_rng_state(seed)

    def rng_state(self) -> Tensor:
        return torch.tensor(self._module.get_rng_state())

    def set_random_state(self, state: Tensor) -> None:
        self._module.set_rng_state(int(state))

    def synchronize(self) -> None:
        importlib.import_module("torch_xla").sync(wait=True)


class Neuron(Tpu):
    """A core of AWS Trainium or Inferentia, by the package torch_xla. Not tried on one."""

    ray_resource_name, platform, name = "neuron_cores", "NEURON", "AWS NeuronCore"


FAMILIES: tuple[type[Device], ...] = (Cuda, Rocm, Xpu, Hpu, Tpu, Neuron)


def local_device(accelerator: str, index: int = 0) -> Device:
    """The device of a process to which Ray has given at most one accelerator.

    The `index`-th that the process sees. `accelerator` is `scale.accelerator`; auto takes the
    CPU where there is nothing else. Raises SpecError where an accelerator is asked for and
    PyTorch finds none.
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
    except (ValueError, OSError):  # the system does not say
        return None
