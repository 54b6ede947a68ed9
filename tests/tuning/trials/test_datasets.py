"""The data sets of a sweep that varies how its data is made: each trial has its own."""

from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import write_yaml
from trainers.data.splits import count_samples
from trainers.spec import RunSpec, resolve
from tuning import sweep as sweeps
from tuning.trials.trial import Sweep, TuneReporter

ROWS = 1797
"""Samples of the digits; those of val and test are left out of the training split."""


def new_sweep(folder: Path, parameters: dict[str, Any], **sections: Any) -> Sweep:
    path = folder / "some.yaml"
    spec = {"workload": "vision", "storage": str(folder / "runs"), **sections}
    write_yaml({**spec, "sweep": {"parameters": parameters, "search": "grid"}}, path)
    return sweeps.new_sweep(str(path), [f"tracking.uri=sqlite:///{folder}/mlflow.db"], None)


def trials(sweep: Sweep) -> list[RunSpec]:
    data = [sweep.trial_spec_data(chosen) for chosen in sweep.spec.combinations()]
    return [resolve(each, RunSpec)[0] for each in data]


def test_every_distinct_section_is_prepared_once_and_each_trial_has_its_own(
    tmp_path: Path,
) -> None:
    sweep = new_sweep(
        tmp_path,
        {"data.val_fraction": {"choice": [0.1, 0.5]}, "optimizer.lr": {"choice": [0.1, 0.2]}},
        train={"steps": 7},
    )
    assert len({*sweep.datasets.values()}) == 2
    assert sweep.dataset in sweep.datasets.values(), "a data set that no trial has was prepared"
    assert len([*(tmp_path / "runs" / "datasets").glob("vision-*")]) == 2
    found = {}
    for spec in trials(sweep):
        folder = sweep.dataset_of(spec)
        val = count_samples(folder, "val")
        assert val == pytest.approx(spec.data["val_fraction"] * ROWS, rel=0.02)
        assert sweep.samples_of(spec) == count_samples(folder, "train") < ROWS - val
        found[spec.data["val_fraction"], spec.optimizer.lr] = folder
    assert len(found) == 4
    assert found[0.1, 0.1] == found[0.1, 0.2] != found[0.5, 0.1]


def test_a_trials_epochs_are_those_of_its_own_data_set(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, {"data.val_fraction": {"choice": [0.1, 0.5]}}, train={"epochs": 2})
    for number, spec in enumerate(trials(sweep)):
        samples = count_samples(sweep.dataset_of(spec), "train")
        last = spec.train.total_steps(samples)
        reporter = TuneReporter(sweep, spec, sweep.trial_folder(number))
        result = reporter.result({"val/loss": 1.0}, last)
        assert result["complete"]
        assert result["epoch"] == pytest.approx(last * spec.train.global_batch / samples)
        assert not reporter.result({"val/loss": 1.0}, last - 1)["complete"]


def test_a_sweep_that_varies_no_data_has_one_data_set(tmp_path: Path) -> None:
    sweep = new_sweep(tmp_path, {"optimizer.lr": {"choice": [0.1, 0.2]}})
    assert {*sweep.datasets.values()} == {sweep.dataset}
    assert all(sweep.dataset_of(spec) == sweep.dataset for spec in trials(sweep))
    resumed = sweeps.resumed_sweep(str(sweep.folder), tmp_path / "runs")
    assert (resumed.dataset, resumed.datasets) == (sweep.dataset, sweep.datasets)


def test_sections_of_which_one_has_other_data(tmp_path: Path) -> None:
    recipes = [{"data": {"val_fraction": 0.5}}, {"optimizer.lr": 0.5}]
    sweep = new_sweep(tmp_path, {"recipe": {"choice": recipes}})
    halves, others = trials(sweep)
    assert sweep.dataset_of(others) == sweep.dataset != sweep.dataset_of(halves)
    assert others.data["val_fraction"] != 0.5
    assert others.optimizer.lr == 0.5
