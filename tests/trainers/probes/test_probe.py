"""Probes of a real run on a real Ray."""

from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import apply_overrides, with_value
from cluster.base.errors import ClusterError, TrainingError
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import count_samples
from trainers.planning.pools import Pool
from trainers.planning.step_time import Placement, Prediction
from trainers.probes.probe import ProbeTarget, probe, probe_pool, wait_for_capacity
from trainers.runs.run import resolved_data
from trainers.spec import RunSpec, find_spec, resolve


@pytest.fixture
def digits(tmp_path: Path) -> dict[str, Any]:
    changes = [f"storage={tmp_path}", "model.width=4", "train.epochs=2"]
    spec, _ = resolve(apply_overrides(find_spec("digits")[1], changes), RunSpec)
    return resolved_data(spec)


def test_probes_measure_each_batch_and_leave_no_files(
    ray_cluster: str, digits: dict[str, Any], tmp_path: Path
) -> None:
    _, workload = resolve(digits, RunSpec)
    dataset = prepare_dataset(workload, tmp_path)
    pool = Pool("cpu", (2,), 4.0)
    lines: list[str] = []
    found = probe_pool(ProbeTarget(digits, dataset, 0.3), pool, lines.append)
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
    assert len(lines) == 2
    assert count_samples(dataset, "train") == 1258
    assert sorted(path.name for path in tmp_path.iterdir()) == ["datasets"]


def test_a_busy_cluster_is_an_error_after_a_while(ray_cluster: str, digits: dict[str, Any]) -> None:
    greedy = with_value(digits, "scale.cpus_per_worker", 1000)
    with pytest.raises(ClusterError, match=r"the cluster is busy: 1000 CPU are not free"):
        wait_for_capacity(greedy, timeout_s=0)


def test_an_error_in_the_users_code_is_raised_as_one_line(
    ray_cluster: str, digits: dict[str, Any], modules: Path, tmp_path: Path
) -> None:
    faulty = {**digits, "workload": "faulty:Faulty"}
    faulty["data"] = {**digits["data"], "fault": "raise", "marker": str(tmp_path / "marker")}
    _, workload = resolve(faulty, RunSpec)
    dataset = prepare_dataset(workload, tmp_path)
    with pytest.raises(TrainingError, match="no such feature"):
        probe(ProbeTarget(faulty, dataset, 0.3), Pool("cpu", (2,), 4.0), 1, [64])
