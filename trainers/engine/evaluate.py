"""Evaluation of a model on the splits of its data set."""

import math
from collections.abc import Mapping

import torch

from cluster.base.errors import SpecError
from trainers.checkpoints.buffers import share_buffers
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.ranking import check_metric
from trainers.checks.modes import evaluation_mode
from trainers.checks.returned_values import check_per_sample
from trainers.data.sampling import shard_bounds, to_device
from trainers.engine.heartbeat import heartbeat
from trainers.engine.metrics import MetricsError, MetricSums
from trainers.engine.reporter import Reporter
from trainers.engine.step import TrainStep
from trainers.modeling.backward import release_gathered
from trainers.modeling.forward import Forward
from trainers.modeling.model_inputs import mixed_dtypes
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
        self.mistake: Exception | None = None
        """A mistake in the workload's metrics, which is to end the run."""

    def run(self, done: int) -> dict[str, float]:
        """The metrics after `done` steps, logged; empty if no split is due. Collective.

        They are also empty after a mistake in the workload's metrics, or if `checkpoint.metric` is
        not among them: `raise_mistake` raises it, on all workers, once the state is saved.
        """
        trained = self._trained
        metrics: dict[str, float] = {}
        due = splits_due(done, self._total, self.steps, self._splits)
        if due:
            trained.check_state(done)
        try:
            for split in due:
                share_buffers(trained.network, trained.worker)
                samples, forward = self._splits[split], trained.forward
                means = evaluate(self._spec, self._workload, forward, samples, trained.worker)
                metrics |= {f"{split}/{name}": mean for name, mean in means.items()}
                trained.meter.mark("evaluation")
                if split == "val":
                    check_ranking(self._spec, metrics)
        except MetricsError as error:
            self.mistake = error.error
            return {}
        if metrics:
            self.latest |= metrics
            self._reporter.log_metrics(metrics, done)
        return metrics

    def resume(self, start: int, checkpoints: Checkpoints, reported: bool = False) -> None:
        """Report the evaluation that is due after the `start` steps of a checkpoint, if one is.

        The process that saved it may have ended before anybody was told. Its metrics are in the
        checkpoint; one that was not evaluated is evaluated now. Collective. If it is `reported`,
        it is only taken note of.
        """
        if reported:
            self.latest |= checkpoints.resumed_metrics
            return
        if start not in self.steps:
            return
        if saved := checkpoints.resumed_metrics:
            self.latest |= saved
            self._reporter.log_metrics(saved, start)
        else:
            self.run(start)
            self.raise_mistake()
        self._reporter.on_evaluation_end(self.latest, start, checkpoints)

    def raise_mistake(self) -> None:
        """Raise the mistake that `run` has met, if it has."""
        if self.mistake is not None:
            raise self.mistake


def check_ranking(spec: RunSpec, metrics: Mapping[str, float]) -> None:
    """Raise MetricsError if checkpoints are ranked by a metric that the validation lacks."""
    try:
        check_metric(spec.checkpoint, metrics)
    except SpecError as error:
        raise MetricsError(error) from error


def splits_due(
    done: int, total: int, evaluations: set[int], splits: Mapping[str, Batch]
) -> list[str]:
    """The splits to evaluate after `done` steps; the test split only after the last step."""
    due = ["val"] if done in evaluations else []
    return [*due, "test"] if done == total and "test" in splits else due


def evaluate(
    spec: RunSpec,
    workload: Workload,
    forward: Forward,
    samples: Batch,
    worker: Worker,
) -> dict[str, float]:
    """The loss and the workload's metrics over a split, by name; collective.

    Each worker takes a contiguous share. Sums are kept in float64, so that the number of workers
    makes no difference but rounding. Raises MetricsError for mistakes in the workload's metrics.
    """
    count = len(next(iter(samples.values())))
    start, stop = shard_bounds(count, worker.data_rank, worker.data_world_size)
    # All ranks of a sharded model need the same number of forward passes, some for nothing.
    rounds = math.ceil(math.ceil(count / worker.data_world_size) / workload.evaluation_batch)
    sums = MetricSums(workload, worker)
    # Not `inference_mode`: a table that a model makes here may be used in its next step.
    with evaluation_mode(forward), torch.no_grad(), compute_precision(spec.train, worker.device):
        for turn in range(rounds):
            heartbeat()
            low, high = (start + bound for bound in shard_bounds(stop - start, turn, rounds))
            first = min(low, count - 1)
            size = max(high, low + 1) - low
            # A copy: the split itself is read-only memory, and models may change their batch.
            batch = {name: values[first : first + size].clone() for name, values in samples.items()}
            batch = to_device(batch, worker.device, weights_dtype(spec.train))
            with mixed_dtypes(forward.network):
                output = forward(batch, with_loss=False)
                loss_B = workload.loss(output, batch)
                check_per_sample("loss", loss_B, size)
                sums.add(loss_B, output, batch, high - low)
    release_gathered(forward)
    return sums.summary(count)
