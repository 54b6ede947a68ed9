"""Fused trials of several data sets: each is trained and evaluated on its own one."""

import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import write_yaml
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve
from tuning.fused import engine as engine_module
from tuning.fused import program_pool
from tuning.fused.engine import Engine
from tuning.fused.sweep_variants import distinct_programs
from tuning.programs.program import Program
from tuning.sweep import new_sweep
from tuning.trials.trial import Sweep

SPEC: dict[str, Any] = {
    "workload": "spirals:Spirals",
    "model": {"width": 8},
    "train": {"epochs": 2, "global_batch": 20},
    "tracking": {"every_steps": 1},
    "sweep": {
        "parameters": {
            "data.points": {"choice": [200, 400]},
            "optimizer.lr": {"choice": [0.01, 0.1]},
        },
        "search": "grid",
        "fuse": 2,
    },
}
Series = dict[tuple[str, int], float]


class Recorder(NullReporter):
    """Keeps the losses, epochs and evaluations of one trial."""

    trials: dict[str, "Recorder"] = {}

    def __init__(self, tracker: Any = None, run: str = "", interval_s: float = 0.0) -> None:
        self.series: Series = {}
        self.trials[run] = self

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            if name in ("train/loss", "train/epoch") or name.startswith(("val/", "test/")):
                self.series[name, step] = value


pytestmark = pytest.mark.thorough


@pytest.fixture
def sweep(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr(engine_module, "TrackerReporter", Recorder)
    monkeypatch.setattr(program_pool, "set_gauge", lambda *_: None)
    monkeypatch.setattr(Program, "compile", lambda self: None)  # traced only, to save time
    write_yaml(SPEC, own_folder / "s.yaml")
    return new_sweep("s.yaml", [], None)


@pytest.fixture
def engine(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    engine = Engine(sweep, None, slots=2)
    yield engine
    assert not ended.is_set(), "the engine ended its process"
    engine._loop.post(_end_thread)
    assert ended.wait(60)


def _end_thread() -> None:
    raise SystemExit


def test_fused_trials_do_what_each_does_alone_on_its_data(
    sweep: Sweep, engine: Engine, tmp_path: Path
) -> None:
    assert distinct_programs(sweep, most=8)[1] == 2
    every = sweep.spec.combinations()
    leases = [engine.start({"trial": number, **chosen}) for number, chosen in enumerate(every)]
    for number, (chosen, lease) in enumerate(zip(every, leases, strict=True)):
        results = [engine.next(lease)]
        while not results[-1]["done"]:
            results.append(engine.next(lease))
        engine.stop(lease)
        spec, workload = resolve(sweep.trial_spec_data(chosen), RunSpec)
        steps = 2 * chosen["data.points"] * 7 // 10 // 20
        assert [result["step"] for result in results] == [steps // 2, steps]
        assert [result["epoch"] for result in results] == [1, 2]

        alone = Recorder()
        train(spec, workload, sweep.dataset_of(spec), tmp_path / f"{number}", alone)
        fused = Recorder.trials[sweep.trial_key(number)].series
        assert fused.keys() == alone.series.keys()
        assert len(fused) > 2 * steps
        assert fused == pytest.approx(alone.series, rel=1e-4, abs=1e-5)
