"""From a workload to the model that a worker trains: built, spread over the workers, compiled."""

import copy
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from trainers.checks.modes import begin_training
from trainers.checks.returned_values import check_network
from trainers.counter_rng import combine_seeds, seed_process
from trainers.modeling.activation_checkpointing import checkpoint_activations
from trainers.modeling.backward import BackwardPass
from trainers.modeling.dropout import (
    DropoutRng,
    Shape,
    key_dropout_by_sample,
    note_input_shapes,
    split_dropout,
)
from trainers.modeling.forward import Forward, outermost_blocks
from trainers.modeling.lazy_modules import give_shapes
from trainers.modeling.model_inputs import MixedDtypes, convert_inputs
from trainers.modeling.operations import OperationCounter
from trainers.modeling.strategy import (
    ParallelStrategy,
    choose_strategy,
    compile_model,
    memory_per_worker,
    parallelize,
)
from trainers.precision import (
    check_precision,
    column_dtype,
    convert_to_fp8,
    convert_weights,
    weights_dtype,
)
from trainers.spec import RunSpec, TrainSpec
from trainers.worker import Worker
from trainers.workload import Batch, Workload, model_dtype


def build_network(train: TrainSpec, workload: Workload) -> nn.Module:
    """A new network of the workload on the CPU, the same for the same seed; not collective.

    It is in training mode, but for the parts that `build` put into evaluation mode. Raises
    TrainingError if it is no network that can be trained.
    """
    seed_process(combine_seeds(train.seed))
    network = workload.build()
    check_network(workload, network)
    convert_weights(network, weights_dtype(train))
    begin_training(network)
    if train.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


@dataclass(frozen=True)
class TrainedModel:
    """The model that one worker trains, in its forms, and how it came about."""

    network: nn.Module
    """The workload's network; its weights are this worker's part of them."""
    forward: Forward
    """The workload's forward pass with the network, for an evaluation on all workers."""
    parallel: nn.Module
    """The forward pass wrapped for its strategy."""
    compiled: nn.Module
    """What a step calls; `parallel` itself when `train.compile` is off."""
    dropout_rng: DropoutRng
    strategy: ParallelStrategy
    worker: Worker
    """The worker, with its share of the data under the strategy."""
    backward_pass: BackwardPass
    operations: OperationCounter

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; collective if this is the `last` backward pass of a step."""
        self.operations.in_backward = True
        self.backward_pass.run(loss, last)

    def counting_operations(
        self, step: int, micro_batch: int, samples: int
    ) -> AbstractContextManager[None]:
        """In here the operations of a forward and a backward pass are counted, if that is due.

        It is once in a run, so that a run that is resumed computes the same. Compiled code hides
        its operations: of a compiled model the second step is run without compilation.
        """
        compiled = self.compiled is not self.parallel
        if micro_batch or step != int(compiled) or self.strategy.mode == "tensor":
            return nullcontext()
        return self._counting(samples, compiled)

    @contextmanager
    def _counting(self, samples: int, compiled: bool) -> Iterator[None]:
        with ExitStack() as stack:
            if compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                if self.worker.device.type != "cpu":  # it would keep more for its backward pass
                    stack.enter_context(save_on_cpu())
            stack.enter_context(self.operations.counting(samples))
            yield


def build_model(spec: RunSpec, workload: Workload, samples: Batch, worker: Worker) -> TrainedModel:
    """Build the network, the same on every worker, and spread it over the workers; collective.

    `samples` is the whole training split. Raises SpecError where the worker's device cannot do
    what the spec asks for.
    """
    check_precision(spec.train.precision, worker.hardware)
    network = build_network(spec.train, workload)
    give_shapes(workload, network, samples, weights_dtype(spec.train))
    dropout_rng = key_dropout_by_sample(network)
    first = {name: values[:2] for name, values in samples.items()}
    convert_inputs(network, first, weights_dtype(spec.train), spec.train.compile != "off")
    strategy = choose_strategy(spec, workload, network, worker, memory_per_worker(worker))
    worker = strategy.applied_to(worker)
    operations = OperationCounter()
    if strategy.mode == "tensor":
        shapes = _try_out(workload, network, first, operations)
        split_dropout(network, dropout_rng, shapes, worker)
    if spec.train.precision == "fp8":
        network = convert_to_fp8(network)
    blocks = outermost_blocks(workload, network)
    if spec.train.activation_checkpointing:
        compiles = spec.train.compile != "off"
        checkpoint_activations(blocks, dropout_rng, compiled=compiles)
    forward = Forward(workload, network)
    parallel = parallelize(forward, spec, workload, strategy, worker, blocks)
    return TrainedModel(
        network=network,
        forward=forward,
        parallel=parallel,
        compiled=compile_model(parallel, spec.train, blocks),
        dropout_rng=dropout_rng,
        strategy=strategy,
        worker=worker,
        backward_pass=BackwardPass(parallel),
        operations=operations,
    )


def _try_out(
    workload: Workload, network: nn.Module, batch: Batch, operations: OperationCounter
) -> dict[str, set[Shape]] | None:
    """Run copies of a network and its workload once, for what is not seen when layers are split.

    That is the shapes of the inputs of dropout, by module, and the operations. Network, workload,
    batch and random state stay as they are. None if the copies cannot be run.
    """
    samples = len(next(iter(batch.values())))
    hosts = random.getstate(), np.random.get_state()
    try:
        workload, network = copy.deepcopy((workload, network.train()))
        dtype = model_dtype(network)
        columns = {
            name: values.to(column_dtype(values.dtype, dtype), copy=True)
            for name, values in batch.items()
        }
        shapes = note_input_shapes(network, samples)
        with torch.random.fork_rng(devices=[]), operations.counting(samples), MixedDtypes():
            loss_B = workload.loss(workload.forward(network, columns), columns)
            operations.in_backward = True
            torch.autograd.backward(loss_B.sum())
    except Exception:  # a user's model may do anything
        return None
    finally:
        random.setstate(hosts[0])
        np.random.set_state(hosts[1])
    return shapes
