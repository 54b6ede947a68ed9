"""Probes: what is made of the times that the loop's reports give."""

import time
from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import apply_overrides, with_value
from cluster.base.errors import ClusterError, TrainingError
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import count_samples
from trainers.planning.pools import Pool
from trainers.planning.step_time import Placement, Prediction
from trainers.runs.probe import (
    ProbeTarget,
    _TimingReporter,
    probe,
    probe_pool,
    steady_step_time,
    wait_for_capacity,
)
from trainers.runs.run import resolved_data
from trainers.spec import RunSpec, find_spec, resolve


def test_the_first_steps_and_the_last_do_not_count() -> None:
    durations = [9.0, 5.0, *[0.5] * 20, 30.0]
    ticks = [sum(durations[: i + 1]) for i in range(len(durations))]
    assert steady_step_time(ticks) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))


def test_the_spread_is_that_of_stretches_of_steps() -> None:
    def spread(durations: list[float]) -> float:
        ticks = [sum(durations[: i + 1]) for i in range(len(durations))]
        return steady_step_time([0.0, 0.0, *ticks, ticks[-1]])[1]

    uneven = spread([0.4, 0.6] * 50)
    drifting = spread([0.4] * 50 + [0.6] * 50)
    assert uneven < 0.05 < drifting


def test_the_loop_is_watched_by_what_it_reports() -> None:
    watch = _TimingReporter(0.2)
    assert not watch.should_stop()
    began = time.perf_counter()
    while not watch.should_stop():
        time.sleep(0.01)
        watch.on_step_end(len(watch.step_ends) + 1)
    assert time.perf_counter() - began >= 0.2
    watch.log_metrics({"train/loss": 1.0, "perf/step_s": 0.5, "perf/data_share": 0.25}, 9)
    time.sleep(0.05)
    watch.log_metrics({"val/loss": 1.0}, 9)
    time.sleep(0.15)
    watch.log_metrics({"val/loss": 1.0, "test/loss": 2.0}, 10)
    assert watch.evaluation_s == pytest.approx(0.05, abs=0.04)
    assert watch.test_s == pytest.approx(0.15 - watch.evaluation_s, abs=0.04)
    assert watch.shares() == {"data": 0.25, "compute": 0, "communication": 0, "other": 0}
    assert watch.flop_per_sample() is None
    assert not _TimingReporter(0).should_stop()  # one that is to go on to its last step


@pytest.fixture
def digits(tmp_path: Path) -> dict[str, Any]:
    changes = [f"storage={tmp_path}", "model.width=4", "train.epochs=2"]
    spec, _ = resolve(apply_overrides(find_spec("digits")[1], changes), RunSpec)
    return resolved_data(spec)


def test_probes_on_a_real_ray_leave_nothing_behind(
    ray_cluster: str, digits: dict[str, Any], tmp_path: Path
) -> None:
    _, workload = resolve(digits, RunSpec)
    dataset = prepare_dataset(workload, tmp_path)
    pool = Pool("cpu", (2,), 4.0)
    told: list[str] = []
    found = probe_pool(ProbeTarget(digits, dataset, 0.3), pool, told.append)
    seen = {(each.place.workers, each.batch): each for each in found.probes}
    assert seen.keys() == {(1, 64), (1, 32), (2, 64), (2, 32)}
    for (workers, batch), each in seen.items():
        assert each.place == Placement(workers, 1, batch / workers, found.pool.cores)
        for part in (each.step_s, each.start_s, each.evaluation_s, each.save_s, each.end_s):
            assert 0 < part < 300
        assert each.flops is not None
        assert each.flops > 1e5
        assert sum(each.shares.values()) == pytest.approx(1, abs=0.1)
    assert seen[2, 64].shares["communication"] > 0
    assert isinstance(found.predict(2), Prediction)
    assert len(told) == 2
    assert count_samples(dataset, "train") == 1258
    assert sorted(path.name for path in tmp_path.iterdir()) == ["datasets"]


def test_a_busy_cluster_is_told(ray_cluster: str, digits: dict[str, Any]) -> None:
    greedy = with_value(digits, "scale.cpus_per_worker", 1000)
    with pytest.raises(ClusterError, match=r"the cluster is busy: 1000 CPU are not free"):
        wait_for_capacity(greedy, timeout_s=0)


def test_what_fails_in_a_probe_is_told_in_a_line(
    ray_cluster: str, digits: dict[str, Any], modules: Path, tmp_path: Path
) -> None:
    faulty = {**digits, "workload": "faulty:Faulty"}
    faulty["data"] = {**digits["data"], "fault": "raise", "marker": str(tmp_path / "marker")}
    _, workload = resolve(faulty, RunSpec)
    dataset = prepare_dataset(workload, tmp_path)
    with pytest.raises(TrainingError, match="no such feature"):
        probe(ProbeTarget(faulty, dataset, 0.3), Pool("cpu", (2,), 4.0), 1, [64])
