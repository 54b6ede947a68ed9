"""The private parts of Ray Train have the shape that `ray_train_internals` relies on.

They were read in Ray 2.60.0. If one of these tests fails after an upgrade, read the named part of
Ray again and adapt `trainers/runs/ray_train_internals.py`.
"""

import importlib
import inspect
from typing import Any

import pytest

from cluster.base.errors import TrainingError
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
    trainer = private("ray.train.torch:TorchTrainer")
    monkeypatch.setattr(
        trainer, "_initialize_and_run_controller", lambda self, **kwargs: given.update(kwargs)
    )
    ours = trainer_class(decide_retry)(lambda: None)
    ours._initialize_and_run_controller(failure_policy="Ray's own", other=1)
    policy = private(
        "ray.train.v2._internal.execution.failure_handling.default:DefaultFailurePolicy"
    )
    assert isinstance(given["failure_policy"], policy)
    assert given["other"] == 1
    source = inspect.getsource(private("ray.train.torch:TorchTrainer.fit"))
    assert "self._initialize_and_run_controller(" in source
    assert "failure_policy=" in source
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
    trainer = private("ray.train.torch:TorchTrainer")
    monkeypatch.setattr(
        trainer, "_initialize_and_run_controller", lambda self, **kwargs: given.update(kwargs)
    )
    run_config = RunConfig(failure_config=FailureConfig(max_failures=max_failures))
    trainer_class(decide_retry)(
        lambda: None, run_config=run_config
    )._initialize_and_run_controller()
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


def test_no_process_is_started_for_ray_data() -> None:
    private("ray.train.v2._internal.callbacks.datasets:DatasetsCallback")
    trainer = private("ray.train.torch:TorchTrainer")
    usual = {type(each).__name__ for each in trainer(lambda: None)._create_default_callbacks()}
    ours = {
        type(each).__name__
        for each in trainer_class(decide_retry)(lambda: None)._create_default_callbacks()
    }
    assert usual - ours == {"DatasetsCallback"}
    assert ours < usual
