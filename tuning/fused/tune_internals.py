"""All that sweeps use of Ray Tune and that Ray does not promise to keep.

Read in Ray 2.60.0. Ray has no public way to run Tune's trials in anything but an actor of their
own; the alternative is a loop of one's own in place of `Tuner`, without Tune's schedulers,
callbacks and restore. `tests/tuning/fused/test_tune_internals.py` checks each item, and says which
one has changed.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.air.execution.resources.fixed import FixedResourceManager
from ray.tune import registry
from ray.tune import tune as tune_module
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

READ_IN = "2.60.0"
REMEMBERED = ("contains", "get")
"""Methods of Tune's registry of trainables."""
METRICS_METHOD = "get_auto_filled_metrics"
"""The method of a trial's actor that Tune calls at each start, for a first result without metrics.
A dict does in place of the future."""
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


class LeanController(TuneController):  # type: ignore[misc]
    """Tune's controller, which forgets trials that have ended.

    The original keeps each trial that it ever had: it looks at all of them several times for each
    result, writes all of them to its snapshot, and makes a data frame of each when it ends, so that
    10,000 trials took it 30 ms of the CPU and 60 kB of memory for each. All that is asked about an
    ended trial is in the sweep's own journal and folder.

    - `stop_trial` is what ends a trial for good. It is paused by other methods, and a trial that
      failed is kept, since `Tuner.restore` starts it again.
    - `_restore_trials` of a snapshot without trials takes the first one of them all the same.
    - Each new trial asks the registry three times for its trainable, that is Ray's head for the
      same bytes. A controller has one trainable, which is registered before.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in REMEMBERED:
            asked = getattr(type(registry._global_registry), name)
            remembered = functools.cache(functools.partial(asked, registry._global_registry))
            setattr(registry._global_registry, name, remembered)
        super().__init__(*args, **kwargs)

    def stop_trial(self, trial: Trial) -> None:
        super().stop_trial(trial)
        if trial.status == Trial.TERMINATED and trial in self._stopped_trials:
            self._stopped_trials.remove(trial)
            self._trials.remove(trial)
            self._trials_to_cache.discard(trial)
            self._trial_metadata.pop(trial.trial_id, None)
            if trial.storage.trial_dir_name is not None:  # it has been started
                with contextlib.suppress(OSError):  # somebody put a file there
                    Path(trial.local_path).rmdir()

    def add_trial(self, trial: Trial) -> None:
        if trial.status != Trial.TERMINATED:  # as in snapshots of other controllers
            super().add_trial(trial)

    def _restore_trials(self, experiment_state: dict[str, Any]) -> list[Trial]:
        found = experiment_state["trial_data"]
        return list(super()._restore_trials(experiment_state)) if found else []


@contextlib.contextmanager
def _controller_replaced(controller: type[TuneController]) -> Iterator[None]:
    """Have Tuners use another controller.

    `Tuner` has no argument for it: `ray.tune.tune` looks the class up in its own namespace.
    """
    original, tune_module.TuneController = tune_module.TuneController, controller
    try:
        yield
    finally:
        tune_module.TuneController = original
        for name in REMEMBERED:
            vars(registry._global_registry).pop(name, None)


@contextlib.contextmanager
def ended_trials_forgotten() -> Iterator[None]:
    """Have Tuners forget the trials that have ended."""
    with _controller_replaced(LeanController):
        yield


@contextlib.contextmanager
def actor_class_replaced(
    actor_class: ActorClassStandIn, resources: dict[str, float]
) -> Iterator[None]:
    """Have Tuners create the actors of trials from `actor_class`, within these resources.

    They forget the trials that have ended, too.

    - `TuneController` takes a `resource_manager_factory`, which `Tuner` does not pass on. The
      manager given here counts resources without asking the cluster for them.
    - `TuneController._class_cache.get` gives the actor class of a trainable.
    - `TuneController._actor_manager.cleanup`, when a sweep ends, kills actors that take more than
      five seconds to stop. There are none here, so it only clears the resource manager.
    """

    class Controller(LeanController):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            manager = FixedResourceManager(dict(resources))
            super().__init__(*args, **kwargs, resource_manager_factory=lambda: manager)
            self._class_cache = _ClassCacheStandIn(actor_class)
            self._actor_manager.cleanup = manager.clear

    with _controller_replaced(Controller):
        yield
