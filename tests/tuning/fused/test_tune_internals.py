"""The private parts of Ray Tune that fused sweeps use are still as they were read."""

import inspect
from collections.abc import Callable

import pytest
import ray
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.tune import tune as tune_module
from ray.tune.execution.tune_controller import TuneController

from tuning.fused import tune_internals
from tuning.fused.tune_internals import (
    READ_IN,
    READY_METHOD,
    TERMINATE_METHOD,
    ActorClassStandIn,
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


def test_the_controller_is_replaced_inside_the_context_only() -> None:
    with actor_class_replaced(ActorClassStandIn(), {"slot": 2}):
        assert issubclass(tune_module.TuneController, TuneController)
        assert tune_module.TuneController is not TuneController
    assert tune_internals.tune_module.TuneController is TuneController
