"""From a workload to the model that a worker trains: built, spread over the workers, compiled."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainers.checks.modes import begin_training
from trainers.checks.returned_values import check_network, check_shardable
from trainers.counter_rng import combine_seeds, seed_process
from trainers.modeling.activation_checkpointing import checkpoint_activations
from trainers.modeling.dropout import DropoutRng, key_dropout_by_sample, split_dropout
from trainers.modeling.dry_run import dry_run, dry_run_once, skeleton
from trainers.modeling.strategy import (
    ParallelStrategy,
    choose_strategy,
    compile_model,
    memory_per_worker,
    parallelize,
)
from trainers.precision import (
    check_precision,
    convert_to_fp8,
    convert_weights,
    weights_dtype,
)
from trainers.spec import RunSpec, TrainSpec
from trainers.worker import Worker
from trainers.workload import Batch, Workload


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
    """The model that one worker trains, in its three forms, and how it came about."""

    network: nn.Module
    """The workload's network; its weights are this worker's part of them."""
    parallel: nn.Module
    """The network wrapped for its strategy."""
    compiled: nn.Module
    """What a forward pass calls; `parallel` itself when `train.compile` is off."""
    dropout_rng: DropoutRng
    strategy: ParallelStrategy
    worker: Worker
    """The worker, with its share of the data under the strategy."""
    count_flops: Callable[[], float | None]
    """Floating-point operations of one sample; see `dry_run`. May take seconds."""
    every_parameter_used: bool
    """Whether each step must give every parameter a gradient; see `missing_gradients`."""

    def missing_gradients(self) -> list[str]:
        """The parameters without a gradient after a backward pass."""
        return [
            name
            for name, weight in self.network.named_parameters()
            if weight.requires_grad and weight.grad is None
        ]


def build_model(spec: RunSpec, workload: Workload, samples: Batch, worker: Worker) -> TrainedModel:
    """Build the network, the same on every worker, and spread it over the workers; collective.

    `samples` is the whole training split. Raises SpecError where the worker's device cannot do
    what the spec asks for.
    """
    check_precision(spec.train.precision, worker.hardware)
    network = build_network(spec.train, workload)
    dropout_rng = key_dropout_by_sample(network)
    first = _first_samples(samples)
    # A worker on its own need not know more than its FLOPs, and those not before its first report.
    alone = worker.world_size == 1
    outline = skeleton(network) if alone else None
    foreseen = None if alone else dry_run(workload, network, first)
    if spec.train.precision == "fp8":
        network = convert_to_fp8(network)
    blocks = workload.blocks(network)
    if spec.train.activation_checkpointing:
        compiles = spec.train.compile != "off"
        checkpoint_activations(blocks, dropout_rng, compiled=compiles)
    strategy = choose_strategy(spec, workload, network, worker, memory_per_worker(worker))
    if strategy.mode not in ("single", "ddp"):
        check_shardable(strategy.mode, network)
    worker = strategy.applied_to(worker)
    if strategy.mode == "tensor":
        split_dropout(network, dropout_rng, foreseen.dropout_shapes if foreseen else None, worker)

    def flops_per_sample() -> float | None:
        found = foreseen if outline is None else dry_run_once(workload, outline, first)
        return found.flops_per_sample if found else None

    find_unused = foreseen is None or bool(foreseen.unused_parameters)
    parallel = parallelize(network, spec, workload, strategy, worker, find_unused)
    return TrainedModel(
        network=network,
        parallel=parallel,
        compiled=compile_model(parallel, spec.train, blocks),
        dropout_rng=dropout_rng,
        strategy=strategy,
        worker=worker,
        count_flops=flops_per_sample,
        every_parameter_used=isinstance(parallel, DistributedDataParallel) and not find_unused,
    )


def _first_samples(samples: Batch) -> Batch:
    """Enough of a split to run a model on, also where samples are normalised together."""
    return {name: values[:2] for name, values in samples.items()}
