"""One optimizer step: micro-batches forward and backward, precision, clipping, the update.

What a step does is a function of (spec, step, state): its samples, their augmentation and its
learning rate are, and what dropout draws is seeded from (seed, step, rank, micro-batch).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import TrainingError
from trainers.checkpoint import Checkpoints, load
from trainers.data import Batches, on_device
from trainers.memory import fits, is_out_of_memory, memory_advice
from trainers.optimize import build_optimizer, learning_rate, set_learning_rate
from trainers.parallel import Worker, compiled, compute_precision, distribute, weights_dtype
from trainers.random import SampleRandom, mix_seed, seed_device
from trainers.spec import RunSpec
from trainers.workloads.base import Batch, Workload


class Stepper:
    """What steps change: the network and the optimizer's state; and how they change it."""

    def __init__(
        self, spec: RunSpec, workload: Workload, batches: Batches, worker: Worker, total_steps: int
    ) -> None:
        """Builds the network anew, the same on every worker; collective."""
        self._spec, self._workload = spec, workload
        self._batches, self._worker, self._total_steps = batches, worker, total_steps
        self._dtype = weights_dtype(spec.train)
        seed_device(torch.device("cpu"), mix_seed(spec.train.seed))
        self.network: nn.Module = workload.build().to(worker.device, self._dtype)
        self.optimizer = build_optimizer(spec.optimizer, self.network)
        self.scaler = torch.amp.GradScaler(
            worker.device.type, enabled=spec.train.precision == "fp16"
        )
        self._distributed = distribute(self.network, spec.scale, worker)
        self._model = compiled(self._distributed, spec.train)
        self.skipped = 0
        """Steps whose gradient was not finite, since this start; see `train.on_nonfinite`."""
        self._last_finite = math.nan

    def take(self, step: int) -> Tensor:
        """Do step `step`, counted from 0; collective.

        Returns this worker's part of the loss over the global batch, times the number of
        workers, as a scalar on its device; zero for a step that was skipped. Raises a
        TrainingError that says what would fit when memory runs out.
        """
        try:
            return self._take(step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out here the error is gone, and with it the tensors that its frames hold.
        raise TrainingError(self._memory_advice(step))

    def _take(self, step: int) -> Tensor:
        train = self._spec.train
        loss = self._gradients(step)
        set_learning_rate(
            self.optimizer, learning_rate(self._spec.optimizer, step, self._total_steps)
        )
        if train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), train.clip_norm)
        if train.on_nonfinite == "skip" and not self._finite_gradient():
            self.skipped += 1
            self.optimizer.zero_grad(set_to_none=True)
            return torch.zeros_like(loss)
        if loss.device.type == "cpu":  # elsewhere it would wait for the device
            self._check_finite(loss.item(), step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def save(self, checkpoints: Checkpoints, done: int, before_commit: Callable[[], None]) -> None:
        """Save the state after `done` steps; see `Checkpoints.save`."""
        numbers = self.scaler.state_dict()
        checkpoints.save(done, self.network, self.optimizer, numbers, before_commit)

    def load(self, checkpoint: Path) -> int:
        """Go on from a checkpoint; returns the steps it has done."""
        done, numbers = load(checkpoint, self.network, self.optimizer)
        if self.scaler.is_enabled() and numbers:
            self.scaler.load_state_dict(numbers)
        return done

    def _gradients(self, step: int) -> Tensor:
        """Backward through all micro-batches of this worker's share; the loss, detached."""
        spec, worker = self._spec, self._worker
        positions, share = self._batches.at(step)
        size = spec.train.micro_batch or len(positions)
        starts = range(0, len(positions), size)
        total = torch.zeros((), dtype=self._dtype, device=worker.device)
        for micro, low in enumerate(starts):
            part = slice(low, low + size)
            batch = {name: values[part] for name, values in share.items()}
            batch = on_device(batch, worker.device, self._dtype)
            random = SampleRandom(spec.train.seed, positions[part].to(worker.device))
            seed_device(worker.device, mix_seed(spec.train.seed, step, worker.rank, micro))
            with self._reduced_when(low == starts[-1]):
                loss = self._loss(self._model, self._workload.augment(batch, random))
                torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
        return total

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the global batch of these samples' losses, times the number of workers.

        Workers average their gradients; this makes each sample count the same.
        """
        samples = len(next(iter(batch.values())))
        with compute_precision(self._spec.train, self._worker.device):
            loss_B = self._workload.loss(self._workload.forward(model, batch), batch)
        check_per_sample("loss", loss_B, samples)
        return loss_B.sum() * (self._worker.world / self._spec.train.global_batch)

    @contextlib.contextmanager
    def _reduced_when(self, last: bool) -> Iterator[None]:
        """Workers exchange gradients once a step, with the last micro-batch."""
        if last or not isinstance(self._distributed, DistributedDataParallel):
            yield
            return
        with self._distributed.no_sync():
            yield

    def _memory_advice(self, step: int) -> str:
        """Why step `step` ran out of memory, and what to change; the state is of no use after."""
        share = len(self._batches.at(step)[0])
        size = min(self._spec.train.micro_batch or share, share)
        sharded = any(isinstance(weight, DTensor) for weight in self.network.parameters())

        def these_fit(samples: int) -> bool:
            stateless = not self.optimizer.state
            try:
                return fits(lambda: self._try(step, samples))
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                if stateless:
                    self.optimizer.state.clear()

        these = None if sharded else these_fit
        self.optimizer.zero_grad(set_to_none=True)
        return memory_advice(self._worker.device, size, share, these)

    def _try(self, step: int, samples: int) -> None:
        """What a step does with a micro-batch of `samples`, on this worker alone.

        Done twice: what counts is the second time, beside the gradients and the optimizer's state.
        """
        positions, share = self._batches.at(step)
        batch = {name: values[:samples] for name, values in share.items()}
        batch = on_device(batch, self._worker.device, self._dtype)
        random = SampleRandom(self._spec.train.seed, positions[:samples].to(self._worker.device))
        for _ in range(2):
            loss = self._loss(self.network, self._workload.augment(dict(batch), random))
            torch.autograd.backward(loss)
            self.optimizer.step()

    def _finite_gradient(self) -> bool:
        """Whether all gradients are finite; they are the same on every worker, so is the answer."""
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        return bool(torch.isfinite(nn.utils.get_total_norm(gradients)).item())

    def _check_finite(self, loss: float, step: int) -> None:
        """Raise a TrainingError that says where a loss that is no number comes from."""
        if math.isfinite(loss):
            self._last_finite = loss
            return
        bad = [
            name
            for name, p in self.network.named_parameters()
            if p.grad is not None and not torch.isfinite(p.grad).all()
        ]
        where = f"; not finite: the gradients of {', '.join(bad[:3])}" if bad else ""
        where += f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise TrainingError(
            f"the loss is {loss} at step {step + 1} (the last finite one was "
            f"{self._last_finite:.6g}){where}"
        )


def check_per_sample(name: str, values: Tensor, samples: int) -> None:
    """Raise a TrainingError unless a workload's values are one per sample."""
    if values.shape != (samples,):
        raise TrainingError(
            f"the workload's {name} must have one value per sample, shape [{samples}] "
            f"(got {list(values.shape)})"
        )
