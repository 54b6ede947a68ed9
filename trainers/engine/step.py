"""One optimizer step: micro-batches forward and backward, then the update of the weights.

A step is a function of (spec, step, state): its samples, their augmentation, its learning rate
and the masks of its dropout modules are. Other random numbers that a model draws come from the
device's generator, seeded from (seed, step, rank, micro-batch).
"""

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.base.errors import TrainingError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.counter_rng import SampleRandom, combine_seeds, device_rng_state, seed_device
from trainers.engine.micro_batches import MicroBatches
from trainers.engine.out_of_memory import fits, is_out_of_memory, memory_advice
from trainers.engine.throughput import ThroughputMeter, measure_communication
from trainers.modeling.backward import sync_gradients_if
from trainers.modeling.build import build_model
from trainers.modeling.forward import Forward
from trainers.modeling.strategy import ParallelStrategy
from trainers.modeling.weight_update import WeightUpdate
from trainers.precision import compute_precision
from trainers.spec import RunSpec
from trainers.worker import Worker, local_tensor
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
        """Whether the model drew from the device's generator; None before the first step."""
        self._last_finite_loss = math.nan

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
    def skipped_steps(self) -> int:
        """Steps whose gradient was not finite, since this start; see `train.on_nonfinite`."""
        return self._update.skipped_steps

    def run(self, step: int) -> Tensor:
        """Do step `step`, counted from 0; collective.

        Returns this worker's part of the loss over the global batch, times the number of shares
        of the batch, as a scalar on its device; zero for a step that was skipped. Raises a
        TrainingError that says what would fit when memory runs out.
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
        loss = self._forward_backward(step)
        if not self._update.prepare(step):
            return torch.zeros_like(loss)
        if loss.device.type == "cpu":  # elsewhere it would wait for the device
            self._check_finite(loss.item(), step)
        self._update.apply()
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
        training was blocked. Collective.
        """
        began = time.monotonic()
        scalars = {**self._update.scalars(), **scalars}
        optimizer = self.optimizer
        checkpoints.save(done, self.network, optimizer, scalars, metrics, before_commit)
        self.meter.mark("checkpoint")
        return time.monotonic() - began

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

    def resume(self, checkpoints: Checkpoints) -> tuple[int, dict[str, float]]:
        """Load the latest checkpoint; returns its steps and its scalars. Collective."""
        done, scalars = checkpoints.resume(self.network, self.optimizer)
        self._update.load_scalars(scalars)
        self.meter.load_state_dict(scalars)
        self.meter.mark("start")
        return done, scalars

    def _forward_backward(self, step: int) -> Tensor:
        """Backward through all micro-batches of this worker's share; the loss, detached."""
        seed, hardware = self._spec.train.seed, self.worker.hardware
        batches, count = self._micro_batches.of_step(step), self._micro_batches.accumulation_steps
        losses = []
        for number in range(count):
            positions, batch = next(batches)
            self.meter.mark("data")
            random = SampleRandom(seed, positions)
            seed_device(hardware, combine_seeds(seed, step, self.worker.data_rank, number))
            state = device_rng_state(hardware) if self.uses_native_rng is None else None
            last = number == count - 1
            with (
                self._model.dropout_rng.seeded_by(random),
                sync_gradients_if(self._model.parallel, last),
            ):
                batch = self._workload.augment(batch, random)
                counted = self._micro_batches.counted(number)
                with self._model.counting_operations(step, number, len(positions)):
                    loss = self._loss(self._model.compiled, batch, counted)
                    self._model.backward(self._update.scaler.scale(loss), last)
            if state is not None:
                self.uses_native_rng = not state.equal(device_rng_state(hardware))
            losses.append(loss.detach())
            self.meter.mark("compute")
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _loss(self, model: nn.Module, batch: Batch, counted: int) -> Tensor:
        """The mean over the global batch of the first `counted` samples' losses, times the shares.

        Workers average their gradients; this makes each sample count the same.
        """
        samples = len(next(iter(batch.values())))
        with compute_precision(self._spec.train, self.worker.device):
            loss_B: Tensor = model(batch)
        check_per_sample("loss", loss_B, samples)
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

    def _check_finite(self, loss: float, step: int) -> None:
        """Raise a TrainingError that says where a loss that is not finite comes from."""
        if math.isfinite(loss):
            self._last_finite_loss = loss
            return
        bad = [
            name
            for name, p in self.network.named_parameters()
            if p.grad is not None and not torch.isfinite(local_tensor(p.grad)).all()
        ]
        where = f"; not finite: the gradients of {_listed(bad)}" if bad else ""
        raise TrainingError(
            f"the loss is {loss} at step {step + 1} (the last finite one was "
            f"{self._last_finite_loss:.6g}){where}"
        )


def _listed(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def check_per_sample(name: str, values: Tensor, samples: int) -> None:
    """Raise a TrainingError unless a workload's values are one per sample."""
    if values.shape != (samples,):
        raise TrainingError(
            f"the workload's {name} must have one value per sample, shape [{samples}] "
            f"(got {list(values.shape)})"
        )
