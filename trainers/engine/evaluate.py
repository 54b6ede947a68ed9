"""Evaluation of a model on the splits of its data set."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainers.checks.modes import evaluation_mode
from trainers.checks.returned_values import check_per_sample
from trainers.data.sampling import shard_bounds, to_device
from trainers.engine.heartbeat import heartbeat
from trainers.engine.reporter import Reporter
from trainers.engine.step import TrainStep
from trainers.modeling.strategy import broadcast_buffers
from trainers.precision import compute_precision, weights_dtype
from trainers.spec import RunSpec
from trainers.worker import Worker
from trainers.workload import Batch, Workload


class Evaluator:
    """Evaluates the model of a run on the splits that are due after a step."""

    def __init__(
        self,
        spec: RunSpec,
        workload: Workload,
        splits: Mapping[str, Batch],
        trained: TrainStep,
        reporter: Reporter,
    ) -> None:
        self._spec, self._workload, self._splits = spec, workload, splits
        self._trained, self._reporter = trained, reporter
        samples = len(next(iter(splits["train"].values())))
        self._total = spec.train.total_steps(samples)
        self.steps = spec.train.evaluation_steps(samples)
        """The steps after which there is an evaluation."""
        self.latest: dict[str, float] = {}
        """The latest value of each metric: `val/...`, at the end `test/...`."""

    def run(self, done: int) -> dict[str, float]:
        """The metrics after `done` steps, logged; empty if no split is due. Collective."""
        trained = self._trained
        metrics: dict[str, float] = {}
        due = splits_due(done, self._total, self.steps, self._splits)
        if due:
            trained.check_state(done)
        for split in due:
            broadcast_buffers(trained.network, trained.strategy)
            samples = self._splits[split]
            means = evaluate(self._spec, self._workload, trained.network, samples, trained.worker)
            metrics |= {f"{split}/{name}": mean for name, mean in means.items()}
            trained.meter.mark("evaluation")
        if metrics:
            self.latest |= metrics
            self._reporter.log_metrics(metrics, done)
        return metrics


def splits_due(
    done: int, total: int, evaluations: set[int], splits: Mapping[str, Batch]
) -> list[str]:
    """The splits to evaluate after `done` steps; the test split only after the last step."""
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

    Each worker takes a contiguous share. Sums are kept in float64, so that the number of workers
    makes no difference but rounding.
    """
    count = len(next(iter(samples.values())))
    start, stop = shard_bounds(count, worker.data_rank, worker.data_world_size)
    # All ranks of a sharded model need the same number of forward passes, some for nothing.
    rounds = math.ceil(math.ceil(count / worker.data_world_size) / workload.evaluation_batch)
    sums: dict[str, Tensor] = {}
    with (
        evaluation_mode(network),
        torch.inference_mode(),
        compute_precision(spec.train, worker.device),
    ):
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
    means = (worker.all_reduce_sum(torch.stack(list(sums.values()))) / count).tolist()
    return workload.summary(dict(zip(sums, means, strict=True)))
