"""A trial that is started again tells Tune each evaluation once; in one process, without Ray."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from cluster.base.errors import SpecError
from trainers.checkpoints.checkpoints import find_checkpoint
from trainers.checkpoints.manifest import read_manifest
from trainers.engine.loop import train
from trainers.spec import RunSpec, resolve
from trainers.tracking.reporter import TrackerReporter
from tuning.sweep import new_sweep
from tuning.trials import trial as trials
from tuning.trials.trial import LAST_RESULT_FILE, Sweep, TuneReporter, last_result

SPEC = """
workload: spirals:Spirals
train: {epochs: 4, global_batch: 70}
sweep:
  parameters: {optimizer.lr: {loguniform: [1.0e-4, 1.0]}}
  trials: 2
"""


@pytest.fixture
def sweep(own_folder: Path) -> Sweep:
    (own_folder / "s.yaml").write_text(SPEC)
    return new_sweep("s.yaml", [], "search")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """The step and the loss of each result that Tune is told."""
    results: list[tuple[int, float]] = []

    def report(result: dict[str, Any]) -> None:
        results.append((result["step"], result["val/loss"]))

    monkeypatch.setattr(tune, "report", report)
    for method in ("on_step_end", "log_note"):
        monkeypatch.setattr(TrackerReporter, method, lambda *_: None)
    return results


class _DriverLostError(BaseException):
    pass


def train_trial(
    sweep: Sweep, number: int, monkeypatch: pytest.MonkeyPatch, lost_at: int = 0
) -> Path:
    """Train a trial as `run_trial` does; the driver is lost before it hears of step `lost_at`."""
    folder = sweep.trial_folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    spec, workload = resolve(sweep.executed_spec_data({"optimizer.lr": 0.01}), RunSpec)
    known_step = last_result(folder).get("step", 0)
    reporter = trials._TrackerAndTuneReporter(
        None, sweep.trial_key(number), TuneReporter(sweep, spec, folder, known_step)
    )

    def flush(self: TrackerReporter) -> None:
        newest = max((p.name for p in (folder / "checkpoints").glob("step-*")), default="")
        if newest == f"step-{lost_at:08d}":
            raise _DriverLostError

    monkeypatch.setattr(TrackerReporter, "flush", flush)
    try:
        train(spec, workload, sweep.dataset, folder, reporter)
    except _DriverLostError:
        assert lost_at
    return folder


@pytest.mark.parametrize("lost_at", [8, 16])
def test_an_evaluation_that_was_saved_but_not_reported_is_reported(
    lost_at: int, sweep: Sweep, told: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_trial(sweep, 0, monkeypatch)
    undisturbed = list(told)
    assert [step for step, _ in undisturbed] == [4, 8, 12, 16]
    told.clear()
    folder = train_trial(sweep, 1, monkeypatch, lost_at)
    assert told == undisturbed[: lost_at // 4 - 1]
    assert last_result(folder)["step"] == lost_at - 4
    train_trial(sweep, 1, monkeypatch)
    assert told == undisturbed
    assert last_result(folder)["complete"]


def test_an_evaluation_that_was_reported_is_not_reported_again(
    sweep: Sweep, told: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_trial(sweep, 0, monkeypatch)
    told.clear()
    train_trial(sweep, 0, monkeypatch)
    assert told == []
    assert last_result(folder)["step"] == 16


def test_the_newest_checkpoint_of_a_trial_of_several_workers_is_reported(
    sweep: Sweep, told: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tracker has its metrics already, and passes them on once only."""
    folder = train_trial(sweep, 0, monkeypatch)
    expected = told[-1]
    told.clear()
    before = {**last_result(folder), "step": 12, "complete": False}
    (folder / LAST_RESULT_FILE).write_text(json.dumps(before))
    spec, _ = resolve(sweep.executed_spec_data({"optimizer.lr": 0.01}), RunSpec)
    for known_step in (12, 16):
        TuneReporter(sweep, spec, folder, known_step).report_saved()
    assert told == [expected]
    assert last_result(folder)["complete"]


def test_a_machine_that_has_not_downloaded_the_data_set_counts_its_samples(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the data set that the driver names is in the driver's cache."""
    (own_folder / "s.yaml").write_text(SPEC)
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / "driver")
    sweep = new_sweep("s.yaml", [f"datasets=file://{tmp_path}/bucket"], "search")
    (tmp_path / "driver").rename(tmp_path / "elsewhere")
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: tmp_path / "worker")
    assert sweep.samples == 280
    assert not sweep.dataset.exists()


def test_the_best_evaluation_is_in_the_last_result_and_its_checkpoint_is_kept(
    own_folder: Path, told: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest loss is the first one. A restart remembers it."""
    (own_folder / "s.yaml").write_text(SPEC)
    changes = ["sweep.select=best", "sweep.mode=max", "checkpoint.keep=1"]
    sweep = new_sweep("s.yaml", changes, "search")
    folder = train_trial(sweep, 0, monkeypatch, lost_at=8)
    train_trial(sweep, 0, monkeypatch)
    assert max(told, key=lambda each: each[1]) == told[0]
    last = last_result(folder)
    assert (last["best/step"], last["best/val/loss"]) == told[0]
    assert (last["step"], last["val/loss"]) == told[-1]
    checkpoint = find_checkpoint(f"{folder}@{told[0][0]}", own_folder)
    assert read_manifest(checkpoint)["metrics"]["val/loss"] == told[0][1]
    with pytest.raises(SpecError, match=r"@8: no checkpoint of step 8 there"):
        find_checkpoint(f"{folder}@8", own_folder)
