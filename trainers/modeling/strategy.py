"""How a model is distributed over the workers: replicated, sharded or tensor-parallel.

`parallelize` reads top to bottom: one device, replicas, the shape of the mesh, tensor parallelism,
sharding. The model computes the same in every mode; only the place of its parts differs.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from cluster.base.errors import SpecError
from trainers.modeling.backward import sharded_module
from trainers.modeling.forward import Forward, separate_blocks
from trainers.modeling.sharding import (
    check_can_be_sharded,
    refuse_written_weights,
    share_buffers_each_step,
    stays_whole,
)
from trainers.spec import OptimizerSpec, RunSpec, TrainSpec
from trainers.worker import Worker, is_distributed
from trainers.workload import Workload

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

ParallelMode = Literal["single", "ddp", "fsdp", "hsdp", "tensor"]

STATE_SHARE = 0.5
"""Share of a device's memory that weights, gradients and optimizer may take; activations and
temporary copies need the rest."""


@dataclass(frozen=True)
class ParallelStrategy:
    """How a model is distributed over the workers, and why."""

    mode: ParallelMode
    reason: str
    group: int = 1
    """Workers that share one replica of the model (hsdp) or of each layer (tensor)."""

    def applied_to(self, worker: Worker) -> Worker:
        """The worker, with its share of the data."""
        return replace(worker, tensor_parallel_size=self.group) if self.mode == "tensor" else worker


def choose_strategy(
    spec: RunSpec, workload: Workload, network: nn.Module, worker: Worker, memory_bytes: int | None
) -> ParallelStrategy:
    """The strategy that the spec asks for; `auto` goes by the memory that the model's state needs.

    `memory_bytes` is the memory of one worker. Raises SpecError for a strategy that does not suit
    the workers or the workload. `auto` never chooses tensor parallelism, which is slower than
    sharding wherever sharding fits.
    """
    scale, world, local = spec.scale, worker.world_size, worker.local_world_size
    if world == 1:
        return ParallelStrategy("single", "there is one worker")
    need = state_bytes(spec.optimizer, network)
    have = memory_bytes if memory_bytes is not None else 1 << 62  # then nothing asks for shards
    known = _format_bytes(have) if memory_bytes is not None else "unknown memory"
    sizes = f"weights, gradients and optimizer take {_format_bytes(need)} of a worker's {known}"
    gathers = ""
    if spec.train.precision == "fp16":  # see _mixed_precision
        gathers = "; fp16 gathers weights in fp32, at twice the traffic of bf16"
    mode = scale.parallel
    if mode == "auto":
        if need <= STATE_SHARE * have:
            return ParallelStrategy("ddp", f"{sizes}, so each worker has a copy")
        if 1 < local < world and world % local == 0 and need / local <= STATE_SHARE * have:
            return ParallelStrategy(
                "hsdp", f"{sizes}, so the {local} of a machine share a copy{gathers}", local
            )
        return ParallelStrategy("fsdp", f"{sizes}, so all workers share one copy{gathers}")
    group = scale.group or local
    if mode in ("hsdp", "tensor") and (world % group or group == 1):
        raise SpecError(f"scale.group: {world} workers cannot be put into groups of {group}")
    if mode == "tensor" and not workload.tensor_plan(network):
        raise SpecError("scale.parallel: tensor needs a workload that defines tensor_plan")
    reason = sizes if mode == "ddp" else f"{sizes}{gathers}"
    return ParallelStrategy(mode, reason, group if mode in ("hsdp", "tensor") else 1)


def parallelize(
    forward: Forward,
    spec: RunSpec,
    workload: Workload,
    strategy: ParallelStrategy,
    worker: Worker,
    blocks: list[nn.Module],
) -> nn.Module:
    """Wrap the forward pass so that it trains on all workers; collective.

    The weights of its network become this worker's part of them. `blocks` are units of sharding.
    Raises SpecError if tensor parallelism would part weights that are shared.
    """
    network, world, kind = forward.network, worker.world_size, worker.device.type
    if strategy.mode == "single":
        return forward.to(worker.device)
    if strategy.mode == "ddp":
        forward.to(worker.device)
        devices = None if kind == "cpu" else [worker.device]
        return DistributedDataParallel(forward, device_ids=devices, gradient_as_bucket_view=True)

    if strategy.mode == "fsdp":
        shards = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    elif strategy.mode == "hsdp":
        shape = (world // strategy.group, strategy.group)
        shards = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    else:
        shape = (world // strategy.group, strategy.group)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("shard", "tensor"))
        network.to(worker.device)
        _split_layers(network, mesh["tensor"], workload)
        shards = mesh["shard"]

    _shard(forward, separate_blocks(blocks, network), shards, spec.train, strategy.mode)
    forward.to(worker.device)
    share_buffers_each_step(forward)
    return forward


def _shard(
    forward: Forward, blocks: list[nn.Module], shards: DeviceMesh, train: TrainSpec, mode: str
) -> None:
    """Shard the weights of each of the blocks together, and those of the rest.

    Raises SpecError for a model that FSDP does not take.
    """
    # Imported here only: one worker, or replicas, would wait 1 s for it.
    from torch.distributed.fsdp import fully_shard

    policy = _mixed_precision(train)
    root_policy = replace(policy, cast_forward_inputs=False)
    whole = {weight for weight in forward.parameters() if stays_whole(weight)}
    eager = train.compile == "off"
    check_can_be_sharded(forward.network)
    names = {module: name for name, module in forward.network.named_modules()}
    if eager:
        refuse_written_weights(forward, "")
    try:
        for block in blocks:
            if eager:
                refuse_written_weights(block, names[block])
                _gather_for_parts(block)
            fully_shard(block, mesh=shards, mp_policy=policy, ignored_params=whole)
        root = fully_shard(forward, mesh=shards, mp_policy=root_policy, ignored_params=whole)
    except (RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise SpecError(f"scale.parallel: {mode} cannot shard this model: {reason}") from error
    root.set_reduce_scatter_unused_params(True)
    if policy.param_dtype is not None:  # a batch has more than the model's inputs: targets
        cast_inputs = partial(_cast_inputs, policy.param_dtype)
        forward.network.register_forward_pre_hook(cast_inputs, with_kwargs=True)


def _gather_for_parts(block: nn.Module) -> None:
    """Gather the weights of a block also when a part of it is called, but not the block itself."""

    def gather(part: nn.Module, _: Any) -> None:
        if any(is_distributed(weight) for weight in part.parameters(recurse=False)):
            cast("FSDPModule", block).unshard()

    for part in block.modules():
        if part is not block and any(True for _ in part.parameters(recurse=False)):
            part.register_forward_pre_hook(gather)


def _split_layers(network: nn.Module, group: DeviceMesh, workload: Workload) -> None:
    """Split layers by the workload's plan; SpecError if weights that were one no longer are."""
    from torch.distributed.tensor.parallel import parallelize_module

    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in network.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    parallelize_module(network, group, workload.tensor_plan(network))
    now = dict(network.named_parameters(remove_duplicate=False))
    for shared in names.values():
        if len({now[name] for name in shared}) > 1:
            raise SpecError(
                f"scale.parallel: tensor cannot split {' and '.join(shared)}, which are one "
                "weight; leave them out of the workload's tensor_plan"
            )


def _cast_inputs(
    dtype: torch.dtype, _: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, Any]:
    """A forward pre-hook that gives floating-point inputs the dtype of the weights."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {name: cast(part) for name, part in value.items()}
        return type(value)(map(cast, value)) if type(value) in (list, tuple) else value

    return cast(inputs), cast(options)


def compile_model(model: nn.Module, train: TrainSpec, blocks: list[nn.Module]) -> nn.Module:
    """Apply `train.compile` to a parallel model; compilation itself happens in the first step.

    Sharded models are compiled block by block, since the collectives between blocks are not
    compiled.
    """
    if train.compile == "off":
        return model
    if blocks and sharded_module(model) is not None:
        for block in blocks:
            block.compile(mode=train.compile)
        return model
    result: nn.Module = torch.compile(model, mode=train.compile)  # type: ignore[assignment]
    return result


def _mixed_precision(train: TrainSpec) -> "MixedPrecisionPolicy":
    """Sharded bf16 models gather weights in bf16 and reduce gradients in fp32.

    Others gather in fp32, fp16 too: with fp16 weights, modules would also get fp16 inputs and
    give fp16 outputs, in which a loss overflows that does not under autocast.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if train.precision not in ("bf16", "fp8"):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The device mesh of a distributed tensor; None for a plain one."""
    return tensor.device_mesh if is_distributed(tensor) else None


def state_bytes(optimizer: OptimizerSpec, network: nn.Module) -> int:
    """Bytes of an unsharded model's weights, gradients and optimizer state."""
    moments = 2 if optimizer.name == "adamw" else int(optimizer.momentum > 0)
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    held = [*network.parameters(), *network.buffers()]
    return sum(t.numel() * t.element_size() for t in held) + trained * (1 + moments)


def memory_per_worker(worker: Worker) -> int | None:
    """Bytes of memory for this worker: of its device, or its part of the machine's."""
    total = worker.hardware.memory().total
    shared = worker.device.type == "cpu"
    return total // worker.local_world_size if total is not None and shared else total


def _format_bytes(count: int) -> str:
    unit = min(3, int(math.log10(max(1, count))) // 3)
    return f"{count / 1000**unit:.3g} {('B', 'kB', 'MB', 'GB')[unit]}"
