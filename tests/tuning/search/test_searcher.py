"""Searches that forget nothing: a suggestion is on disk before Tune gets it."""

import pickle
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.search import Searcher

from tuning.search.searcher import JournaledSearcher
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal

PARAMETERS: dict[str, Any] = {
    "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
    "model.width": {"integer": [4, 64]},
    "model.blocks": {"choice": [[1], [1, 1], [2, 2]]},
    "train.seed": {"choice": [0, None, "x", True]},
}


def sweep(**fields: Any) -> SweepSpec:
    return SweepSpec(**{"parameters": PARAMETERS, "trials": 12, "mode": "min", **fields})


def ended(search: JournaledSearcher, trial_id: str, value: float, complete: bool = True) -> None:
    result = {"val/loss": value, "step": 10, "complete": complete}
    search.on_trial_complete(trial_id, result)


@pytest.mark.parametrize("name", ["random", "tpe", "cmaes"])
def test_every_search_stays_within_the_space_and_ends(name: str, tmp_path: Path) -> None:
    search = JournaledSearcher(sweep(search=name), tmp_path / "journal")
    for number in range(12):
        config = search.suggest(f"t{number}")
        assert isinstance(config, dict)
        assert config["trial"] == number
        assert 1e-4 <= config["optimizer.lr"] <= 1e-1
        assert config["model.width"] in range(4, 65)
        assert config["model.blocks"] in PARAMETERS["model.blocks"]["choice"]
        assert config["train.seed"] in PARAMETERS["train.seed"]["choice"]
        ended(search, f"t{number}", number / 3, complete=number % 2 == 0)
    assert search.suggest("t12") == Searcher.FINISHED


def test_tpe_learns_where_the_good_values_are(tmp_path: Path) -> None:
    spec = sweep(parameters={"optimizer.lr": {"uniform": [0.0, 1.0]}}, trials=60)
    search = JournaledSearcher(spec, tmp_path / "journal")
    tried = []
    for number in range(60):
        lr = search.suggest(f"t{number}")["optimizer.lr"]
        tried.append(abs(lr - 0.7))
        ended(search, f"t{number}", tried[-1])
    assert statistics.median(tried[30:]) < 0.6 * statistics.median(tried[:10])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_restored_search_suggests_exactly_the_lost_trials_again(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Tune's snapshot may be older than the journal by any number of trials."""
    folder = tmp_path_factory.mktemp("search")
    search = JournaledSearcher(sweep(search="random"), folder / "journal")
    snapshot_at = data.draw(st.integers(0, 8))
    asked = data.draw(st.integers(snapshot_at, 8))
    suggested = {}
    pickled = pickle.dumps(search)
    for number in range(asked):
        if number == snapshot_at:
            search.save(str(folder / "snapshot"))
        suggested[number] = search.suggest(f"t{number}")
    if asked == snapshot_at:
        search.save(str(folder / "snapshot"))
    restored: JournaledSearcher = pickle.loads(pickled)
    restored.restore(str(folder / "snapshot"))
    again = [restored.suggest(f"new{n}") for n in range(12 - snapshot_at)]
    assert again[: asked - snapshot_at] == [suggested[n] for n in range(snapshot_at, asked)]
    assert [config["trial"] for config in again] == list(range(snapshot_at, 12))
    assert restored.suggest("one more") == Searcher.FINISHED


def test_a_restored_search_knows_how_the_trials_ended(tmp_path: Path) -> None:
    search = JournaledSearcher(sweep(), tmp_path / "journal")
    for number in range(3):
        search.suggest(f"t{number}")
    ended(search, "t0", 0.5)
    ended(search, "t1", 0.7, complete=False)
    search.on_trial_complete("t2", {}, error=True)
    restored: JournaledSearcher = pickle.loads(pickle.dumps(search))
    states = [(trial.state.name, trial.value) for trial in restored._search.trials]
    assert states == [("COMPLETE", 0.5), ("PRUNED", 0.7), ("FAIL", None)]
    assert restored._search.trials[1].intermediate_values == {10: 0.7}


def test_a_trial_whose_metric_is_nan_is_the_worst_one(tmp_path: Path) -> None:
    """It is not ignored: its parameters are those to keep away from."""
    search = JournaledSearcher(sweep(), tmp_path / "journal")
    search.suggest("t0")
    ended(search, "t0", float("nan"))
    (trial,) = search._search.trials
    assert (trial.state.name, trial.value, trial.intermediate_values) == ("PRUNED", None, {})


def test_the_end_of_a_trial_has_all_objectives_and_constraints(tmp_path: Path) -> None:
    """The time on the device of a trial that was stopped after a quarter counts four times."""
    spec = sweep(
        objective=["val/loss min", "val/accuracy max", "cost_usd min"],
        constraints=["val/latency_ms < 10"],
    )
    search = JournaledSearcher(spec, tmp_path / "journal", epochs_per_trial=8.0)
    metrics = {"val/loss": 0.5, "val/accuracy": 0.75, "val/latency_ms": 12.0}
    for number, (epoch, complete) in enumerate([(8.0, True), (2.0, False)]):
        search.suggest(f"t{number}")
        progress = {"step": 10, "epoch": epoch, "device_s": 3.0, "complete": complete}
        search.on_trial_complete(f"t{number}", {**metrics, **progress})
    ends = Journal(tmp_path / "journal").ends
    assert [ends[number]["losses"] for number in (0, 1)] == [[0.5, -0.75, 3.0], [0.5, -0.75, 12.0]]
    assert ends[0]["violations"] == {"val/latency_ms < 10": 2.0}
    assert search._search.trials[1].values == [0.5, -0.75, 12.0]
    assert search._search.trials[1].constraints == {"val/latency_ms < 10": 2.0}


def test_the_value_that_counts_is_told(tmp_path: Path) -> None:
    search = JournaledSearcher(sweep(select="best"), tmp_path / "journal")
    search.suggest("t0")
    last = {"val/loss": 0.9, "step": 30, "complete": True}
    result = {**last, "best/val/loss": 0.25, "best/step": 20}
    search.on_trial_complete("t0", result)
    assert search._search.trials[0].value == 0.25


def test_trials_that_tune_does_not_know_are_looked_for_once(tmp_path: Path) -> None:
    """Not at each suggestion: that would be quadratic in the number of trials."""
    spec = sweep(search="random", trials=50)
    search = JournaledSearcher(spec, tmp_path / "journal")
    for number in range(20):
        search.suggest(f"t{number}")
    again = JournaledSearcher(spec, tmp_path / "journal")
    numbers = [again.suggest(f"new{number}")["trial"] for number in range(25)]
    assert numbers == list(range(25))
    assert again._unknown == []
