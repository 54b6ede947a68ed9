"""A training loop as people write it by hand; the other loops are compared with it."""

import contextlib
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from trainers import Batch, Workload
from trainers.worker import Worker


class Bare:
    """A network with fused AdamW and a learning rate schedule, on samples in random order."""

    def __init__(
        self,
        workload: Workload,
        split: Batch,
        global_batch: int,
        worker: Worker,
        rate: Callable[[int], float] = lambda step: 1.0,
        autocast: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.workload, self.split, self.worker, self.autocast = workload, split, worker, autocast
        self.batch_size = global_batch // worker.world_size
        self.network = self.model = workload.build().to(worker.device).train()
        if worker.world_size > 1:
            self.model = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
        if compiled:
            self.model = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=1e-3, weight_decay=0.0, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.order = torch.randperm(len(next(iter(split.values()))))

    def take(self, step: int) -> None:
        low = (step * self.worker.world_size + self.worker.rank) * self.batch_size
        low %= len(self.order) - self.batch_size + 1
        index = self.order[low : low + self.batch_size]
        batch = {
            name: column.index_select(0, index).to(self.worker.device, non_blocking=True)
            for name, column in self.split.items()
        }
        precision: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.autocast is not None:
            precision = torch.autocast(self.worker.device.type, self.autocast)
        with precision:
            loss_B = self.workload.loss(self.workload.forward(self.model, batch), batch)
        loss = loss_B.mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if step % 10 == 9:
            loss.item()
