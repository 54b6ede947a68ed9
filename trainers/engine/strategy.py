"""Which device a worker computes on, and how a model is spread over the workers.

`spread` reads top to bottom: one device, copies, the shape of the mesh, tensor parallelism,
sharding. What a model computes is the same in every mode; only where its parts lie differs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cluster.base.errors import SpecError
from trainers.spec import OptimizerSpec, RunSpec, TrainSpec
from trainers.worker import Worker
from trainers.workload import Workload

ParallelMode = Literal["single", "ddp", "fsdp", "hsdp", "tensor"]

STATE_SHARE = 0.5
"""Share of a device's memory that weights, gradients and optimizer may take; activations and
temporary copies need the rest."""


@dataclass(frozen=True)
class ParallelStrategy:
    """How a model is spread over the workers, and why."""

    mode: ParallelMode
    reason: str
    group: int = 1
    """Workers that hold one copy of the model together (hsdp), or of each layer (tensor)."""

    def applied_to(self, worker: Worker) -> Worker:
        """The worker, with its share of the data."""
        return replace(worker, tensor_parallel_size=self.group) if self.mode == "tensor" else worker


def choose_strategy(
    spec: RunSpec, workload: Workload, network: nn.Module, worker: Worker, memory_bytes: int | None
) -> ParallelStrategy:
    """The layout that the spec asks for, or `auto` by the memory that the model's state needs.

    `memory_bytes` is what one worker may fill. Raises SpecError for a layout that the workers or
    the workload cannot have. `auto` never chooses tensor parallelism, which is slower than
    sharding wherever sharding fits.
    """
    scale, world, local = spec.scale, worker.world_size, worker.local_world_size
    if world == 1:
        return ParallelStrategy("single", "there is one worker")
    need = state_bytes(spec.optimizer, network)
    have = memory_bytes if memory_bytes is not None else 1 << 62  # then nothing asks for shards
    known = _format_bytes(have) if memory_bytes is not None else "unknown memory"
    sizes = f"weights, gradients and optimizer take {_format_bytes(need)} of a worker's {known}"
    mode = scale.parallel
    if mode == "auto":
        if need <= STATE_SHARE * have:
            return ParallelStrategy("ddp", f"{sizes}, so each worker has a copy")
        if 1 < local < world and world % local == 0 and need / local <= STATE_SHARE * have:
            return ParallelStrategy(
                "hsdp", f"{sizes}, so the {local} of a machine share a copy", local
            )
        return ParallelStrategy("fsdp", f"{sizes}, so all workers share one copy")
    group = scale.group or local
    if mode in ("hsdp", "tensor") and (world % group or group == 1):
        raise SpecError(f"scale.group: {world} workers cannot be put into groups of {group}")
    if mode == "tensor" and not workload.tensor_plan(network):
        raise SpecError("scale.parallel: tensor needs a workload that defines tensor_plan")
    return ParallelStrategy(mode, sizes, group if mode in ("hsdp", "tensor") else 1)


def parallelize(
    network: nn.Module,
    spec: RunSpec,
    workload: Workload,
    strategy: ParallelStrategy,
    worker: Worker,
) -> nn.Module:
    """The network wrapped so that it trains on all workers; collective.

    Its own weights become this worker's part of them. Compilation happens in the first step.
    """
    world, kind = worker.world_size, worker.device.type
    if strategy.mode == "single":
        return network.to(worker.device)
    if strategy.mode == "ddp":
        network.to(worker.device)
        devices = None if kind == "cpu" else [worker.device]
        return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)

    if strategy.mode == "fsdp":
        shards = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    elif strategy.mode == "hsdp":
        shape = (world // strategy.group, strategy.group)
        shards = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    else:
        from torch.distributed.tensor.parallel import parallelize_module

        shape = (world // strategy.group, strategy.group)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("shard", "tensor"))
        network.to(worker.device)
        parallelize_module(network, mesh["tensor"], workload.tensor_plan(network))
        shards = mesh["shard"]

    blocks = workload.blocks(network)
    for block in blocks:
        fully_shard(block, mesh=shards, mp_policy=_mixed_precision(spec.train))
    fully_shard(network, mesh=shards, mp_policy=_mixed_precision(spec.train))
    return network.to(worker.device)


def compile_model(model: nn.Module, train: TrainSpec, blocks: list[nn.Module]) -> nn.Module:
    """A spread model as `train.compile` wants it; compilation itself happens in the first step.

    Block by block where the blocks are sharded, since the exchange between them is not compiled.
    """
    if train.compile == "off":
        return model
    if isinstance(model, FSDPModule) and blocks:
        for block in blocks:
            block.compile(mode=train.compile)
        return model
    result: nn.Module = torch.compile(model, mode=train.compile)  # type: ignore[assignment]
    return result


def compile_time_s() -> float:
    """Seconds that this process has spent compiling models."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))


def _mixed_precision(train: TrainSpec) -> MixedPrecisionPolicy:
    """Workers send each other weights in the precision of the computation, gradients in fp32."""
    if train.precision not in ("bf16", "fp8"):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@contextmanager
def sync_gradients_if(model: nn.Module, last: bool) -> Iterator[None]:
    """Backward passes in here exchange gradients between the workers only if `last`.

    For all micro-batches of a step but its last one.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def broadcast_buffers(network: nn.Module, strategy: ParallelStrategy) -> None:
    """Give all workers the first one's buffers, such as running means; collective.

    Copies do this themselves before each forward pass; sharded models don't.
    """
    if strategy.mode in ("single", "ddp"):
        return
    for buffer in network.buffers():
        dist.broadcast(buffer.to_local() if isinstance(buffer, DTensor) else buffer, src=0)


def gradient_norm(network: nn.Module) -> Tensor:
    """The 2-norm of the whole gradient, over all workers' parts; collective if sharded."""
    meshes = _gradients_by_mesh(network).values()
    norms = [nn.utils.get_total_norm(gradients) for gradients in meshes]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def clip_gradients(network: nn.Module, max_norm: float) -> None:
    """Scale the gradient down so that its norm is at most `longest`; collective if sharded."""
    norm = gradient_norm(network)
    for gradients in _gradients_by_mesh(network).values():
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def _gradients_by_mesh(network: nn.Module) -> dict[DeviceMesh | None, list[Tensor]]:
    """Kernels take lists of tensors that are spread over the same workers."""
    meshes: dict[DeviceMesh | None, list[Tensor]] = {}
    for weight in network.parameters():
        if weight.grad is not None:
            meshes.setdefault(mesh_of(weight), []).append(weight.grad)
    return meshes


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The workers over which a tensor is spread; None for one that this worker has whole."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def state_bytes(optimizer: OptimizerSpec, network: nn.Module) -> int:
    """Bytes of a whole model's weights, gradients and optimizer state."""
    moments = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    held = [*network.parameters(), *network.buffers()]
    return sum(t.numel() * t.element_size() for t in held) + trained * (1 + moments)


def memory_per_worker(worker: Worker) -> int | None:
    """Bytes of memory that this worker may fill: its device's, or its part of the machine's."""
    total = worker.hardware.memory().total
    shared = worker.device.type == "cpu"
    return total // worker.local_world_size if total is not None and shared else total


def _format_bytes(count: int) -> str:
    unit = min(3, int(math.log10(max(1, count))) // 3)
    return f"{count / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB')[unit]}"
