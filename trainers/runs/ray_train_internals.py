"""Everything that is private to Ray Train and used here, as read in Ray 2.60.0.

Each function says which private parts it uses, why, and whether there is a public way.
`tests/trainers/runs/test_ray_train_internals.py` fails if another release has changed them.

The exceptions of failed workers need nothing private: `WorkerGroupError.worker_failures` holds the
exceptions of the user's code, which Ray Train takes out of its own wrapper.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ray.train import PreemptionInfo

RetryDecision = Literal["raise", "retry", "count"]
"""End the run; restart the workers; or restart them while `max_failures` allows."""
STOP_TIMEOUT_S = 5.0
"""A worker that has not stopped training this long after a loss is replaced as well."""

logger = logging.getLogger(__name__)


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
            return _run_controller(kwargs)

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


def _run_controller(arguments: Mapping[str, Any]) -> Any:
    """Run `_controller_class` with these arguments in an actor, and return its result.

    Private: all of it, as `DataParallelTrainer._initialize_and_run_controller` does it, which names
    its class of controller in its code.
    """
    import ray
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    variables = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    actor = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": variables})(
        _controller_class()
    )
    controller = actor.remote(**arguments)
    ray.get(controller.run.remote())
    return ray.get(controller.get_result.remote())


def _controller_class() -> Any:
    """Ray Train's controller, which keeps what it can of its workers when one of them is lost.

    Private: `TrainController` with `_poll_workers`, which waits since `_latest_poll_time`, and the
    methods `_shutdown_worker_group` and `_start_worker_group`, called in this order in the state
    `SchedulingState` when workers are restarted. No option of
    Ray Train 2.60 does without ending all workers and giving their resources back; with those of
    a whole machine, asking for them again takes up to a second. Its replica groups replace only
    the lost workers, but they are for torchft: each is a process group of its own, all local
    ranks are 0, and no preemption is announced.
    """
    import ray
    from ray.train.v2._internal.execution.controller import controller
    from ray.train.v2._internal.execution.controller.state import SchedulingState
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class TrainController(controller.TrainController):  # type: ignore[misc]
        __qualname__ = "TrainController"  # which Ray shows
        worker_group_cls = _worker_group_class()
        _worker_group: Any
        _latest_poll_time: float
        _kept: Any = None
        """The workers between the two parts of a restart."""

        async def _poll_workers(self) -> Any:
            """Poll when it is time, or at once when a worker's process has ended here."""
            here = ray.get_runtime_context().get_node_id()
            workers = [worker.metadata for worker in self._worker_group.get_workers()]
            interval_s = self._health_check_interval_s
            left_s = self._latest_poll_time + interval_s - time.monotonic()
            await _end_of_one([each.pid for each in workers if each.node_id == here], left_s)
            # A millisecond is left, after which Ray Train looks whether it was told to abort.
            self._latest_poll_time = time.monotonic() - interval_s + 1e-3
            return await super()._poll_workers()

        def _shutdown_worker_group(self) -> None:
            fixed = isinstance(self._scaling_policy, FixedScalingPolicy)
            if fixed and isinstance(self.get_state(), SchedulingState):
                self._kept, self._worker_group = self._worker_group, None
            else:
                super()._shutdown_worker_group()

        def _start_worker_group(self, num_workers: int, resources_per_worker: Any) -> None:
            kept, self._kept = self._kept, None
            if kept is not None:
                try:
                    kept.replace_lost_workers()
                    self._worker_group = kept
                    return
                except Exception:  # such as another loss meanwhile: begin with nothing
                    logger.warning("all workers are started anew", exc_info=True)
                    kept.shutdown()
            super()._start_worker_group(num_workers, resources_per_worker)

    return TrainController


async def _end_of_one(processes: list[int], timeout_s: float) -> None:
    """Wait until one of these processes of this machine has ended, at most for `timeout_s`."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    with contextlib.ExitStack() as handles:
        for process in processes if hasattr(os, "pidfd_open") else []:
            try:
                handle = os.pidfd_open(process)
            except OSError:
                return
            handles.callback(os.close, handle)
            loop.add_reader(handle, ended.set)
            handles.callback(loop.remove_reader, handle)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), max(0.0, timeout_s))


def _worker_group_class() -> Any:
    """Ray Train's group of workers, with a method that starts training again in the same place.

    Private: `WorkerGroup`, and what `replace_lost_workers` uses of it, which follows `_start_impl`
    and `_replace_replica_group_impl`.
    """
    import ray
    from ray.train.v2._internal.execution.worker_group.state import _shutdown_workers
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    class Group(WorkerGroup):  # type: ignore[misc]
        _worker_group_state: Any

        def replace_lost_workers(self) -> None:
            """Replace the processes that were lost, and have all workers begin to train again.

            The placement group stays, and so do other workers on CPUs, in their processes. Raises
            an exception if this cannot be done, or while it is done; nothing is of use then.
            """
            status, workers = self.get_latest_poll_status(), self.get_workers()
            dead = _dead_workers(status)
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            if status.get_preemption_info() is not None or status.has_preempted_worker():
                raise RuntimeError("a machine is going")
            if any(workers[rank].metadata.node_id not in alive for rank in dead):
                raise RuntimeError("a machine was lost")
            for callback in self._callbacks:  # destroys the process groups
                callback.before_worker_group_shutdown(self)
            lost = set(range(len(workers))) - _stopped_workers(workers, dead)
            _shutdown_workers([workers[rank] for rank in lost])
            self._start_in_place_of(lost, workers)
            for callback in self._callbacks:
                callback.after_worker_group_start(self)
            function = self._worker_group_context.train_fn_ref
            ray.get([worker.actor.run_train_fn.remote(function) for worker in self.get_workers()])
            for callback in self._callbacks:
                callback.after_worker_group_training_start(self)

        def _start_in_place_of(self, lost: set[int], workers: list[Any]) -> None:
            """Start new workers where those of the ranks `lost` were; all are told their ranks."""
            state = self._worker_group_state
            indices = [workers[rank].placement_group_bundle_index for rank in sorted(lost)]
            new = self._create_workers(
                len(lost),
                state.placement_group_handle.placement_group,
                self._worker_group_context.resources_per_worker,
                placement_group_bundle_indices=indices,
            )
            # Rank 0 makes the process group's store, and a new process would be late with it:
            # who does not find the store asks again after most of a second.
            kept = [worker for rank, worker in enumerate(workers) if rank not in lost]
            workers = self._assign_worker_ranks([*kept, *new])
            self._worker_group_state = dataclasses.replace(state, workers=workers)
            self._world_rank_to_ongoing_poll.clear()
            self._latest_poll_status = None
            self._init_train_context(workers, state.sync_actor)

    return Group


def _dead_workers(status: Any) -> set[int]:
    """The ranks of the workers whose process does not answer any more."""
    from ray.train.v2._internal.exceptions import (
        WorkerHealthCheckFailedError,
        WorkerHealthCheckTimeoutError,
    )

    gone = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
    return {rank for rank, each in status.worker_statuses.items() if isinstance(each.error, gone)}


def _stopped_workers(workers: list[Any], dead: set[int]) -> set[int]:
    """The ranks of workers on CPUs that live, when they have stopped training.

    The destroyed process group ends a collective that waits for a lost worker: tried with gloo.
    """
    import ray

    running = {
        rank
        for rank, worker in enumerate(workers)
        if rank not in dead and not worker.resources.keys() - {"CPU"}
    }
    stopped = set[int]()
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while running and time.monotonic() < deadline_s:
        polls = {workers[rank].actor.poll_status.remote(): rank for rank in running}
        answered, _ = ray.wait(list(polls), num_returns=len(polls), timeout=STOP_TIMEOUT_S)
        stopped |= {polls[each] for each in answered if not ray.get(each).running}
        running -= stopped
        time.sleep(0.01 if running else 0)
    return stopped
