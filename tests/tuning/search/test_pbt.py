"""Population based training: what it says of a trial is what the trial was trained with."""

import json
import math
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import cloudpickle
import mlflow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.config import read_yaml
from tests.tuning.one_process_tune import DriverLostError, OneProcessTune, Trial
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.reports.history import read_histories
from trainers.run_folder import TRACKING
from trainers.spec import RunSpec, resolve
from trainers.tracking.mlflow_run import tracked_run
from trainers.tracking.tracker import Tracker
from tuning.search import pbt
from tuning.search.pbt import explored
from tuning.spaces.distributions import Distribution
from tuning.spaces.suggestion import possible_parameters
from tuning.sweep import new_sweep
from tuning.trials import take_over
from tuning.trials.best_spec import best_spec_data, write_best
from tuning.trials.importances import parameter_importances
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import read_leaderboard
from tuning.trials.trial import (
    ENDED_FILE,
    JOURNAL_FILE,
    LAST_RESULT_FILE,
    Sweep,
    last_result,
)

SPEC = """
workload: spirals:Spirals
train: {epochs: 5, global_batch: 70}
optimizer: {schedule: {warmup: 0}}
checkpoint: {keep: 1}
tracking: {every_steps: 1}
sweep:
  parameters:
    optimizer.lr: {loguniform: [1.0e-5, 1.0]}
    optimizer.name: {choice: [adamw, sgd]}
    optimizer.weight_decay: {choice: [0, 0.125, 0.5]}
    model.width: {choice: [8, 16]}
    model.dropout: {uniform: [0, 0.5]}
  scheduler: {name: pbt, every_epochs: 1}
  trials: 4
"""
EPOCH, STEPS = 4, 20


def suggested(number: int) -> dict[str, Any]:
    """Good parameters for the first trials, and bad ones for the last."""
    return {
        "optimizer.lr": [0.02, 0.05, 3e-5, 1e-5][number],
        "optimizer.name": ["adamw", "sgd"][number % 2],
        "optimizer.weight_decay": [0, 0.125, 0.5][number % 3],
        "model.width": [8, 16][number // 2],
        "model.dropout": 0.1 * (number % 3),
    }


def started(folder: Path, *overrides: str) -> Sweep:
    (folder / "s.yaml").write_text(SPEC)
    return new_sweep("s.yaml", list(overrides), "search")


def tune_for(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> OneProcessTune:
    return OneProcessTune(sweep, [suggested(n) for n in range(sweep.spec.trials)], monkeypatch)


class Recorder(NullReporter):
    """Keeps the evaluations of a run in memory."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def log_metrics(self, metrics: Any, step: int) -> None:
        if "val/loss" in metrics:
            self.losses[step] = metrics["val/loss"]


def losses_of(data: dict[str, Any], sweep: Sweep, folder: Path) -> dict[int, float]:
    """Step -> validation loss of a run of its own with this spec."""
    spec, workload = resolve(data, RunSpec)
    torch.set_num_threads(spec.scale.threads or 1)
    recorder = Recorder()
    train(spec, workload, sweep.dataset, folder, recorder)
    return recorder.losses


def assert_reproducible(sweep: Sweep, folder: Path) -> Counter[int]:
    """Each trial's value comes from the schedule of changes that the journal has; to the last bit.

    Returns how many trials there are with so many changes.
    """
    journal = Journal(sweep.folder / JOURNAL_FILE)
    for result in read_leaderboard(sweep).results:
        parts = journal.schedule(result.number, result.changes)
        assert parts is not None
        assert parts[-1][1] == result.parameters
        own = losses_of(best_spec_data(sweep, parts), sweep, folder / str(result.number))
        assert own[result.step] == result.value
    return Counter(result.changes for result in read_leaderboard(sweep).results)


def copies(sweep: Sweep) -> list[Path]:
    return [p for p in sweep.folder.rglob("*") if p.name.startswith(("taken", ".taken"))]


def test_leaderboard_files_tracking_and_best_yaml_have_one_truth(
    own_folder: Path,
    mlflow_server: str,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Any,
) -> None:
    sweep = started(own_folder)
    tracker = Tracker(str(sweep.folder / TRACKING), mlflow_server, "pbt")
    tracker.start(tracked_run(sweep.key, sweep.spec_data, kind="sweep"))
    for number in range(sweep.spec.trials):
        spec_data = sweep.trial_spec_data(suggested(number))
        run = tracked_run(sweep.trial_key(number), spec_data, sweep.key, "trial")
        tracker.start(run)
    tune_for(sweep, monkeypatch).run(tracker)
    wait_until(lambda: tracker.pending()[0] == 0, lambda: str(tracker.pending()))

    board, histories = read_leaderboard(sweep), read_histories(sweep.folder)
    journal = Journal(sweep.folder / JOURNAL_FILE)
    changed = [result for result in board.results if result.changes]
    assert changed, "no trial took over another one's state"
    client = mlflow.MlflowClient(mlflow_server)
    for result in board.results:
        number, key = result.number, sweep.trial_key(result.number)
        assert result.value == last_result(sweep.trial_folder(number))["val/loss"]
        assert result.parameters == journal.parameters_after(number)
        series = histories[key].series
        steps = list(series["val/loss"].steps)
        assert steps == sorted(set(steps))
        assert (steps[-1], series["val/loss"].values[-1]) == (STEPS, result.value)
        assert series["optimizer.lr"].values[-1] == result.parameters["optimizer.lr"]
        run = client.get_run(tracker.read(key)["run_id"])
        assert run.data.metrics["val/loss"] == result.value
        assert run.data.metrics["optimizer.lr"] == result.parameters["optimizer.lr"]
        assert run.data.metrics["model.dropout"] == result.parameters["model.dropout"]
        words = run.data.tags.get("heliostat.changes", "")
        assert words.count("step ") == result.changes
        parts = journal.schedule(number, result.changes)
        own = losses_of(best_spec_data(sweep, parts), sweep, own_folder / key)
        past = dict(zip(steps, series["val/loss"].values, strict=True))
        since = parts[-1][0]
        assert {s: v for s, v in past.items() if s >= since} == {
            s: v for s, v in own.items() if s >= since
        }
    tracker.close()

    write_best(sweep, board.best, own_folder / "best.yaml")
    text = (own_folder / "best.yaml").read_text()
    assert f"val/loss {board.best.value!r} at step {STEPS}" in text
    assert "gives that very value" in text
    best = losses_of(read_yaml(own_folder / "best.yaml"), sweep, own_folder / "best")
    assert best[STEPS] == board.best.value
    assert set(parameter_importances(sweep.spec, journal)) <= set(sweep.spec.parameters)


def test_checkpoints_are_few_and_none_is_left_for_others(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = started(own_folder)
    most = 0

    def count(result: dict[str, Any]) -> None:
        nonlocal most
        folders = [p.parent for p in sweep.folder.rglob("manifest.json")]
        most = max(most, *Counter(folder.parent for folder in folders).values())

    tune_for(sweep, monkeypatch).run(edit=count)
    assert assert_reproducible(sweep, own_folder / "again")[0] < sweep.spec.trials
    assert most <= 2 + 1 + 1, "the last two, the best one, and one that was offered"
    assert copies(sweep) == []
    assert not (sweep.folder / "tune").exists()


def test_checkpoints_at_a_uri_are_taken_over_as_well(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole sweep is the same as with checkpoints in its folder."""
    monkeypatch.setattr("trainers.stores.cache_folder", lambda: own_folder / "cache")
    found = []
    for place in (None, f"file://{own_folder}/bucket"):
        sweep = started(own_folder, *([f"checkpoint.uri={place}"] if place else []))
        tune_for(sweep, monkeypatch).run()
        changes = Journal(sweep.folder / JOURNAL_FILE).changes
        values = {r.number: r.value for r in read_leaderboard(sweep).results}
        found.append((changes, values))
        sweep.folder.rename(own_folder / f"done-{len(found)}")
    assert found[0] == found[1]
    assert found[0][0]
    assert not list((own_folder / "bucket").rglob("taken*"))


POINTS = {
    "before the copy": (pbt, "offer_state", False),
    "after the copy": (pbt, "offer_state", True),
    "after the journal": (Journal, "record_change", True),
    "before the trial has it": (Checkpoints, "replace_by", False),
    "after the trial has it": (Checkpoints, "replace_by", True),
    "when the tracker was told": (take_over, "_track_parameters", False),
}


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("after the copy", 2),
        ("before the trial has it", 1),
        *(
            pytest.param(point, count, marks=pytest.mark.slow)
            for point in POINTS
            for count in (1, 3)
        ),
    ],
)
def test_a_driver_that_is_killed_leaves_whole_take_overs(
    point: str, count: int, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune's own state is older: it has the parameters with which the trials began."""
    sweep = started(own_folder)
    owner, name, acts = POINTS[point]
    calls, original = 0, getattr(owner, name)

    def killed(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not acts:
            raise DriverLostError
        answer = original(*args, **options)
        if calls == count:
            raise DriverLostError
        return answer

    with monkeypatch.context() as patches:
        patches.setattr(owner, name, killed)
        with pytest.raises(DriverLostError):
            tune_for(sweep, monkeypatch).run()
    tune_for(sweep, monkeypatch).run()
    assert all(result.complete for result in read_leaderboard(sweep).results)
    changes = assert_reproducible(sweep, own_folder / "again")
    assert changes[0] < sweep.spec.trials
    assert copies(sweep) == []


def test_trials_whose_metric_is_nan_are_the_worst(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take over; nobody takes over from them."""
    sweep = started(own_folder)

    def spoil(result: dict[str, Any]) -> None:
        if "changes" not in result and tune._running.config["trial"] == 0:
            result["val/loss"] = math.nan

    tune = tune_for(sweep, monkeypatch)
    tune.run(edit=spoil)
    changes = Journal(sweep.folder / JOURNAL_FILE).changes
    assert 0 in changes
    assert not any(c.donor == 0 and not c.donor_changes for own in changes.values() for c in own)


def test_nobody_goes_on_from_a_trial_that_has_ended(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best ones have: one complete, one stopped by hand. Tune may not know after a resume."""
    sweep = started(own_folder)
    tune = tune_for(sweep, monkeypatch)
    loss = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}

    def result(number: int) -> dict[str, Any]:
        complete = number == 0
        step = STEPS if complete else 3 * EPOCH
        return {"val/loss": loss[number], "step": step, "epoch": step / EPOCH, "complete": complete}

    for number in loss:
        folder = sweep.trial_folder(number)
        folder.mkdir(parents=True)
        (folder / LAST_RESULT_FILE).write_text(json.dumps(result(number)))
    (sweep.trial_folder(1) / ENDED_FILE).write_text("{}")
    asked: list[int] = []
    monkeypatch.setattr(pbt, "offer_state", lambda donor, *_: asked.append(int(donor.name)))
    for resumed in (False, True):
        scheduler = pbt.PopulationBasedTraining(sweep)
        for trial in tune.trials:
            trial.status = "RUNNING"
            scheduler.on_trial_add(tune, trial)
        for trial in tune.trials:
            number = trial.config["trial"]
            told = result(number) if not resumed else {**result(number), "epoch": 8.0}
            assert scheduler.on_trial_result(tune, trial, told) == "CONTINUE"
    assert asked
    assert set(asked) == {2}


def test_parameters_of_an_earlier_release_are_of_unknown_origin(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changed them in Tune's state only."""
    sweep = started(own_folder)
    tune = tune_for(sweep, monkeypatch)
    scheduler = pickle.loads(cloudpickle.dumps(pbt.PopulationBasedTraining(sweep)))
    other = {**suggested(0), "optimizer.lr": 0.05}
    scheduler.on_trial_add(tune, Trial({"trial": 0, **other}))
    scheduler.on_trial_add(tune, tune.trials[1])
    journal = Journal(sweep.folder / JOURNAL_FILE)
    assert journal.parameters_after(0) == other
    assert journal.schedule(0, 1) is None
    assert 1 not in journal.changes


floats = st.floats(1e-3, 1e3)
numbers = st.one_of(
    st.tuples(floats, floats).map(lambda ends: {"uniform": sorted(ends)}),
    st.tuples(floats, floats).map(lambda ends: {"loguniform": sorted(ends)}),
    st.tuples(floats, floats).map(lambda ends: {"uniform": sorted(ends), "step": 0.25}),
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda ends: {"integer": sorted(ends)}),
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda ends: {"log_integer": sorted(ends)}),
    st.lists(st.sampled_from([1, True, 1.0, "a", None, [1, 2], {"b": 3}]), min_size=1).map(
        lambda choice: {"choice": choice}
    ),
)


class TestExplored:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(numbers, min_size=1, max_size=4), st.integers())
    def test_values_stay_among_those_of_the_space(self, kinds: list[Any], seed: int) -> None:
        space = {
            f"optimizer.{n}": Distribution.model_validate(kind) for n, kind in enumerate(kinds)
        }
        rng = random.Random(seed)
        now = {path: distribution.sample(rng) for path, distribution in space.items()}
        for _ in range(5):
            now = explored(space, now, rng)
            for path, distribution in space.items():
                value = now[path]
                if distribution.choice is not None:
                    assert any(
                        value is c or (type(value), value) == (type(c), c)
                        for c in distribution.choice
                    )
                else:
                    assert distribution.bounds[0] <= value <= distribution.bounds[1]
                    assert distribution.values() is None or value in distribution.values()
                    assert isinstance(value, int) == distribution.is_integer

    def test_small_whole_numbers_and_neighbours_in_a_choice_are_reached(self) -> None:
        space = {
            "optimizer.a": Distribution.model_validate({"integer": [0, 4]}),
            "optimizer.b": Distribution.model_validate({"choice": ["x", "y", "z"]}),
        }
        seen: dict[str, set[Any]] = {path: set() for path in space}
        rng = random.Random(0)
        for _ in range(50):
            for path, value in explored(space, {"optimizer.a": 1, "optimizer.b": "y"}, rng).items():
                seen[path].add(value)
        assert seen["optimizer.a"] >= {0, 2}
        assert seen["optimizer.b"] >= {"x", "z"}

    def test_what_the_state_does_not_fit_is_taken_over_as_it_is(self) -> None:
        space = {
            path: Distribution.model_validate(kind)
            for path, kind in {
                "model.width": {"integer": [1, 99]},
                "train.global_batch": {"integer": [1, 99]},
                "train.epochs": {"uniform": [1, 99]},
                "model.kind": {"choice": ["a", "b"]},
                "setup": {"choice": [{"model.width": 3}, {"model.width": 4}]},
            }.items()
        }
        rng = random.Random(0)
        for _ in range(20):
            chosen = next(possible_parameters(space, lambda _, d: [d.sample(rng)]))
            assert explored(space, chosen, rng) == chosen

    def test_conditions_hold_after_a_change_too(self) -> None:
        space = {
            path: Distribution.model_validate(kind)
            for path, kind in {
                "optimizer.name": {"choice": ["adamw", "sgd"]},
                "optimizer.momentum": {"uniform": [0.5, 0.9], "when": {"optimizer.name": "sgd"}},
            }.items()
        }
        rng = random.Random(0)
        now: dict[str, Any] = {"optimizer.name": "adamw"}
        names = set()
        for _ in range(30):
            now = explored(space, now, rng)
            names.add(now["optimizer.name"])
            assert ("optimizer.momentum" in now) == (now["optimizer.name"] == "sgd")
        assert names == {"adamw", "sgd"}
