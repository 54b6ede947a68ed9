"""An engine in the process of the test, without Ray."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainers.data.splits import open_split
from trainers.devices import Cpu
from trainers.engine.reporter import NullReporter
from tuning.fused import engine as engine_module
from tuning.fused import program_pool
from tuning.fused.engine import Engine
from tuning.fused.sweep_variants import reference_variant
from tuning.programs.program import Program
from tuning.sweep import new_sweep

SPEC = """
workload: spirals:Spirals
model: {width: 8}
train: {epochs: 4, global_batch: 70}
checkpoint: {every_steps: 1000000}
sweep:
  parameters:
    optimizer.lr: {loguniform: [1e-4, 1.0]}
  search: random
  trials: 8
  fuse: 4
"""
StartEngine = Callable[..., Engine]


class UntrackedReporter(NullReporter):
    def __init__(self, tracker: Any, run: str, interval_s: float) -> None:
        pass


@pytest.fixture
def start_engine(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartEngine]:
    """Starts an engine of four slots, with some fields of the spec changed.

    An engine that would end its process fails the test.
    """
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(engine_module, "TrackerReporter", UntrackedReporter)
    monkeypatch.setattr(program_pool, "set_gauge", lambda *_: None)
    (own_folder / "s.yaml").write_text(SPEC)
    started: list[Engine] = []

    def start(*overrides: str) -> Engine:
        sweep = new_sweep("s.yaml", list(overrides), None)
        samples = open_split(sweep.dataset, "train")
        program = Program(reference_variant(sweep), 4, samples, Cpu())  # not compiled, to save time
        started.append(Engine(sweep, None, slots=4, program=program))
        return started[-1]

    yield start
    ended_itself = bool(exits)
    for engine in started:
        engine._loop.post(_end_thread)
    # A thread that is still alive would end the process of the tests, once `os._exit` is back.
    deadline_s = time.monotonic() + 60
    while len(exits) < len(started) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not ended_itself, "the engine ended its process"


def _end_thread() -> None:
    raise SystemExit
