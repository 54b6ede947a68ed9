"""Everything that is private to Ray Train and used here, as read in Ray 2.60.0.

Each function says which private parts it uses, why, and whether there is a public way.
`tests/trainers/runs/test_ray_train_internals.py` fails if another release has changed them.

The exceptions of failed workers need nothing private: `WorkerGroupError.worker_failures` holds the
exceptions of the user's code, which Ray Train takes out of its own wrapper.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ray.train import PreemptionInfo

RetryDecision = Literal["raise", "retry", "count"]
"""End the run; restart the workers; or restart them while `max_failures` allows."""


def announced_preemption() -> "PreemptionInfo | None":
    """The preemption that was announced to this worker. Never blocks; call it in a worker only.

    Private: `TrainContext.preemption_context`. The public `ray.train.get_preemption_info` is a
    barrier of all workers at every call.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def trainer_class(decide: Callable[[Mapping[int, Exception]], RetryDecision]) -> Any:
    """Ray's TorchTrainer, with `decide` as its failure policy and without Ray Data.

    `decide` is given the exception of each failed worker, by rank; it is called in Ray Train's
    controller, a process of its own.

    Private: `DefaultFailurePolicy` and `FailureDecision`, and overriding TorchTrainer's
    `_initialize_and_run_controller`. There is no public way: `FailureConfig` only limits the
    number of failures, and `UserCallback.after_exception` is told of them but cannot decide.

    Private as well: `DatasetsCallback`, and overriding `_create_default_callbacks`. It saves a
    process, the manager of Ray Data's data sets, which are not used here; no option does.
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
