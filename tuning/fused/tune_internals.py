"""All that fused sweeps use of Ray Tune and that Ray does not promise to keep.

Read in Ray 2.60.0. Ray has no public way to run Tune's trials in anything but an actor of their
own; the alternative is a loop of one's own in place of `Tuner`, without Tune's schedulers,
callbacks and restore. `tests/tuning/fused/test_tune_internals.py` checks each item, and says which
one has changed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.air.execution.resources.fixed import FixedResourceManager
from ray.tune import tune as tune_module
from ray.tune.execution.tune_controller import TuneController

READ_IN = "2.60.0"
READY_METHOD = "__ray_ready__"
"""The method of every actor whose first result tells Tune that the actor was created."""
TERMINATE_METHOD = "__ray_terminate__"
"""The method of every actor that Tune calls to end it, after `Trainable.stop`."""


class ActorClassStandIn(ray.actor.ActorClass):  # type: ignore[misc]
    """Base of what stands in for the actor class of trials.

    Tune's `RayActorManager` makes an actor class, by `ray.remote`, of all that is no instance of
    the public `ActorClass`. It then calls `options(...)` and `remote(...)`. The constructor of
    `ActorClass` only raises: Ray makes actor classes in another way.
    """

    def __init__(self) -> None:
        pass

    def options(self, **options: Any) -> "ActorClassStandIn":
        return self

    def remote(self, **kwargs: Any) -> Any:
        """The handle of a new actor; `kwargs` are the arguments of its constructor."""
        raise NotImplementedError


class _ClassCacheStandIn:
    """In place of `TuneController._class_cache`, which maps trainable to actor class."""

    def __init__(self, actor_class: ActorClassStandIn) -> None:
        self._actor_class = actor_class

    def get(self, trainable: Any) -> ActorClassStandIn:
        return self._actor_class


@contextlib.contextmanager
def actor_class_replaced(
    actor_class: ActorClassStandIn, resources: dict[str, float]
) -> Iterator[None]:
    """Have Tuners create the actors of trials from `actor_class`, within these resources.

    - `Tuner` has no argument for its controller: `ray.tune.tune`, which looks the class up in its
      own namespace, is given another one.
    - `TuneController` takes a `resource_manager_factory`, which `Tuner` does not pass on. The
      manager given here counts resources without asking the cluster for them.
    - `TuneController._class_cache.get` gives the actor class of a trainable.
    - `TuneController._actor_manager.cleanup`, when a sweep ends, kills actors that take more than
      five seconds to stop. There are none here, so it only clears the resource manager.
    """

    class Controller(TuneController):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            manager = FixedResourceManager(dict(resources))
            super().__init__(*args, **kwargs, resource_manager_factory=lambda: manager)
            self._class_cache = _ClassCacheStandIn(actor_class)
            self._actor_manager.cleanup = manager.clear

    original, tune_module.TuneController = tune_module.TuneController, Controller
    try:
        yield
    finally:
        tune_module.TuneController = original
