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
    """Ray's TorchTrainer, with `decide` as its failure policy and without processes for nothing.

    `decide` is given the exception of each failed worker, by rank; it is called in Ray Train's
    controller, a process of its own.

    Private: `DefaultFailurePolicy` and `FailureDecision`, and overriding TorchTrainer's
    `_initialize_and_run_controller`. There is no public way: `FailureConfig` only limits the
    number of failures, and `UserCallback.after_exception` is told of them but cannot decide.

    No option leaves out a process that a run does not need. Private as well, therefore: the
    callbacks `DatasetsCallback`, which starts the manager of Ray Data's data sets, and
    `PlacementGroupCleanerCallback`, see `_unneeded_callbacks`; overriding
    `_create_default_callbacks`; the mode of the process, for which `get_actor_id` would log a
    warning in a driver; and `FixedScalingPolicy` with the methods of its base class by
    which it asks the autoscaling coordinator for nodes, see `_fixed_scaling_policy`.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

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
            kwargs["failure_policy"] = Policy(self.run_config.failure_config)
            if isinstance(kwargs["scaling_policy"], FixedScalingPolicy):
                kwargs["scaling_policy"] = _fixed_scaling_policy(self.scaling_config)
            return super()._initialize_and_run_controller(**kwargs)

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if not isinstance(each, _unneeded_callbacks())]

    return Trainer


def _unneeded_callbacks() -> tuple[type, ...]:
    """Callbacks of a trainer in this process that start a process for nothing.

    The cleaner frees the workers' resources when the controller is killed, but not the driver. A
    driver that trains one run ends then, and Ray frees them. In a trial of a sweep, which is an
    actor, the driver goes on. The cleaner also delays the end of each run by up to a second.
    """
    import ray
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        return (DatasetsCallback,)
    return (DatasetsCallback, PlacementGroupCleanerCallback)


def _fixed_scaling_policy(scaling_config: Any) -> Any:
    """Ray Train's policy for a fixed number of workers, without the autoscaling coordinator.

    The coordinator divides a cluster's nodes among runs whose size may change, and Ray Data. A
    run of a fixed size waits for its placement group, of which the autoscaler knows anyway.
    """
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class Fixed(FixedScalingPolicy):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: Any) -> None:
            """Would start the coordinator."""

        def _maybe_send_resource_request(self) -> None:
            """Would ask it for nodes again."""

    return Fixed(scaling_config)
