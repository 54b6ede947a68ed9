"""Buffers of a network, such as running means: by their names, and the same on all workers."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.worker import Worker, local_tensor


def saved_buffers(network: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of the state_dict, by name; one may have several names."""
    saved = network.state_dict()
    found = network.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in found if name in saved}


def set_buffer(
    network: nn.Module, name: str, value: Tensor | None, persistent: bool = True
) -> None:
    """Make `value` the buffer `name`, which need not have been there; None removes its value."""
    path, _, last = name.rpartition(".")
    module = network.get_submodule(path)
    if hasattr(module, last):
        setattr(module, last, value)
    else:
        module.register_buffer(last, value, persistent)


def has_no(network: nn.Module, name: str) -> bool:
    """Whether nothing is in the place of `name`, in a module that is there."""
    path, _, last = name.rpartition(".")
    try:
        return getattr(network.get_submodule(path), last, None) is None
    except AttributeError:
        return False


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements of a tensor are one in memory, as `expand` makes them."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in strides)


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy `values` into `tensor`, also where several of its elements are one in memory."""
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            tensor, values = tensor.narrow(dimension, 0, 1), values.narrow(dimension, 0, 1)
    tensor.detach().copy_(values)


def share_buffers(network: nn.Module, worker: Worker) -> None:
    """Give all workers the buffers of rank 0, which are those that it saves; collective.

    Forward passes may have made buffers, or changed their shapes, on some workers only.
    """
    if worker.world_size == 1:
        return
    own = {name: local_tensor(buffer) for name, buffer in network.named_buffers()}
    saved = saved_buffers(network)
    described = [(name, b.shape, b.dtype, b.device.type, name in saved) for name, b in own.items()]
    wanted = worker.broadcast_from_rank_zero(described)
    for name in own.keys() - {name for name, *_ in wanted}:
        set_buffer(network, name, None)
    values = {}
    for name, shape, dtype, device, persistent in wanted:
        buffer = own.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (shape, dtype):
            place = worker.device if device == worker.device.type else device
            buffer = torch.empty(shape, dtype=dtype, device=place)
            set_buffer(network, name, buffer, persistent)
        values[name] = buffer
    contents = [as_bytes(value).to(worker.device) for value in values.values()]
    if not contents:
        return
    sent = torch.cat(contents)
    dist.broadcast(sent, src=0)
    parts = torch.split(sent, [len(content) for content in contents])
    for buffer, part in zip(values.values(), parts, strict=True):
        value = torch.empty(buffer.shape, dtype=buffer.dtype, device=part.device)
        as_bytes(value).copy_(part)
        fill(buffer, value)


def as_bytes(tensor: Tensor) -> Tensor:
    """The content of a tensor as bytes; a view of a tensor that is contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8)
