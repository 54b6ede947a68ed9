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
from trainers.checkpoints.shards import local_tensor
from trainers.counter_rng import SampleRandom, combine_seeds, device_rng_state, seed_device
from trainers.data.prefetch import PlacedBatch, microbatch_slice, prefetch_batches
from trainers.data.sampling import SampleStream, to_device
from trainers.devices import Cpu
from trainers.engine.activation_checkpointing import checkpoint_activations
from trainers.engine.dropout import key_dropout_by_sample
from trainers.engine.optimizer import build_optimizer, learning_rate, set_learning_rate
from trainers.engine.out_of_memory import fits, is_out_of_memory, memory_advice
from trainers.engine.strategy import (
    choose_strategy,
    clip_gradients,
    compile_model,
    gradient_norm,
    memory_per_worker,
    parallelize,
    sync_gradients_if,
)
from trainers.engine.throughput import ThroughputMeter, count_flops, measure_communication
from trainers.precision import check_precision, compute_precision, convert_to_fp8, weights_dtype
from trainers.spec import RunSpec, TrainSpec
from trainers.worker import Worker
from trainers.workload import Batch, Workload


def build_network(train: TrainSpec, workload: Workload) -> nn.Module:
    """The workload's network anew, on the CPU, the same for the same seed; not collective."""
    seed_device(Cpu(), combine_seeds(train.seed))
    network = workload.build().to(weights_dtype(train))
    if train.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


class TrainStep:
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
        self._dropout_rng = key_dropout_by_sample(self.network)
        self.meter = ThroughputMeter(
            spec.train.global_batch,
            tokens=workload.tokens_per_sample,
            flops=count_flops(workload, self.network, _first_samples(samples)),
            device=worker.hardware,
            world=worker.world_size,
            started=started,
        )
        if spec.train.precision == "fp8":
            self.network = convert_to_fp8(self.network)
        blocks = workload.blocks(self.network)
        if spec.train.activation_checkpointing:
            checkpoint_activations(blocks, self._dropout_rng, compiled=spec.train.compile != "off")
        self.strategy = choose_strategy(
            spec, workload, self.network, worker, memory_per_worker(worker)
        )
        self.worker = worker = self.strategy.applied_to(worker)
        self._parallel_model = parallelize(self.network, spec, workload, self.strategy, worker)
        if isinstance(self._parallel_model, DistributedDataParallel):
            measure_communication(self._parallel_model, self.meter)
        self._model = compile_model(self._parallel_model, spec.train, blocks)
        self.optimizer = build_optimizer(spec.optimizer, self.network)
        self.scaler = torch.amp.GradScaler(
            worker.device.type, enabled=spec.train.precision == "fp16"
        )
        batch, shares = spec.train.global_batch, worker.data_world_size
        self._stream = SampleStream(samples, spec.train.seed, batch, worker.data_rank, shares)
        self._local_batch = len(self._stream.positions_and_indices(0)[0])
        largest = math.ceil(batch / shares)
        self._accumulation_steps = math.ceil(largest / (spec.train.micro_batch or largest))
        self._prefetched_step = -1
        self.skipped_steps = 0
        """Steps whose gradient was not finite, since this start; see `train.on_nonfinite`."""
        self.uses_native_rng: bool | None = None
        """Whether the model drew from the device's generator; None before the first step."""
        self._last_finite_loss = math.nan

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
        train = self._spec.train
        loss = self._forward_backward(step)
        set_learning_rate(
            self.optimizer, learning_rate(self._spec.optimizer, step, self._total_steps)
        )
        if train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            clip_gradients(self.network, train.clip_norm)
        if train.on_nonfinite == "skip" and not self._gradients_finite():
            self.skipped_steps += 1
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
        scalars: Mapping[str, float],
        metrics: Mapping[str, float],
        before_commit: Callable[[], None],
    ) -> None:
        """Save the state after `done` steps; see `Checkpoints.save`. Collective."""
        scalars = {**self.scaler.state_dict(), **scalars}
        checkpoints.save(done, self.network, self.optimizer, scalars, metrics, before_commit)
        self.meter.mark("checkpoint")

    def resume(self, checkpoints: Checkpoints) -> tuple[int, dict[str, float]]:
        """Go on from the newest checkpoint; the steps it has done, and its numbers. Collective."""
        done, numbers = checkpoints.resume(self.network, self.optimizer)
        if self.scaler.is_enabled() and numbers:
            self.scaler.load_state_dict({k: numbers[k] for k in self.scaler.state_dict()})
        self.meter.load_state_dict(numbers)
        return done, numbers

    def _forward_backward(self, step: int) -> Tensor:
        """Backward through all micro-batches of this worker's share; the loss, detached."""
        if step != self._prefetched_step:  # the first one, or one out of turn
            self._prefetched = self._prefetch_from(step)
        self._prefetched_step = step + 1
        losses = []
        for number in range(self._accumulation_steps):
            positions, batch = next(self._prefetched)
            self.meter.mark("data")
            _, counted = microbatch_slice(self._local_batch, number, self._accumulation_steps)
            random = SampleRandom(self._spec.train.seed, positions)
            part = (step, self.worker.data_rank, number)
            seed_device(self.worker.hardware, combine_seeds(self._spec.train.seed, *part))
            state = device_rng_state(self.worker.hardware) if self.uses_native_rng is None else None
            last = number == self._accumulation_steps - 1
            with self._dropout_rng.seeded_by(random), sync_gradients_if(self._parallel_model, last):
                loss = self._loss(self._model, self._workload.augment(batch, random), counted)
                torch.autograd.backward(self.scaler.scale(loss))
            if state is not None:
                self.uses_native_rng = not state.equal(device_rng_state(self.worker.hardware))
            losses.append(loss.detach())
            self.meter.mark("compute")
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _prefetch_from(self, step: int) -> Generator[PlacedBatch]:
        device, dtype = self.worker.device, self._dtype
        return prefetch_batches(
            self._stream, device, dtype, step, self._total_steps, self._accumulation_steps
        )

    def _loss(self, model: nn.Module, batch: Batch, counted: int) -> Tensor:
        """The mean over the global batch of the first `counted` samples' losses, times the shares.

        Workers average their gradients; this makes each sample count the same.
        """
        samples = len(next(iter(batch.values())))
        with compute_precision(self._spec.train, self.worker.device):
            loss_B = self._workload.loss(self._workload.forward(model, batch), batch)
        check_per_sample("loss", loss_B, samples)
        share = counted * self.worker.data_world_size / self._spec.train.global_batch
        mean = (loss_B if counted == samples else loss_B[:counted].sum() / max(1, counted)).mean()
        return mean if share == 1 else mean * share

    def _memory_advice(self, step: int) -> str:
        """Why step `step` ran out of memory, and what to change; the state is of no use after."""
        size = math.ceil(self._local_batch / self._accumulation_steps)
        sharded = self.strategy.mode not in ("single", "ddp")

        def these_fit(samples: int) -> bool:
            stateless = not self.optimizer.state
            try:
                return fits(lambda: self._try_micro_batch(step, samples))
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                if stateless:
                    self.optimizer.state.clear()

        these = None if sharded else these_fit
        self.optimizer.zero_grad(set_to_none=True)
        return memory_advice(self.worker.device, size, self._local_batch, these)

    def _try_micro_batch(self, step: int, samples: int) -> None:
        """What a step does with a micro-batch of `samples`, on this worker alone.

        Done twice: what counts is the second time, beside the gradients and the optimizer's state.
        """
        device = self.worker.device
        positions, index = (values[:samples] for values in self._stream.positions_and_indices(step))
        batch = to_device(self._stream.gather(index), device, self._dtype)
        random = SampleRandom(self._spec.train.seed, positions.to(device))
        for _ in range(2):
            loss = self._loss(self.network, self._workload.augment(dict(batch), random), samples)
            torch.autograd.backward(loss)
            self.optimizer.step()

    def _gradients_finite(self) -> bool:
        """Whether all gradients are finite; they are the same on every worker, so is the answer."""
        return bool(torch.isfinite(gradient_norm(self.network)).item())

    def _check_finite(self, loss: float, step: int) -> None:
        """Raise a TrainingError that says where a loss that is no number comes from."""
        if math.isfinite(loss):
            self._last_finite_loss = loss
            return
        bad = [
            name
            for name, p in self.network.named_parameters()
            if p.grad is not None and not torch.isfinite(local_tensor(p.grad)).all()
        ]
        where = f"; not finite: the gradients of {', '.join(bad[:3])}" if bad else ""
        where += f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise TrainingError(
            f"the loss is {loss} at step {step + 1} (the last finite one was "
            f"{self._last_finite_loss:.6g}){where}"
        )


def _first_samples(samples: Batch) -> Batch:
    """Enough of a split to run a model on, also where samples are normalised together."""
    return {name: values[:2] for name, values in samples.items()}


def check_per_sample(name: str, values: Tensor, samples: int) -> None:
    """Raise a TrainingError unless a workload's values are one per sample."""
    if values.shape != (samples,):
        raise TrainingError(
            f"the workload's {name} must have one value per sample, shape [{samples}] "
            f"(got {list(values.shape)})"
        )
