"""Buffers, such as running means, made the same on all workers."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.network import fill, saved_buffers, set_buffer
from trainers.worker import Worker, local_tensor


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
    contents = [_bytes(value).to(worker.device) for value in values.values()]
    if not contents:
        return
    sent = torch.cat(contents)
    dist.broadcast(sent, src=0)
    parts = sent.split([len(content) for content in contents])
    for buffer, part in zip(values.values(), parts, strict=True):
        value = torch.empty(buffer.shape, dtype=buffer.dtype, device=part.device)
        _bytes(value).copy_(part)
        fill(buffer, value)


def _bytes(tensor: Tensor) -> Tensor:
    """The content of a tensor as bytes; a view of a tensor that is contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8)
