"""Ray Tune's trials in slots of engines: no process per trial.

To Tune a fused trial is a trial like any other: a `Trainable` with its own resources, which Tune
starts, resets and stops. So every searcher, scheduler and callback works as usual. But the
trainables of all trials on a device live in one process, that of the engine there. A trainable only
waits: an actor for each would cost 2 seconds of a CPU and 100 MB of memory, as often as there are
slots.

Tune is given stand-ins for the actor class and the actor handles of trials. Their calls become
calls of the engine's actor, and return its futures. So Tune sees the death of that actor as the
death of its trials' actors.
"""

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, ClassVar

import ray
from ray import tune

from trainers.devices import local_device
from trainers.runs.worker_meter import WorkerMeter
from tuning.fused.engine import Engine
from tuning.fused.fusion_plan import FusionPlan, planned_slots, try_plan
from tuning.fused.tune_internals import (
    METRICS_METHOD,
    READY_METHOD,
    TERMINATE_METHOD,
    ActorClassStandIn,
    actor_class_replaced,
)
from tuning.programs.program import Program
from tuning.trials.budget import ENGINE_ACCOUNT
from tuning.trials.trial import Sweep

SLOT_RESOURCE = "heliostat_slot"
"""The resource that a fused trial takes; Ray does not know it, only Tune's controller counts it."""
REORDERED_CALL_S = 1.0
"""Seconds for which the first call to a trainable may arrive after the second one."""
MAX_CONCURRENT_CALLS = 256
"""Calls that an engine's actor takes at a time; each waiting trial holds one or two."""


class SlotTrainable(tune.Trainable):  # type: ignore[misc]
    """A trial in a slot of this process' engine, as Tune knows it."""

    engine: ClassVar[Engine]

    def setup(self, config: dict[str, Any]) -> None:
        self._lease = self.engine.start(config)

    def step(self) -> dict[str, Any]:
        return self.engine.next(self._lease)

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """The trial goes on from the checkpoints in its own folder.

        Tune calls this when it resumes a sweep with pbt of an earlier release, which had Tune save
        its trials. Nothing has Tune save trials any more.
        """

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.engine.stop(self._lease)
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        self.engine.stop(self._lease)


class EngineActor:
    """A Ray actor with an engine, and with the trainables of the engine's trials.

    Its methods run in up to MAX_CONCURRENT_CALLS threads. `_lock` guards `_called` and the start of
    the engine. Of `_trainables`, each entry is used by the calls to one trainable only, which run
    one after another.
    """

    def __init__(self, sweep: Sweep, tracker: Any) -> None:
        self._sweep, self._tracker = sweep, tracker
        self._lock = threading.Condition()
        self._trainables: dict[int, SlotTrainable] = {}
        self._program: Program | None = None
        self._compiles: Future[bool] = Future()
        self._called: dict[int, int] = {}
        """Key of a trainable -> number of calls to it that have returned."""

    def plan(self, engines: int) -> FusionPlan:
        """Decide whether the sweep is fused on so many devices, and into how many slots."""

        def on_compile() -> None:
            if not self._compiles.done():
                self._compiles.set_result(True)

        plan, self._program = try_plan(self._sweep, engines, on_compile)
        if not self._compiles.done():
            self._compiles.set_result(False)
        return plan

    def compiles(self) -> bool:
        """Wait until `plan` compiles a program, which takes long; False if it does not."""
        return self._compiles.result()

    def prepare(self) -> None:
        """Start the engine with the slots of the sweep's plan; it compiles its first program."""
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
        """Call a method of a trainable, after its calls with smaller sequence numbers."""
        with self._lock:
            if sequence_number == 0:
                self._called[key] = 0
                self._lock.notify_all()
            # Two calls that arrive together may come here in another order.
            elif not self._lock.wait_for(lambda: key in self._called, REORDERED_CALL_S):
                raise RuntimeError("the engine that had this trial was lost")
            self._lock.wait_for(lambda: self._called[key] == sequence_number)
        try:
            if method == "__init__":
                self.prepare()
                self._trainables[key] = SlotTrainable(**kwargs)
                return None
            if method == TERMINATE_METHOD:
                self._trainables.pop(key, None)
                return None
            return getattr(self._trainables[key], method)(*args, **kwargs)
        finally:
            with self._lock:
                self._called[key] += 1
                self._lock.notify_all()


class _TrialActorHandle:
    """Stands in for the handle of a trial's actor."""

    _keys = itertools.count()

    def __init__(self, engine: Any, kwargs: dict[str, Any]) -> None:
        self._engine, self._key, self._sequence = engine, next(self._keys), itertools.count()
        self._ready = self._call("__init__", (), kwargs)

    def _call(self, method: str, args: Any, kwargs: Any) -> Any:
        call = self._engine.call
        if method == "__init__":
            # A lost engine is started again by Ray; the first calls of its trials wait for that.
            call = call.options(max_task_retries=-1)
        return call.remote(self._key, next(self._sequence), method, args, kwargs)

    def __getattr__(self, method: str) -> "_TrialActorMethod":
        return _TrialActorMethod(self, method)


class _TrialActorMethod:
    def __init__(self, handle: _TrialActorHandle, name: str) -> None:
        self._handle, self._name = handle, name

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        if self._name == READY_METHOD:
            return self._handle._ready
        if self._name == METRICS_METHOD:
            return {}
        return self._handle._call(self._name, args, kwargs)


class _TrialActorClass(ActorClassStandIn):
    """Stands in for the actor class of trials; distributes them over the engines in turn."""

    def __init__(self, engines: Sequence[Any]) -> None:
        super().__init__()
        self._engines = itertools.cycle(engines)

    def remote(self, **kwargs: Any) -> _TrialActorHandle:
        return _TrialActorHandle(next(self._engines), kwargs)


@contextlib.contextmanager
def trials_in_slots(engines: Sequence[Any], slots: int) -> Iterator[None]:
    """Have Tuners that run in this context train their trials in `slots` slots of `engines`."""
    with actor_class_replaced(_TrialActorClass(engines), {SLOT_RESOURCE: slots}):
        yield


def start_engines(sweep: Sweep, tracker: Any, count: int) -> list[Any]:
    """Start the actors of `count` engines; Ray restarts each that is lost."""
    needs = sweep.spec.resources
    actor = ray.remote(EngineActor).options(
        num_cpus=needs.cpu,
        num_gpus=needs.gpu,
        max_restarts=-1,
        max_concurrency=MAX_CONCURRENT_CALLS,
    )
    return [actor.remote(sweep, tracker) for _ in range(count)]
