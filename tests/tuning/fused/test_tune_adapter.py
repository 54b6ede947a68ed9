"""The engine that decides about a sweep, without Ray: when the others learn what it does."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuning.fused import tune_adapter
from tuning.fused.fusion_plan import FusionPlan
from tuning.fused.tune_adapter import EngineActor
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
