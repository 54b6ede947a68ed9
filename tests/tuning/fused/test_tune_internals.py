"""The private parts of Ray Tune that fused sweeps use are still as they were read."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import RayActorError
from ray.train._internal.storage import StorageContext
from ray.tune import registry
from ray.tune import tune as tune_module
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.search import Searcher, SearchGenerator

from tuning.fused import tune_internals
from tuning.fused.tune_internals import (
    METRICS_METHOD,
    READ_IN,
    READY_METHOD,
    REMEMBERED,
    TERMINATE_METHOD,
    ActorClassStandIn,
    LeanController,
    actor_class_replaced,
)

CONTROLLER = inspect.getsource(TuneController)
ACTOR_MANAGER = inspect.getsource(RayActorManager)


ITEMS: dict[str, Callable[[], bool]] = {
    "ray.tune.tune.run creates the TuneController of its own namespace": lambda: (
        "runner = TuneController(" in inspect.getsource(tune_module.run)
    ),
    "TuneController takes a resource_manager_factory": lambda: (
        "resource_manager_factory" in inspect.signature(TuneController.__init__).parameters
    ),
    "TuneController takes actor classes from self._class_cache.get": lambda: (
        "self._class_cache.get(trainable_cls)" in CONTROLLER
    ),
    "TuneController ends with self._actor_manager.cleanup()": lambda: (
        "self._actor_manager.cleanup()" in CONTROLLER
    ),
    "RayActorManager tests isinstance(actor_cls, ray.actor.ActorClass)": lambda: (
        "isinstance(actor_cls, ray.actor.ActorClass)" in ACTOR_MANAGER
    ),
    "RayActorManager kills actors in cleanup, and clears the resource manager there": lambda: all(
        line in inspect.getsource(RayActorManager.cleanup)
        for line in ("ray.kill(actor)", "self._resource_manager.clear()")
    ),
    f"RayActorManager calls {READY_METHOD} and {TERMINATE_METHOD} of actors": lambda: all(
        f".{name}.remote()" in ACTOR_MANAGER for name in (READY_METHOD, TERMINATE_METHOD)
    ),
    "TuneController pauses trials, and keeps failed ones, by other methods than stop_trial": (
        lambda: (
            "stop_trial" not in inspect.getsource(TuneController._schedule_trial_pause)
            and "stop_trial" not in inspect.getsource(TuneController._process_trial_failure)
        )
    ),
    "TuneController keeps ended trials in these four places": lambda: all(
        f"self.{place}" in CONTROLLER
        for place in ("_trials", "_stopped_trials", "_trials_to_cache", "_trial_metadata")
    ),
    "TuneController looks at the first trial of a snapshot": lambda: (
        "trials[0].storage" in inspect.getsource(TuneController._restore_trials)
    ),
    "tune.registry._global_registry has these methods": lambda: all(
        callable(getattr(type(registry._global_registry), name)) for name in REMEMBERED
    ),
    f"Trial calls {METRICS_METHOD} of its actor, and takes a dict for its future": lambda: (
        f"ray_actor.{METRICS_METHOD}.remote(" in inspect.getsource(Trial.set_ray_actor)
        and "isinstance(" in inspect.getsource(Trial._get_default_result_or_future)
    ),
    "ray.actor.ActorClass can be subclassed, with a constructor of one's own": lambda: isinstance(
        ActorClassStandIn(), ray.actor.ActorClass
    ),
}


@pytest.mark.parametrize("item", ITEMS)
def test_ray_tune_has(item: str) -> None:
    assert ITEMS[item](), (
        f"not true any more of Ray {ray.__version__}: {item} (read in Ray {READ_IN}; "
        "see tuning/fused/tune_internals.py)"
    )


class NoSearch(Searcher):  # type: ignore[misc]
    def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass


@pytest.fixture
def controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LeanController:
    """Without Ray: no trial gets an actor."""
    storage = StorageContext(str(tmp_path), "tune")
    search = SearchGenerator(NoSearch(metric="loss", mode="min"))
    monkeypatch.setattr(StorageContext, "_get_session_path", lambda self: str(tmp_path))
    manager = SimpleNamespace()
    return LeanController(
        search_alg=search, storage=storage, resource_manager_factory=lambda: manager
    )


def trial_of(controller: LeanController, status: str = Trial.PENDING) -> Trial:
    trial = Trial("trainable", stub=True, storage=controller._storage)
    trial.status = status
    trial.storage.trial_dir_name = f"trial-{trial.trial_id}"
    controller.add_trial(trial)
    return trial


def snapshot(controller: LeanController) -> dict[str, Any]:
    controller.save_to_dir()
    found: dict[str, Any] = json.loads(Path(controller.experiment_state_path).read_text())
    return found


def test_a_controller_forgets_a_trial_that_has_ended(controller: LeanController) -> None:
    """What it does for a result takes no longer after 10,000 trials, nor does a snapshot."""
    goes_on, ended = trial_of(controller), trial_of(controller)
    goes_on.storage.trial_dir_name = None  # it has not been started
    for trial in (goes_on, ended):
        controller._set_trial_status(trial, Trial.RUNNING)
    assert len(snapshot(controller)["trial_data"]) == 2
    controller.stop_trial(ended)
    assert ended.status == Trial.TERMINATED
    assert controller.get_trials() == [goes_on]
    assert controller._stopped_trials == set()
    assert len(snapshot(controller)["trial_data"]) == 1
    controller.stop_trial(goes_on)
    assert snapshot(controller)["trial_data"] == []
    assert controller._restore_trials(snapshot(controller)) == []


def test_a_controller_keeps_trials_that_are_paused_or_have_failed(
    controller: LeanController,
) -> None:
    """Tune goes on with a paused one, and a resumed sweep with one that has failed."""
    paused, failed = trial_of(controller), trial_of(controller)
    for trial in (paused, failed):
        controller._set_trial_status(trial, Trial.RUNNING)
    controller._schedule_trial_stop(paused)
    controller._set_trial_status(paused, Trial.PAUSED)
    failed.init_local_path()
    controller._process_trial_failure(failed, RayActorError())
    assert [trial.status for trial in controller.get_trials()] == [Trial.PAUSED, Trial.ERROR]
    assert len(snapshot(controller)["trial_data"]) == 2


def test_a_controller_takes_no_ended_trials_from_a_snapshot(controller: LeanController) -> None:
    """Those of sweeps that an earlier version began."""
    trial_of(controller, Trial.TERMINATED)
    failed = trial_of(controller, Trial.ERROR)
    assert controller.get_trials() == [failed]


def test_the_controller_is_replaced_inside_the_context_only() -> None:
    with actor_class_replaced(ActorClassStandIn(), {"slot": 2}):
        assert issubclass(tune_module.TuneController, TuneController)
        assert tune_module.TuneController is not TuneController
    assert tune_internals.tune_module.TuneController is TuneController
    assert not vars(registry._global_registry).keys() & {*REMEMBERED}
