"""The private parts of Ray Train have the shape that `ray_train_internals` relies on.

They were read in Ray 2.60.0. If one of these tests fails after an upgrade, read the named part of
Ray again and adapt `trainers/runs/ray_train_internals.py`.
"""

import asyncio
import importlib
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig
from ray.util.state import list_actors

from cluster.base.errors import TrainingError
from cluster.connection.ray_internals import placement_groups
from trainers.runs import ray_train_internals
from trainers.runs.failure_policy import PeerLostError, PeerPreemptedError, decide_retry
from trainers.runs.ray_train_internals import trainer_class


def private(path: str) -> Any:
    """A part of Ray Train, by its module and names; fails with a clear word if it is gone."""
    module, _, names = path.partition(":")
    try:
        found = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        pytest.fail(f"this release of Ray has no {path}; see ray_train_internals.py")
    return found


def test_a_workers_context_has_the_announced_preemption() -> None:
    private("ray.train.v2._internal.execution.context:get_train_context")
    context = private("ray.train.v2._internal.execution.context:TrainContext")
    assert "preemption_context" in {*inspect.get_annotations(context)}, (
        "TrainContext of this release has no preemption_context: see announced_preemption"
    )
    preemption = private("ray.train.v2._internal.execution.preemption:PreemptionContext")
    assert preemption().preemption_info is None


def test_the_trainer_hands_its_failure_policy_to_the_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = private("ray.train.torch:TorchTrainer._initialize_and_run_controller")
    assert inspect.signature(base).parameters["controller_init_kwargs"].kind is (
        inspect.Parameter.VAR_KEYWORD
    )
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray_train_internals, "_run_controller", given.update)
    ours = trainer_class(decide_retry)(lambda: None)
    ours._initialize_and_run_controller(failure_policy="Ray's own", scaling_policy=None, other=1)
    policy = private(
        "ray.train.v2._internal.execution.failure_handling.default:DefaultFailurePolicy"
    )
    assert isinstance(given["failure_policy"], policy)
    assert given["other"] == 1
    source = inspect.getsource(private("ray.train.torch:TorchTrainer.fit"))
    assert "self._initialize_and_run_controller(" in source
    assert "failure_policy=" in source
    assert "scaling_policy=" in source
    assert "self._create_default_callbacks()" in source


@pytest.mark.parametrize(
    ("failure", "max_failures", "expected"),
    [
        (TrainingError("a mistake"), 5, "RAISE"),
        (PeerPreemptedError("node went"), 0, "RETRY"),
        (PeerLostError("peer died"), 1, "RETRY"),
        (PeerLostError("peer died"), 0, "RAISE"),
    ],
)
def test_the_policy_decides_by_the_exceptions_of_workers(
    failure: Exception, max_failures: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import FailureConfig, RunConfig

    decisions = private("ray.train.v2._internal.execution.failure_handling:FailureDecision")
    error = private("ray.train.v2.api.exceptions:WorkerGroupError")("failed", {1: failure})
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray_train_internals, "_run_controller", given.update)
    run_config = RunConfig(failure_config=FailureConfig(max_failures=max_failures))
    trainer_class(decide_retry)(lambda: None, run_config=run_config)._initialize_and_run_controller(
        scaling_policy=None
    )
    assert given["failure_policy"].make_decision(error) == getattr(decisions, expected)


def test_failures_of_workers_are_the_exceptions_of_the_users_code() -> None:
    """Not Ray's wrapper around them, so that their type tells whether to restart."""
    wrapper = private("ray.train.v2._internal.exceptions:UserExceptionWithTraceback")
    status = private("ray.train.v2._internal.execution.worker_group.poll:WorkerStatus")
    group = private("ray.train.v2._internal.execution.worker_group.poll:WorkerGroupPollStatus")
    error = TrainingError("a mistake")
    failed = status(running=False, error=wrapper(error, "its traceback"))
    failures = group(worker_statuses={0: failed}).get_worker_group_error().worker_failures
    assert failures == {0: error}, "this release of Ray hands out its wrapper: unwrap it first"


def test_a_fixed_number_of_workers_asks_no_coordinator_for_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = private("ray.train.v2._internal.execution.scaling_policy:create_scaling_policy")
    base = private("ray.train.v2._internal.execution.scaling_policy:ScalingPolicy")
    for name in ("after_controller_start", "_maybe_send_resource_request"):
        assert hasattr(base, name), f"another method asks than {name}: see _fixed_scaling_policy"
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray_train_internals, "_run_controller", given.update)
    ours = trainer_class(decide_retry)(lambda: None, scaling_config=ScalingConfig(num_workers=3))
    ours._initialize_and_run_controller(scaling_policy=create(ours.scaling_config))
    policy = given["scaling_policy"]
    policy.after_controller_start(None)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
    policy.make_decision_for_running_worker_group(None, None)
    asyncio.run(policy.before_controller_shutdown())
    assert policy._coordinator_client is None

    elastic = create(ScalingConfig(num_workers=(1, 3)))
    ours._initialize_and_run_controller(scaling_policy=elastic)
    assert given["scaling_policy"] is elastic


def test_the_controller_is_run_as_ray_train_runs_its_own() -> None:
    source = inspect.getsource(
        private("ray.train.torch:TorchTrainer._initialize_and_run_controller")
    )
    for line in (
        "env_vars = get_env_vars_to_propagate()",
        "num_cpus=0",
        "ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()",
        'runtime_env={"env_vars": env_vars}',
        ")(TrainController)",
        "controller_actor_cls.remote(**controller_init_kwargs)",
        "ray.get(controller.run.remote())",
        "return ray.get(controller.get_result.remote())",
    ):
        assert line in source, f"no more {line}: see _run_controller"
    constants = "ray.train.v2._internal.constants"
    for name, value in {
        "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR": "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC",
        "DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE": "0",
    }.items():
        assert private(f"{constants}:{name}") == value


def test_a_restart_ends_and_starts_the_workers_in_one_state() -> None:
    """What `_controller_class` overrides is called as it expects; see there."""
    controller = "ray.train.v2._internal.execution.controller.controller:TrainController"
    source = inspect.getsource(private(f"{controller}._execute_resize_decision"))
    ended, started = "self._shutdown_worker_group()", "self._start_worker_group(\n"
    assert 0 < source.find(ended) < source.find(started)
    step = inspect.getsource(private(f"{controller}._step"))
    before = step[: step.index("self._execute_resize_decision(")]
    assert before.rstrip().splitlines()[-3].strip() == (
        "elif isinstance(controller_state, SchedulingState):"
    ), "_execute_resize_decision is called in another state"
    parameters = inspect.signature(private(f"{controller}._start_worker_group")).parameters
    assert [*parameters] == ["self", "num_workers", "resources_per_worker"]
    assert private(f"{controller}.worker_group_cls") is private(
        "ray.train.v2._internal.execution.worker_group:WorkerGroup"
    )
    assert ray_train_internals._controller_class().worker_group_cls.replace_lost_workers


def test_a_poll_waits_since_the_last_one() -> None:
    """`_controller_class` waits in its place, and then says that the last poll was long ago."""
    controller = "ray.train.v2._internal.execution.controller.controller:TrainController"
    source = inspect.getsource(private(f"{controller}._poll_workers"))
    assert "time_monotonic() - self._latest_poll_time" in source
    assert "if time_since_last_poll < self._health_check_interval_s:" in source


def test_a_process_that_ends_is_noticed_at_once() -> None:
    async def wait(processes: list[int], timeout_s: float) -> float:
        began_s = time.monotonic()
        await ray_train_internals._end_of_one(processes, timeout_s)
        return time.monotonic() - began_s

    with subprocess.Popen(["sleep", "600"]) as process:
        assert asyncio.run(wait([process.pid], 0.2)) >= 0.2

        async def killed() -> float:
            asyncio.get_running_loop().call_later(0.2, process.kill)
            return await wait([os.getpid(), process.pid], 300)

        assert asyncio.run(killed()) < 200
        process.wait()
        assert asyncio.run(wait([process.pid], 300)) < 200
    assert asyncio.run(wait([], -1)) < 200


def test_a_group_of_workers_has_the_parts_by_which_the_lost_are_replaced() -> None:
    """Ray Train's own replacement of a replica group uses the same; see `_worker_group_class`."""
    group = "ray.train.v2._internal.execution.worker_group.worker_group:WorkerGroup"
    own = inspect.getsource(private(f"{group}._replace_replica_group_impl"))
    for part in (
        "placement_group_bundle_indices=old_placement_group_bundle_indices",
        "self._world_rank_to_ongoing_poll",
        "self._worker_group_state.placement_group_handle.placement_group",
        "self._worker_group_state.sync_actor",
        "self._init_train_context(new_workers, sync_actor)",
    ):
        assert part in own, f"no more {part}: see _worker_group_class"
    start = inspect.getsource(private(f"{group}._start_impl"))
    steps = (
        "self._create_workers(",
        "self._init_train_context(workers, sync_actor)",
        "callback.after_worker_group_start(self)",
        "worker.actor.run_train_fn.remote(worker_group_context.train_fn_ref)",
        "callback.after_worker_group_training_start(self)",
    )
    places = [start.find(step) for step in steps]
    assert places == sorted(places), "a group is started in another order"
    assert places[0] > 0
    state = private("ray.train.v2._internal.execution.worker_group.state:WorkerGroupState")
    assert {"workers", "sync_actor", "placement_group_handle"} <= {*inspect.get_annotations(state)}
    worker = private("ray.train.v2._internal.execution.worker_group.worker:Worker")
    assert {"placement_group_bundle_index", "resources"} <= {*inspect.get_annotations(worker)}
    for name in ("WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError"):
        private(f"ray.train.v2._internal.exceptions:{name}")


def test_no_process_is_started_for_nothing(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    private("ray.train.v2._internal.callbacks.datasets:DatasetsCallback")
    trainer = private("ray.train.torch:TorchTrainer")
    usual = {type(each).__name__ for each in trainer(lambda: None)._create_default_callbacks()}

    def ours() -> set[str]:
        callbacks = trainer_class(decide_retry)(lambda: None)._create_default_callbacks()
        return {type(each).__name__ for each in callbacks}

    assert usual - ours() == {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    assert ours() < usual
    monkeypatch.setattr(ray.get_runtime_context().worker, "mode", ray.WORKER_MODE)
    assert usual - ours() == {"DatasetsCallback"}, "a sweep goes on where its trial's group is lost"


DRIVER = """
import sys
import time
from pathlib import Path

import ray

from trainers.runs.failure_policy import decide_retry
from trainers.runs.ray_train_internals import trainer_class


def loop(config):
    Path(config["begun"]).touch()
    time.sleep(600)


ray.init(address=sys.argv[1])
Path(sys.argv[2]).write_text(ray.get_runtime_context().get_job_id())
trainer_class(decide_retry)(loop, train_loop_config={"begun": sys.argv[3]}).fit()
"""


def test_a_killed_driver_leaves_no_reservation(
    ray_cluster: str, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """Ray frees what the run has reserved; and until then, only these actors were started."""
    job_file, begun, log = tmp_path / "job", tmp_path / "begun", tmp_path / "log"
    command = [sys.executable, "-c", DRIVER, ray_cluster, str(job_file), str(begun)]
    with log.open("w") as output:
        driver = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    wait_until(lambda: begun.exists() or driver.poll() is not None, log.read_text)
    assert driver.poll() is None, log.read_text()
    job = job_file.read_text()
    actors = {actor.class_name for actor in list_actors(filters=[("job_id", "=", job)])}
    assert actors == {"TrainController", "RayTrainWorker", "SynchronizationActor"}

    def states() -> list[str]:
        return [group.state for group in placement_groups() if group.job_id == job]

    assert states() == ["CREATED"]
    driver.kill()
    driver.wait(60)
    wait_until(lambda: states() == ["REMOVED"], lambda: str(states()))
