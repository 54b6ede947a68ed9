"""What trials reserve, how many have room, and what no machine can give."""

from typing import Any

import pytest
import ray

from cluster.base.config import validate
from cluster.connection.ray_connection import missing_resources, room_for
from tuning.spaces.space import SweepRunSpec
from tuning.trial_resources import cluster_capacity, sweep_shortage, trial_scales, tune_resources


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """The resources of the cluster's machines, to be filled; beside them is one that is gone."""
    found: list[dict[str, float]] = []

    def nodes() -> list[dict[str, Any]]:
        alive = [{"Alive": True, "Resources": each} for each in found]
        return [*alive, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]

    def total() -> dict[str, float]:
        names = {name for each in found for name in each}
        return {name: sum(each.get(name, 0) for each in found) for name in names}

    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(ray, "cluster_resources", total)
    return found


def spec(parameters: dict[str, Any] | None = None, **sections: Any) -> SweepRunSpec:
    sweep = {"parameters": parameters or {"optimizer.lr": {"uniform": [0.1, 0.2]}}}
    own = sections.pop("sweep", {})
    data = {"workload": "vision", "sweep": {**sweep, "trials": 100, **own}, **sections}
    return validate(SweepRunSpec, data)


def test_a_trial_fits_on_one_machine_or_not_at_all(machines: list[dict[str, float]]) -> None:
    machines += [{"CPU": 3.0}, {"CPU": 3.0, "GPU": 1.0}]
    two = spec(sweep={"resources": {"cpu": 2}})
    assert cluster_capacity(two) == 2, "a trial was spread over machines"
    assert sweep_shortage(two) is None
    four = spec(sweep={"resources": {"cpu": 4}})
    assert sweep_shortage(four) == (
        "sweep.resources: 1 x 4 CPU requested, the cluster's machines have room for 0"
    )
    many = spec(sweep={"resources": {"cpu": 64}})
    assert sweep_shortage(many) == "sweep.resources: 1 x 64 CPU requested, the cluster has 6"
    gpus = spec(sweep={"resources": {"gpu": 2}})
    assert sweep_shortage(gpus) == "sweep.resources: 1 x 2 GPU requested, the cluster has 1"
    third = spec(sweep={"resources": {"cpu": 0.1, "gpu": 0.1}})
    assert cluster_capacity(third) == 10


def test_workers_count_machine_by_machine_too(machines: list[dict[str, float]]) -> None:
    machines += [{"CPU": 3.0}, {"CPU": 3.0}]
    assert room_for({"CPU": 2}) == 2
    assert missing_resources(2, {"CPU": 2}) is None
    assert missing_resources(3, {"CPU": 2}) == (
        "3 x 2 CPU requested, the cluster's machines have room for 2"
    )
    wide = spec(scale={"workers": 2, "accelerator": "cpu"})
    assert cluster_capacity(wide) == 3
    wider = spec(scale={"workers": 8, "accelerator": "cpu"})
    assert sweep_shortage(wider) == "scale.workers: 8 x 1 CPU requested, the cluster has 6"


def test_trials_of_different_scale_reserve_their_own(machines: list[dict[str, float]]) -> None:
    machines += [{"CPU": 6.0}]
    parameters = {"scale.workers": {"choice": [1, 2, 8]}, "optimizer.lr": {"uniform": [0.1, 1]}}
    varied = spec(parameters, scale={"accelerator": "cpu"}, sweep={"resources": {"cpu": 2}})
    assert [scale.workers for scale in trial_scales(varied)] == [1, 2, 8]
    assert sweep_shortage(varied) == "scale.workers: 8 x 1 CPU requested, the cluster has 6"
    reserved = tune_resources(varied)
    assert reserved({"trial": 0, "scale.workers": 1}).bundles == [{"CPU": 2}]
    assert reserved({"trial": 1, "scale.workers": 2}).bundles == [{"memory": 1}], "no part of a CPU"
    narrow = spec(
        {"scale.workers": {"choice": [1, 2]}, "optimizer.lr": {"uniform": [0.1, 1]}},
        scale={"accelerator": "cpu"},
    )
    assert sweep_shortage(narrow) is None
    assert cluster_capacity(narrow) == 3
    alike = tune_resources(spec(sweep={"resources": {"cpu": 2, "gpu": 0.5}}))
    assert alike.bundles == [{"CPU": 2, "GPU": 0.5}]
