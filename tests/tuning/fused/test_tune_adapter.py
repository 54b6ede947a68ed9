"""The engine that decides about a sweep, without Ray: when the others learn what it does."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuning.fused import tune_adapter
from tuning.fused.fusion_plan import FusionPlan
from tuning.fused.tune_adapter import EngineActor, SlotTrainable
from tuning.sweep import new_sweep

SPEC = """
workload: spirals:Spirals
sweep: {parameters: {optimizer.lr: {uniform: [0.1, 0.2]}}}
"""


@pytest.fixture
def engine(own_folder: Path) -> EngineActor:
    (own_folder / "s.yaml").write_text(SPEC)
    return EngineActor(new_sweep("s.yaml", [], None), None)


def test_the_others_can_start_while_it_compiles(
    engine: EngineActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = threading.Event()

    def compile_twice(
        sweep: Any, engines: int, on_compile: Callable[[], None]
    ) -> tuple[FusionPlan, None]:
        on_compile()
        assert compiled.wait(60)
        on_compile()
        return FusionPlan(4, "fused"), None

    monkeypatch.setattr(tune_adapter, "try_plan", compile_twice)
    plans: list[FusionPlan] = []
    planning = threading.Thread(target=lambda: plans.append(engine.plan(2)))
    planning.start()
    assert engine.compiles() is True
    assert not plans
    compiled.set()
    planning.join(60)
    assert plans == [FusionPlan(4, "fused")]


def test_they_do_not_start_for_a_plan_that_compiles_nothing(
    engine: EngineActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = FusionPlan(0, "not fused")
    monkeypatch.setattr(tune_adapter, "try_plan", lambda *_: (alone, None))
    assert engine.plan(2) == alone
    assert engine.compiles() is False


class Recorded:
    """A trainable that takes its calls, in their order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def first(self) -> str:
        self.calls.append("first")
        return "1"

    def second(self) -> str:
        self.calls.append("second")
        return "2"


def test_calls_that_overtake_one_another_wait_for_their_turn(
    engine: EngineActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor has many threads: a later call may come to the lock before an earlier one."""
    made = Recorded()
    monkeypatch.setattr(engine, "prepare", lambda: None)
    monkeypatch.setattr(tune_adapter, "SlotTrainable", lambda **_: made)
    answers: dict[int, Any] = {}

    def call(number: int, method: str) -> None:
        answers[number] = engine.call(7, number, method, (), {})

    calls = [(2, "second"), (1, "first"), (0, "__init__")]
    threads = [threading.Thread(target=call, args=each) for each in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {0: None, 1: "1", 2: "2"}
    assert made.calls == ["first", "second"]


def test_a_call_to_a_trial_of_a_lost_engine_says_so(
    engine: EngineActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_adapter, "REORDERED_CALL_S", 0.01)
    with pytest.raises(RuntimeError, match="the engine that had this trial was lost"):
        engine.call(7, 3, "train", (), {})


class RecordedEngine:
    """An engine that keeps the calls of a trainable."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, config: dict[str, Any]) -> str:
        self.calls.append(f"start {config['trial']}")
        return "lease"

    def next(self, lease: str) -> dict[str, Any]:
        self.calls.append(f"next {lease}")
        return {"step": 8}

    def stop(self, lease: str) -> None:
        self.calls.append(f"stop {lease}")


def test_a_trial_that_tune_had_saved_goes_on_from_its_own_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a sweep with pbt of an earlier release: a resumed Tune restores what it had saved."""
    engine = RecordedEngine()
    monkeypatch.setattr(SlotTrainable, "engine", engine, raising=False)
    trainable = SlotTrainable(config={"trial": 3})
    trainable.restore(str(tmp_path))
    assert trainable.train()["step"] == 8
    trainable.stop()
    assert engine.calls == ["start 3", "next lease", "stop lease"]
