"""The forward pass of a workload as one module, and the blocks that it is made of.

Replicas, shards, compilation and evaluation all wrap or call this module. So a workload may call
the model several times, or methods of its own, and may return any output: what these see is one
call, with a batch in and the losses out.
"""

from typing import Any

from torch import nn

from cluster.base.errors import TrainingError
from trainers.torch_internals import is_shard_taken_for_whole
from trainers.workload import Batch, Workload


class Forward(nn.Module):
    """`workload.forward` and `workload.loss`, with the network as the only part.

    Checkpoints are made of `network`, so that names in them are the network's own.
    """

    def __init__(self, workload: Workload, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._workload = workload
        self.begins_step = True
        """Whether the next training pass is the first one of a step, on a sharded model."""

    def forward(self, batch: Batch, with_loss: bool = True) -> Any:
        """The loss of each sample [B]; without the loss, the workload's output."""
        try:
            output = self._workload.forward(self.network, batch)
            return self._workload.loss(output, batch) if with_loss else output
        except RuntimeError as error:
            if not is_shard_taken_for_whole(error):
                raise
            raise TrainingError(
                "scale.parallel: the workload's forward uses a weight of a block without calling "
                "the block or a part of it, where weights are sharded; use ddp, or leave the "
                "block out of the workload's method blocks"
            ) from error


def outermost_blocks(workload: Workload, network: nn.Module) -> list[nn.Module]:
    """The blocks of the workload that can be called, each once; none is a part of another one.

    Lists and dictionaries of modules stand for their members.
    """
    blocks: dict[nn.Module, None] = {}
    pending = list(workload.blocks(network))[::-1]
    while pending:
        block = pending.pop()
        if type(block).forward is nn.Module.forward:  # a container
            pending.extend([*block.children()][::-1])
        else:
            blocks[block] = None
    inner = {part for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if block not in inner]


def separate_blocks(blocks: list[nn.Module], network: nn.Module) -> list[nn.Module]:
    """Those of the blocks whose parameters no other part of the network shares.

    Shared parameters can be gathered only with everything that uses them.
    """
    owner: dict[nn.Parameter, nn.Module | None] = {}
    shared: set[nn.Module | None] = set()
    of_part = {part: block for block in blocks for part in block.modules()}
    for module in network.modules():
        block = of_part.get(module)
        for weight in module.parameters(recurse=False):
            if owner.setdefault(weight, block) is not block:
                shared |= {block, owner[weight]}
    return [block for block in blocks if block not in shared]
