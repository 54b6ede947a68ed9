"""Scaling studies of probes with round numbers."""

from pathlib import Path

import pytest

from cluster.cost.node_rates import CostSpec
from cluster.cost.user_prices import UserPrices
from trainers.planning.pools import Pool, ProbedPool, ProbeResult, probed_pool
from trainers.planning.step_time import Placement
from trainers.probes.scaling_study import analyze, plot


def measured(steps_s: dict[tuple[int, int], float]) -> ProbedPool:
    """(workers, global batch) -> seconds of a step, on a node of four cores."""
    probes = [
        ProbeResult(
            place=Placement(workers, 1, batch / workers, 4.0),
            batch=batch,
            step_s=step_s,
            spread=0.01,
            start_s=5.0,
            evaluation_s=0.5,
            test_s=0.0,
            save_s=0.1,
            end_s=1.0,
            shares={"communication": 0.1 * (workers > 1)},
            flops=1e6,
            device="x86_64",
            mfu=None,
        )
        for (workers, batch), step_s in steps_s.items()
    ]
    return probed_pool(Pool("cpu", (4,), 4.0), probes, 64)


STEPS_S = {(1, 64): 0.64, (2, 64): 0.4, (2, 128): 0.7, (4, 64): 0.32, (4, 256): 0.8}


def test_strong_and_weak_scaling_are_separate_rows() -> None:
    found = analyze(measured(STEPS_S), UserPrices(), CostSpec(usd_per_h=3.6))
    rows = {(row.mode, row.workers): row for row in found.rows}
    assert set(rows) == {(mode, n) for mode in ("strong", "weak") for n in (1, 2, 4)}
    assert rows["strong", 1].efficiency == rows["weak", 1].efficiency == 1
    assert rows["strong", 4].efficiency == pytest.approx(0.64 / 0.32 / 4)
    assert rows["weak", 4].efficiency == pytest.approx(0.64 / 0.8)
    assert rows["weak", 4].samples_per_s == pytest.approx(320)
    assert rows["strong", 2].communication == 0.1
    assert rows["strong", 2].usd_per_million == pytest.approx(1e6 * 0.4 / 64 * 0.001)
    joules = rows["strong", 2].joules_per_sample
    assert joules is not None
    assert joules.low < joules.middle < joules.high
    assert joules.middle == pytest.approx(4 * 3.0 * 0.4 / 64)
    for row in found.rows:
        assert row.fitted_samples_per_s == pytest.approx(row.samples_per_s, rel=0.25)
    assert found.recommended == 2  # 2 -> 4 brings 40 samples/s, 1 alone has 100


def test_cost_without_a_price_is_unknown() -> None:
    found = analyze(measured(STEPS_S), UserPrices(), CostSpec())
    assert {row.usd_per_million for row in found.rows} == {None}
    assert any("price" in note and "unknown" in note for note in found.notes)


def test_one_number_of_workers_is_a_row_of_both_kinds(tmp_path: Path) -> None:
    found = analyze(measured({(2, 64): 0.4}), UserPrices(), CostSpec())
    assert [(row.mode, row.efficiency) for row in found.rows] == [("strong", 1), ("weak", 1)]
    assert plot(found, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
