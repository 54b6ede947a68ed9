"""Everything that is private to Ray Train and used here, as read in Ray 2.60.0.

| item | why | public way |
| --- | --- | --- |
| `TrainContext.preemption_context` | a preemption notice without a barrier | `ray.train.get_preemption_info` waits for all workers at every call |
| `DefaultFailurePolicy`, `FailureDecision`, `TorchTrainer._initialize_and_run_controller` | no retry after an error in user code, an uncounted retry after a preemption | none: `FailureConfig` has counts only, and `UserCallback.after_exception` cannot decide |
| `DatasetsCallback`, `TorchTrainer._create_default_callbacks` | no process for the manager of Ray Data sets, which are not used | none |

`WorkerGroupError.worker_failures` is public and holds the exceptions of the user's code: Ray Train
takes them out of its private wrapper itself.
`tests/trainers/runs/test_ray_train_internals.py` fails if a release has another shape.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ray.train import PreemptionInfo

RetryDecision = Literal["raise", "retry", "count"]
"""End the run; restart the workers; or restart them while `max_failures` allows."""


def announced_preemption() -> "PreemptionInfo | None":
    """The preemption that was announced to this worker. Never blocks; call it in a worker only."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def trainer_class(decide: Callable[[Mapping[int, Exception]], RetryDecision]) -> Any:
    """Ray's TorchTrainer, with `decide` as its failure policy and without Ray Data.

    `decide` is given the exception of each failed worker, by rank; it is called in Ray Train's
    controller, a process of its own.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy

    class Policy(DefaultFailurePolicy):  # type: ignore[misc]
        def make_decision(self, training_failed_error: Any) -> Any:
            decision = decide(getattr(training_failed_error, "worker_failures", {}))
            if decision == "raise":
                return FailureDecision.RAISE
            if decision == "retry":
                return FailureDecision.RETRY
            return super().make_decision(training_failed_error)

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
            policy = Policy(self.run_config.failure_config)
            return super()._initialize_and_run_controller(**{**kwargs, "failure_policy": policy})

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if not isinstance(each, DatasetsCallback)]

    return Trainer
