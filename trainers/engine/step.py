"""One optimizer step: micro-batches forward and backward, then the update of the weights.

A step is a function of (spec, step, state): its samples, their augmentation, its learning rate
and the masks of its dropout modules are. Other random numbers that a model draws come from the
device's generator, seeded from (seed, step, rank, micro-batch).
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.base.errors import TrainingError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checks.finite import listed, not_finite, state_not_finite
from trainers.checks.returned_values import (
    check_augmented,
    check_dense_gradients,
    check_differentiable,
    check_loss,
)
from trainers.counter_rng import (
    SampleRandom,
    combine_seeds,
    device_rng_state,
    host_rng_state,
    seed_device,
    seed_host,
)
from trainers.engine.micro_batches import MicroBatches
from trainers.engine.out_of_memory import fits, is_out_of_memory, memory_advice
from trainers.engine.throughput import ThroughputMeter, measure_communication
from trainers.modeling.backward import sync_gradients_if
from trainers.modeling.build import build_model
from trainers.modeling.forward import Forward
from trainers.modeling.model_inputs import mixed_dtypes
from trainers.modeling.strategy import ParallelStrategy
from trainers.modeling.weight_update import WeightUpdate
from trainers.precision import compute_precision
from trainers.spec import RunSpec
from trainers.worker import Worker
from trainers.workload import Batch, Workload


class TrainStep:
    """The model that one worker trains, and the steps that change it."""

    def __init__(
        self,
        spec: RunSpec,
        workload: Workload,
        samples: Batch,
        worker: Worker,
        total_steps: int,
        started: float | None = None,
    ) -> None:
        """Build the model, the same on every worker, and spread it over them; collective.

        `samples` is the whole training split, `started` the time of the command (Unix time).
        Raises SpecError where the worker's device cannot do what the spec asks for.
        """
        self._spec, self._workload = spec, workload
        self.meter = ThroughputMeter(
            spec.train.global_batch,
            tokens=workload.tokens_per_sample,
            device=worker.hardware,
            world=worker.world_size,
            started=started,
        )
        self._model = build_model(spec, workload, samples, worker)
        if isinstance(self._model.parallel, DistributedDataParallel):
            measure_communication(self._model.parallel, self.meter)
        self.worker = worker = self._model.worker
        self._update = WeightUpdate(spec, self.network, worker.device, total_steps)
        self._micro_batches = MicroBatches(samples, spec.train, worker, total_steps)
        self.uses_native_rng: bool | None = None
        """Whether the model drew from a generator of the process; None before the first step."""
        self.fault = torch.zeros(())
        """1 if the last step was left out since its loss or gradient is not finite, otherwise 0; of
        a sharded model, on some worker. A scalar on the device."""
        stops = spec.train.on_nonfinite == "stop"
        # Elsewhere a step would wait for the device, or one worker would stop without the others.
        self._stops_at_once = stops and self._update.on_host and self._update.alike
        self._last_loss = torch.tensor(math.nan)
        self._uses_host_rng = self._draws_reported = False
        self._checked_after = -1

    @property
    def network(self) -> nn.Module:
        """The workload's network; its weights are this worker's part of them."""
        return self._model.network

    @property
    def forward(self) -> Forward:
        """The workload's forward pass with the network, for an evaluation on all workers."""
        return self._model.forward

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._update.optimizer

    @property
    def strategy(self) -> ParallelStrategy:
        return self._model.strategy

    @property
    def samples_at_once(self) -> int:
        """Samples of a forward pass of this worker."""
        return self._micro_batches.largest

    def run(self, step: int) -> Tensor:
        """Do step `step`, counted from 0; collective.

        Returns this worker's part of the loss over the global batch, times the number of shares
        of the batch, as a scalar on its device. A step whose loss or gradient is not finite
        changes nothing: see `fault`. On a CPU such a step raises a TrainingError if
        `train.on_nonfinite` is stop. Raises one that says what would fit when memory runs out.
        """
        try:
            loss = self._run(step)
            self.meter.mark("compute")
            self.meter.count_step()
            return loss
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Out here the error is gone, and with it the tensors that its frames hold.
        raise TrainingError(self._memory_advice(step))

    def _run(self, step: int) -> Tensor:
        update = self._update
        update.begin()
        loss = self._forward_backward(step)
        # Several workers decide by the gradient alone, which is the same on all of them.
        fault = update.prepare(step, loss if self.worker.world_size == 1 else None)
        if self._stops_at_once and fault.item():
            self._stop(loss, step)
        self.fault = update.apply(loss, fault)
        self._last_loss = loss
        return loss

    def save(
        self,
        checkpoints: Checkpoints,
        done: int,
        scalars: Mapping[str, float],
        metrics: Mapping[str, float],
        before_commit: Callable[[], None],
    ) -> float:
        """Save the state after `done` steps, see `Checkpoints.save`; returns the seconds that
        training was blocked. Raises TrainingError for a state that is not finite. Collective.
        """
        began = time.monotonic()
        self.check_state(done)
        scalars = {**self._update.scalars(), "host_rng": float(self._uses_host_rng), **scalars}
        optimizer = self.optimizer
        checkpoints.save(done, self.network, optimizer, scalars, metrics, before_commit)
        self.meter.mark("checkpoint")
        return time.monotonic() - began

    def check_state(self, done: int) -> None:
        """Raise a TrainingError if training has made weights or buffers not finite. Collective.

        To be called before the state is evaluated; waits for the device.
        """
        if self._checked_after == done:
            return
        self._checked_after = done
        bad = self._update.state_not_finite()
        count = torch.tensor(float(len(bad)), device=self.worker.device)
        if self.worker.all_reduce_sum(count).item():
            raise TrainingError(state_not_finite(bad or ["weights of another worker"], done))

    def read_meter(self) -> dict[str, float]:
        """Where the time of the steps since the last report went; see `ThroughputMeter.read`.

        The model's FLOPs are those of the run's first step, see `OperationCounter`.
        """
        if self.meter.flops is None:
            self.meter.flops = self._model.operations.per_sample
        return self.meter.read()

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return self._update.learning_rate(step)

    def resume(
        self, checkpoints: Checkpoints, changed_at: int | None = None
    ) -> tuple[int, dict[str, float]]:
        """Load the latest checkpoint; returns its steps and its scalars. Collective.

        After `changed_at` steps the spec has changed to that of this object.
        """
        network, optimizer = self.network, self.optimizer
        done, scalars = checkpoints.resume(network, optimizer, self._workload, changed_at)
        self._update.load_scalars(scalars)
        self._uses_host_rng = bool(scalars.get("host_rng", 0.0))
        self.meter.load_state_dict(scalars)
        self.meter.mark("start")
        return done, scalars

    def _forward_backward(self, step: int) -> Tensor:
        """Backward through all micro-batches of this worker's share; the loss, detached."""
        seed, hardware = self._spec.train.seed, self.worker.hardware
        first = self.uses_native_rng is None
        watches = first or step & (step - 1) == 0  # steps that are powers of two
        batches, count = self._micro_batches.of_step(step), self._micro_batches.accumulation_steps
        losses = []
        for number in range(count):
            positions, batch = next(batches)
            self.meter.mark("data")
            random = SampleRandom(seed, positions)
            drawn = combine_seeds(seed, step, self.worker.data_rank, number)
            seed_device(hardware, drawn)
            if watches or self._uses_host_rng:
                seed_host(drawn)
            before = self._rng_states() if watches and number == 0 else None
            last = number == count - 1
            with (
                self._model.dropout_rng.seeded_by(random),
                sync_gradients_if(self._model.parallel, last),
            ):
                batch = self._workload.augment(batch, random)
                check_augmented(self._workload, batch, len(positions))
                counted = self._micro_batches.counted(number)
                with self._model.counting_operations(step, number, len(positions)):
                    loss = self._loss(self._model.compiled, batch, counted)
                    check_differentiable(self._workload, loss)
                    whole = self._update.scaler.scale(loss)
                    if self.worker.world_size > 1:
                        # By 1, or NaN: all workers find in their gradient that one's loss is bad.
                        whole = whole * (loss.detach() * 0 + 1)
                    self._model.backward(whole, last)
            if before is not None:
                self._notice_draws(before)
            losses.append(loss.detach())
            self.meter.mark("compute")
        if first:
            check_dense_gradients(self._workload, self.network)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def draws_unreported(self) -> bool:
        """Whether the model's own random numbers have been noticed; True once."""
        news = bool(self.uses_native_rng) and not self._draws_reported
        self._draws_reported |= news
        return news

    def _rng_states(self) -> tuple[Tensor, tuple[Any, ...]]:
        return device_rng_state(self.worker.hardware), host_rng_state()

    def _notice_draws(self, before: tuple[Tensor, tuple[Any, ...]]) -> None:
        """Notice random numbers of the model's own, by what has happened to the generators.

        Python's and numpy's are seeded in each step only where they are used: it takes as long as
        several kernels.
        """
        device, host = self._rng_states()
        self._uses_host_rng |= host != before[1]
        own = self._uses_host_rng or not device.equal(before[0])
        self.uses_native_rng = bool(self.uses_native_rng) or own

    def _loss(self, model: nn.Module, batch: Batch, counted: int) -> Tensor:
        """The mean over the global batch of the first `counted` samples' losses, times the shares.

        Workers average their gradients; this makes each sample count the same.
        """
        samples = len(next(iter(batch.values())))
        with compute_precision(self._spec.train, self.worker.device), mixed_dtypes(self.network):
            loss_B: Tensor = model(batch)
        check_loss(self._workload, loss_B, samples)
        share = counted * self.worker.data_world_size / self._spec.train.global_batch
        mean: Tensor = (
            loss_B if counted == samples else loss_B[:counted].sum() / max(1, counted)
        ).mean()
        return mean if share == 1 else mean * share

    def _memory_advice(self, step: int) -> str:
        """Why step `step` ran out of memory, and what to change; the state is of no use after."""
        optimizer = self.optimizer
        sharded = self.strategy.mode not in ("single", "ddp")

        def these_fit(samples: int) -> bool:
            stateless = not optimizer.state
            try:
                return fits(lambda: self._try_micro_batch(step, samples))
            finally:
                optimizer.zero_grad(set_to_none=True)
                if stateless:
                    optimizer.state.clear()

        batches = self._micro_batches
        optimizer.zero_grad(set_to_none=True)
        return memory_advice(
            self.worker.device,
            batches.largest,
            batches.local_batch,
            None if sharded else these_fit,
        )

    def _try_micro_batch(self, step: int, samples: int) -> None:
        """Do what a step does with a micro-batch of `samples`, on this worker alone.

        Done twice: what counts is the second time, beside the gradients and the optimizer's state.
        """
        positions, batch = self._micro_batches.first_of(step, samples)
        random = SampleRandom(self._spec.train.seed, positions)
        for _ in range(2):
            loss = self._loss(self.forward, self._workload.augment(dict(batch), random), samples)
            torch.autograd.backward(loss)
            self.optimizer.step()

    def _stop(self, loss: Tensor, step: int) -> None:
        """Raise a TrainingError that says where a gradient that is not finite comes from.

        Not if it is one of too large a scale of fp16.
        """
        if self._update.searches_scale(loss):
            return
        bad = self._update.gradients_not_finite()
        where = f"; not finite: the gradients of {listed(bad)}" if bad else ""
        line = not_finite(loss.item(), step + 1, self._last_loss.item())
        raise TrainingError(f"{line}{where}")
