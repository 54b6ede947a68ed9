"""One optimizer step: micro-batches forward and backward, precision, clipping, the update.

What a step does is a function of (spec, step, state): its samples, their augmentation and its
learning rate are, and so are the masks of its dropout modules. What else a model draws comes
from the device's generator, seeded from (seed, step, rank, micro-batch).
"""

import math
from collections.abc import Callable, Generator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.base.errors import TrainingError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.shards import own_part
from trainers.counter_rng import SampleRandom, device_state, mix_seed, seed_device
from trainers.data.dataset import Batches, on_device
from trainers.data.prefetch import Fed, feed, micro
from trainers.devices import Cpu
from trainers.engine.activation_checkpointing import recompute
from trainers.engine.dropout import sample_dropout
from trainers.engine.optimizer import build_optimizer, learning_rate, set_learning_rate
from trainers.engine.out_of_memory import fits, is_out_of_memory, memory_advice
from trainers.engine.strategy import (
    choose_layout,
    clip_gradient,
    compiled,
    exchanged_when,
    gradient_norm,
    memory_per_worker,
    spread,
)
from trainers.engine.throughput import Meter, count_flops, watch_communication
from trainers.precision import check_precision, compute_precision, fp8_layers, weights_dtype
from trainers.spec import RunSpec, TrainSpec
from trainers.worker import Worker
from trainers.workload import Batch, Workload


def build_network(train: TrainSpec, workload: Workload) -> nn.Module:
    """The workload's network anew, on the CPU, the same for the same seed; not collective."""
    seed_device(Cpu(), mix_seed(train.seed))
    network = workload.build().to(weights_dtype(train))
    if train.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


class Stepper:
    """What steps change: the network and the optimizer's state; and how they change it."""

    def __init__(
        self,
        spec: RunSpec,
        workload: Workload,
        samples: Batch,
        worker: Worker,
        total_steps: int,
        started: float | None = None,
    ) -> None:
        """Builds the network anew, the same on every worker, and spreads it; collective.

        `samples` is the whole training split, `started` when the command was given (Unix time).
        Raises SpecError where the worker's hardware cannot do what the spec asks for.
        """
        check_precision(spec.train.precision, worker.hardware)
        self._spec, self._workload, self._total_steps = spec, workload, total_steps
        self._dtype = weights_dtype(spec.train)
        self.network = build_network(spec.train, workload)
        self._draws = sample_dropout(self.network)
        self.meter = Meter(
            spec.train.global_batch,
            tokens=workload.tokens_per_sample,
            flops=count_flops(workload, self.network, _few(samples)),
            device=worker.hardware,
            world=worker.world,
            started=started,
        )
        if spec.train.precision == "fp8":
            self.network = fp8_layers(self.network)
        blocks = workload.blocks(self.network)
        if spec.train.activation_checkpointing:
            recompute(blocks, self._draws, compiled=spec.train.compile != "off")
        self.layout = choose_layout(spec, workload, self.network, worker, memory_per_worker(worker))
        self.worker = worker = self.layout.applied_to(worker)
        self._spread = spread(self.network, spec, workload, self.layout, worker)
        if isinstance(self._spread, DistributedDataParallel):
            watch_communication(self._spread, self.meter)
        self._model = compiled(self._spread, spec.train, blocks)
        self.optimizer = build_optimizer(spec.optimizer, self.network)
        self.scaler = torch.amp.GradScaler(
            worker.device.type, enabled=spec.train.precision == "fp16"
        )
        batch, shares = spec.train.global_batch, worker.data_world
        self._batches = Batches(samples, spec.train.seed, batch, worker.data_rank, shares)
        self._share = len(self._batches.places(0)[0])
        largest = math.ceil(batch / shares)
        self._rounds = math.ceil(largest / (spec.train.micro_batch or largest))
        self._fed_step = -1
        self.skipped = 0
        """Steps whose gradient was not finite, since this start; see `train.on_nonfinite`."""
        self.draws_natively: bool | None = None
        """Whether the model drew from the device's generator; None before the first step."""
        self._last_finite = math.nan

    def take(self, step: int) -> Tensor:
        """Do step `step`, counted from 0; collective.

        Returns this worker's part of the loss over the global batch, times the number of shares
        of the batch, as a scalar on its device; zero for a step that was skipped. Raises a
        TrainingError that says what would fit when memory runs out.
        """
        try:
            loss = self._take(step)
            self.meter.mark("compute")
            self.meter.step()
            return loss
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
            clip_gradient(self.network, train.clip_norm)
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

    def save(
        self,
        checkpoints: Checkpoints,
        done: int,
        numbers: Mapping[str, float],
        metrics: Mapping[str, float],
        before_commit: Callable[[], None],
    ) -> None:
        """Save the state after `done` steps; see `Checkpoints.save`. Collective."""
        numbers = {**self.scaler.state_dict(), **numbers}
        checkpoints.save(done, self.network, self.optimizer, numbers, metrics, before_commit)
        self.meter.mark("checkpoint")

    def resume(self, checkpoints: Checkpoints) -> tuple[int, dict[str, float]]:
        """Go on from the newest checkpoint; the steps it has done, and its numbers. Collective."""
        done, numbers = checkpoints.resume(self.network, self.optimizer)
        if self.scaler.is_enabled() and numbers:
            self.scaler.load_state_dict({k: numbers[k] for k in self.scaler.state_dict()})
        self.meter.load(numbers)
        return done, numbers

    def _gradients(self, step: int) -> Tensor:
        """Backward through all micro-batches of this worker's share; the loss, detached."""
        if step != self._fed_step:  # the first one, or one out of turn
            self._fed = self._feed_from(step)
        self._fed_step = step + 1
        losses = []
        for number in range(self._rounds):
            positions, batch = next(self._fed)
            self.meter.mark("data")
            _, counted = micro(self._share, number, self._rounds)
            random = SampleRandom(self._spec.train.seed, positions)
            part = (step, self.worker.data_rank, number)
            seed_device(self.worker.hardware, mix_seed(self._spec.train.seed, *part))
            state = device_state(self.worker.hardware) if self.draws_natively is None else None
            last = number == self._rounds - 1
            with self._draws.of(random), exchanged_when(self._spread, last):
                loss = self._loss(self._model, self._workload.augment(batch, random), counted)
                torch.autograd.backward(self.scaler.scale(loss))
            if state is not None:
                self.draws_natively = not state.equal(device_state(self.worker.hardware))
            losses.append(loss.detach())
            self.meter.mark("compute")
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _feed_from(self, step: int) -> Generator[Fed]:
        device, dtype = self.worker.device, self._dtype
        return feed(self._batches, device, dtype, step, self._total_steps, self._rounds)

    def _loss(self, model: nn.Module, batch: Batch, counted: int) -> Tensor:
        """The mean over the global batch of the first `counted` samples' losses, times the shares.

        Workers average their gradients; this makes each sample count the same.
        """
        samples = len(next(iter(batch.values())))
        with compute_precision(self._spec.train, self.worker.device):
            loss_B = self._workload.loss(self._workload.forward(model, batch), batch)
        check_per_sample("loss", loss_B, samples)
        share = counted * self.worker.data_world / self._spec.train.global_batch
        mean = (loss_B if counted == samples else loss_B[:counted].sum() / max(1, counted)).mean()
        return mean if share == 1 else mean * share

    def _memory_advice(self, step: int) -> str:
        """Why step `step` ran out of memory, and what to change; the state is of no use after."""
        size = math.ceil(self._share / self._rounds)
        sharded = self.layout.mode not in ("single", "ddp")

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
        return memory_advice(self.worker.device, size, self._share, these)

    def _try(self, step: int, samples: int) -> None:
        """What a step does with a micro-batch of `samples`, on this worker alone.

        Done twice: what counts is the second time, beside the gradients and the optimizer's state.
        """
        device = self.worker.device
        positions, index = (values[:samples] for values in self._batches.places(step))
        batch = on_device(self._batches.gather(index), device, self._dtype)
        random = SampleRandom(self._spec.train.seed, positions.to(device))
        for _ in range(2):
            loss = self._loss(self.network, self._workload.augment(dict(batch), random), samples)
            torch.autograd.backward(loss)
            self.optimizer.step()

    def _finite_gradient(self) -> bool:
        """Whether all gradients are finite; they are the same on every worker, so is the answer."""
        return bool(torch.isfinite(gradient_norm(self.network)).item())

    def _check_finite(self, loss: float, step: int) -> None:
        """Raise a TrainingError that says where a loss that is no number comes from."""
        if math.isfinite(loss):
            self._last_finite = loss
            return
        bad = [
            name
            for name, p in self.network.named_parameters()
            if p.grad is not None and not torch.isfinite(own_part(p.grad)).all()
        ]
        where = f"; not finite: the gradients of {', '.join(bad[:3])}" if bad else ""
        where += f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise TrainingError(
            f"the loss is {loss} at step {step + 1} (the last finite one was "
            f"{self._last_finite:.6g}){where}"
        )


def _few(samples: Batch) -> Batch:
    """Enough of a split to run a model on, also where samples are normalised together."""
    return {name: values[:2] for name, values in samples.items()}


def check_per_sample(name: str, values: Tensor, samples: int) -> None:
    """Raise a TrainingError unless a workload's values are one per sample."""
    if values.shape != (samples,):
        raise TrainingError(
            f"the workload's {name} must have one value per sample, shape [{samples}] "
            f"(got {list(values.shape)})"
        )
