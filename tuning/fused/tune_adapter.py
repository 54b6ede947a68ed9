"""Ray Tune's trials as slots of engines: no process per trial.

To Tune a fused trial is a trial like any other: a `Trainable` of its own, with its own resources,
that it starts, resets, saves, restores and stops, so that every searcher, scheduler and callback
works as it does elsewhere. But the trainables of all trials on a device live in the one process
of the engine there. A trainable does nothing but wait: an actor for each would cost 2 seconds of
a CPU and 100 MB of memory, as often as there are slots.

What Tune takes for an actor's class and its handle are the stand-ins `_Class` and `_Handle`. Their
calls go to the engine's actor; what they return are that actor's futures, so that its death is
known to Tune as the death of the trials' actors.
"""

import contextlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray import tune
from ray.air.execution.resources.fixed import FixedResourceManager
from ray.tune.execution.tune_controller import TuneController

from trainers.devices import local_device
from trainers.runs.metering import WorkerMeter
from tuning.fused.engine import Engine
from tuning.fused.fusion_plan import FusionPlan, planned_slots, try_plan
from tuning.programs.program import Program
from tuning.trials.budget import ENGINE_ACCOUNT
from tuning.trials.trial import Sweep

SLOT_RESOURCE = "heliostat_slot"
"""The resource that a fused trial takes, counted by us alone."""
MAX_CONCURRENT_CALLS = 256
"""Calls that an engine's actor takes at once; each waiting trial holds one or two."""


class SlotTrainable(tune.Trainable):  # type: ignore[misc]
    """A trial in a slot of this process' engine, as Tune knows it."""

    engine: ClassVar[Engine]

    def setup(self, config: dict[str, Any]) -> None:
        self._lease = self.engine.start(config)

    def step(self) -> dict[str, Any]:
        return self.engine.next(self._lease)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self.engine.save(self._lease, Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        assert isinstance(checkpoint, str)
        self.engine.load(self._lease, Path(checkpoint))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.engine.stop(self._lease)
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self.engine.stop(self._lease)


class EngineActor:
    """An engine in a process of its own, with the trainables of its trials; a Ray actor."""

    def __init__(self, sweep: Sweep, tracker: Any) -> None:
        self._sweep, self._tracker = sweep, tracker
        self._lock = threading.Condition()
        self._trainables: dict[int, SlotTrainable] = {}
        self._program: Program | None = None
        self._called: defaultdict[int, int] = defaultdict(int)

    def plan(self, engines: int) -> FusionPlan:
        """Whether the sweep is to be fused on so many devices, and into how many slots."""
        plan, self._program = try_plan(self._sweep, engines)
        return plan

    def prepare(self) -> None:
        """Have an engine as the sweep's plan wants it, which compiles what it will need."""
        with self._lock:
            if not hasattr(SlotTrainable, "engine"):
                slots = planned_slots(self._sweep)
                hardware = local_device(self._sweep.spec_data["scale"]["accelerator"])
                self._meter = WorkerMeter(
                    self._tracker,
                    f"{self._sweep.key}/{ENGINE_ACCOUNT}",
                    hardware,
                    trace=self._sweep.power_trace,
                ).__enter__()
                SlotTrainable.engine = Engine(self._sweep, self._tracker, slots, self._program)

    def call(self, key: int, sequence_number: int, method: str, args: Any, kwargs: Any) -> Any:
        """Do a trainable's `method`; calls to one trainable are done one after the other."""
        with self._lock:
            if sequence_number and key not in self._called:
                raise RuntimeError("the engine that had this trial was lost")
            self._lock.wait_for(lambda: self._called[key] == sequence_number)
        try:
            if method == "__init__":
                self.prepare()
                self._trainables[key] = SlotTrainable(**kwargs)
                return None
            if method == "__ray_terminate__":
                self._trainables.pop(key, None)
                return None
            return getattr(self._trainables[key], method)(*args, **kwargs)
        finally:
            with self._lock:
                self._called[key] += 1
                self._lock.notify_all()


class _ActorHandleStandIn:
    """What Tune takes for the handle of a trial's actor."""

    _keys = itertools.count()

    def __init__(self, host: Any, kwargs: dict[str, Any]) -> None:
        self._engine, self._key, self._sequence = host, next(self._keys), itertools.count()
        self._ready = self._call("__init__", (), kwargs)

    def _call(self, method: str, args: Any, kwargs: Any) -> Any:
        # An engine that was lost is being started again; its trials' first calls wait for that.
        retries = -1 if method == "__init__" else 0
        call = self._engine.call.options(max_task_retries=retries)
        return call.remote(self._key, next(self._sequence), method, args, kwargs)

    def __getattr__(self, method: str) -> "_MethodStandIn":
        return _MethodStandIn(self, method)


class _MethodStandIn:
    def __init__(self, handle: _ActorHandleStandIn, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        if self._name == "__ray_ready__":
            return self._handle._ready
        return self._handle._call(self._name, args, kwargs)


class _ActorClassStandIn:
    """What Tune takes for the class of the trials' actors, and for its cache of such classes."""

    def __init__(self, hosts: Sequence[Any]) -> None:
        self._engines = itertools.cycle(hosts)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What `isinstance` asks for."""
        return ray.actor.ActorClass

    def get(self, trainable: Any) -> "_ActorClassStandIn":
        return self

    def options(self, **options: Any) -> "_ActorClassStandIn":
        return self

    def remote(self, **kwargs: Any) -> _ActorHandleStandIn:
        return _ActorHandleStandIn(next(self._engines), kwargs)


@contextlib.contextmanager
def trials_in_slots(engines: Sequence[Any], slots: int) -> Iterator[None]:
    """Tuners that run in here keep their trials in `slots` slots on the engines of `hosts`.

    `Tuner` has no argument for its controller, so the class is replaced where it looks it up.
    """
    from ray.tune import tune as module

    class Controller(TuneController):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            manager = FixedResourceManager({SLOT_RESOURCE: slots})
            super().__init__(*args, **kwargs, resource_manager_factory=lambda: manager)
            self._class_cache = _ActorClassStandIn(engines)
            # At its end it kills actors that take more than 5 s to stop; ours go with the engine.
            self._actor_manager.cleanup = manager.clear

    original, module.TuneController = module.TuneController, Controller
    try:
        yield
    finally:
        module.TuneController = original


def start_engines(sweep: Sweep, tracker: Any, count: int) -> list[Any]:
    """The actors of `count` engines; each is started again when it is lost."""
    needs = sweep.spec.resources
    actor = ray.remote(EngineActor).options(
        num_cpus=needs.cpu,
        num_gpus=needs.gpu,
        max_restarts=-1,
        max_concurrency=MAX_CONCURRENT_CALLS,
    )
    return [actor.remote(sweep, tracker) for _ in range(count)]
