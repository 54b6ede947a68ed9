"""Evaluation of a model on the splits of its data set."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainers.data.sampling import shard_bounds, to_device
from trainers.engine.heartbeat import heartbeat
from trainers.engine.step import check_per_sample
from trainers.precision import compute_precision, weights_dtype
from trainers.spec import RunSpec
from trainers.worker import Worker
from trainers.workload import Batch, Workload


def splits_due(
    done: int, total: int, evaluations: set[int], splits: Mapping[str, Batch]
) -> list[str]:
    """The splits to evaluate on after `done` steps: the test split only at the very end."""
    due = ["val"] if done in evaluations else []
    return [*due, "test"] if done == total and "test" in splits else due


def evaluate(
    spec: RunSpec,
    workload: Workload,
    network: nn.Module,
    samples: Batch,
    worker: Worker,
) -> dict[str, float]:
    """The loss and the workload's metrics over a split, by name; collective.

    Each worker takes a contiguous share; sums are kept in float64, so that the number of workers
    does not matter beyond rounding.
    """
    count = len(next(iter(samples.values())))
    start, stop = shard_bounds(count, worker.data_rank, worker.data_world_size)
    # Workers of a sharded model go through it equally often, if need be with nothing to count.
    rounds = math.ceil(math.ceil(count / worker.data_world_size) / workload.evaluation_batch)
    sums: dict[str, Tensor] = {}
    network.eval()
    with torch.inference_mode(), compute_precision(spec.train, worker.device):
        for turn in range(rounds):
            heartbeat()
            low, high = (start + bound for bound in shard_bounds(stop - start, turn, rounds))
            part = slice(min(low, count - 1), max(high, low + 1))
            batch = {name: values[part] for name, values in samples.items()}
            batch = to_device(batch, worker.device, weights_dtype(spec.train))
            output = workload.forward(network, batch)
            found = {"loss": workload.loss(output, batch), **workload.metrics(output, batch)}
            for name, values_B in found.items():
                check_per_sample(name, values_B, len(next(iter(batch.values()))))
                total = values_B[: high - low].double().sum()
                sums[name] = sums[name] + total if name in sums else total
    network.train()
    means = (worker.all_reduce_sum(torch.stack(list(sums.values()))) / count).tolist()
    return workload.summary(dict(zip(sums, means, strict=True)))
