"""Which device a worker computes on, and how a model is spread over the workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainers.spec import ScaleSpec, TrainSpec


@dataclass(frozen=True)
class Worker:
    """One of `world` workers that train together, and the device it computes on."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all workers, in place; collective."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def decided_by_first(self, value: Any) -> Any:
        """The first worker's value, on all of them; collective."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait_for_all(self) -> None:
        """Return when all workers have called this; collective."""
        if self.world > 1:
            dist.barrier()


def distribute(model: nn.Module, scale: ScaleSpec, worker: Worker) -> nn.Module:
    """The model as the loop calls it: itself on one worker, wrapped on several; collective."""
    if worker.world == 1:
        return model
    devices = [worker.device] if worker.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def compiled(model: nn.Module, train: TrainSpec) -> nn.Module:
    """The model as `train.compile` wants it; compilation itself happens in the first step."""
    if train.compile == "off":
        return model
    result: nn.Module = torch.compile(model, mode=train.compile)  # type: ignore[assignment]
    return result


def weights_dtype(train: TrainSpec) -> torch.dtype:
    """The dtype in which weights and optimizer state are kept."""
    return torch.float64 if train.precision == "fp64" else torch.float32


@contextmanager
def compute_precision(train: TrainSpec, device: torch.device) -> Iterator[None]:
    """Forward passes in here are computed in the spec's precision."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if train.precision not in dtypes:
        yield
        return
    with torch.autocast(device.type, dtype=dtypes[train.precision]):
        yield


def local_device(scale: ScaleSpec) -> torch.device:
    """The device of a process that Ray has given at most one accelerator."""
    gpu = scale.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if gpu else torch.device("cpu")
