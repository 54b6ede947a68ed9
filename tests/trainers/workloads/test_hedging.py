"""`hedging` against known results for prices, deltas and errors; its paths and its network."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from cluster.base.config import apply_overrides, validate
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_splits
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, find_spec, resolve
from trainers.workloads.hedging.workload import (
    PATHS_PER_PART,
    Hedging,
    PathPart,
    black_scholes_delta,
    black_scholes_price,
    remaining_deviation,
    terminal_wealth,
)
from tuning.spaces.space import SweepRunSpec, check_parameters


def hedging(model: dict[str, Any] | None = None, **data: Any) -> Hedging:
    return Hedging(validate(Hedging.Data, data), validate(Hedging.Model, model or {}))


@pytest.fixture(scope="module")
def price() -> torch.Tensor:
    """The paths of a part, float64."""
    rows = hedging().part(PathPart("test", 4), {})["test"]
    values = np.frombuffer(b"".join(rows["price"].to_pylist()), np.float32)
    return torch.from_numpy(values.reshape(PATHS_PER_PART, -1).copy())


class TestPaths:
    def test_are_geometric_brownian_motions(self, price: torch.Tensor) -> None:
        data = hedging().data
        assert (price[:, 0] == 1).all()
        steps = price.double().log().diff(dim=1)
        sd = data.volatility * math.sqrt(data.years / data.rebalancings)
        assert steps.std().item() == pytest.approx(sd, rel=0.01)
        assert steps[:, 3:4].T.corrcoef().item() == 1
        assert abs(torch.corrcoef(steps.T).fill_diagonal_(0)).max() < 0.03
        assert price[:, -1].mean().item() == pytest.approx(1, abs=1e-3)  # a fair game

    def test_come_in_mirrored_pairs(self, price: torch.Tensor) -> None:
        up, down = price.double().log()[0::2], price.double().log()[1::2]
        drift = hedging().data.volatility ** 2 * hedging().data.years
        assert torch.allclose((up + down)[:, -1], torch.tensor(-drift).double(), atol=1e-6)

    def test_a_seed_determines_a_part(self) -> None:
        parts = [hedging().part(PathPart("train", seed), {})["train"] for seed in (1, 1, 2)]
        assert parts[0].equals(parts[1])
        assert not parts[0].equals(parts[2])


class TestKnownResults:
    def test_the_price_is_the_mean_payoff(self, price: torch.Tensor) -> None:
        owed = (price[:, -1].double() - 1).clamp(min=0)
        error = owed.std().item() / math.sqrt(len(owed))
        assert abs(owed.mean().item() - black_scholes_price(hedging().data)) < 4 * error

    def test_the_delta_is_the_derivative_of_the_price(self) -> None:
        data = hedging(rebalancings=1, years=0.5, volatility=0.3).data
        sd = 0.3 * math.sqrt(0.5)

        def value(s: float) -> float:
            d = math.log(s) / sd + sd / 2
            return float(s * norm.cdf(d) - norm.cdf(d - sd))

        assert value(1.0) == pytest.approx(black_scholes_price(data), abs=1e-12)
        for s in (0.7, 1.0, 1.2):
            (delta,) = black_scholes_delta(data, torch.tensor([[s, 1.0]]).double())[0].tolist()
            assert delta == pytest.approx((value(s + 1e-5) - value(s - 1e-5)) / 2e-5, abs=1e-6)

    def test_the_deltas_error_shrinks_with_the_root_of_rebalancings(
        self, price: torch.Tensor
    ) -> None:
        """Boyle and Emanuel's formula is the limit of many rebalancings."""
        for every in (1, 2, 4):
            data = hedging(rebalancings=20 // every).data
            seen = price[:, ::every].double()
            asked = torch.full((PATHS_PER_PART,), black_scholes_price(data)).double()
            left = terminal_wealth(asked, black_scholes_delta(data, seen), seen, 0.0)
            limit, within = remaining_deviation(data), 0.3 / math.sqrt(data.rebalancings)
            assert 100 * left.std().item() == pytest.approx(limit, rel=within)


class TestCosts:
    def test_each_trade_is_paid_once_including_the_last(self) -> None:
        price = torch.tensor([[1.0, 2.0, 3.0]])
        left = terminal_wealth(torch.zeros(1), torch.tensor([[0.5, 0.25]]), price, 0.1)
        earned, traded, owed = 0.5 + 0.25, 0.5 * 1 + 0.25 * 2 + 0.25 * 3, 2.0
        assert left.item() == pytest.approx(earned - 0.1 * traded - owed)

    def test_with_costs_the_network_sees_the_current_holding(self) -> None:
        """Past prices matter only through the holding, and there they do."""
        path = torch.tensor([[1.0, 0.9, 1.0, 1.0], [1.0, 1.1, 1.0, 1.0]])
        torch.manual_seed(0)
        for cost, same in ((0.0, True), (0.01, False)):
            workload = hedging({"cost": cost}, rebalancings=3)
            network = workload.build()
            # One by one: equal rows of one batch may differ in the last bit on some thread counts.
            each = [workload.forward(network, {"price": one})[1] for one in path.split(1)]
            holding = torch.cat(each)
            assert (holding[0, 2] == holding[1, 2]).item() is same


def test_a_holding_does_not_depend_on_later_prices(price: torch.Tensor) -> None:
    for cost in (0.0, 0.01):
        workload = hedging({"cost": cost})
        model = workload.build()
        _, before = workload.forward(model, {"price": price[:50]})
        changed = torch.cat([price[:50, :11], 2 * price[:50, 11:]], 1)
        _, after = workload.forward(model, {"price": changed})
        assert torch.equal(before[:, :11], after[:, :11])
        assert not torch.equal(before[:, 11:], after[:, 11:])


def test_a_short_training_finds_the_price_and_most_of_the_delta(tmp_path: Path) -> None:
    shorter = ["train.epochs=1", "data.train_parts=2", "train.global_batch=500"]
    data = apply_overrides(find_spec("hedging")[1], shorter)
    spec, workload = resolve(data, RunSpec)
    assert isinstance(workload, Hedging)
    dataset = prepare_dataset(workload, tmp_path)
    found = train(spec, workload, dataset, tmp_path, NullReporter()).metrics
    assert found["test/price"] == pytest.approx(100 * black_scholes_price(workload.data), rel=0.05)
    assert found["test/hedging_error"] < 1.2 * found["test/delta_hedged"]
    assert found["test/delta_deviation"] < 0.1
    assert {len(split["price"]) for split in open_splits(dataset).values()} == {
        PATHS_PER_PART,
        2 * PATHS_PER_PART,
    }


def test_the_shipped_sweep_is_valid() -> None:
    spec, _ = resolve(find_spec("hedging")[1], SweepRunSpec)
    check_parameters(spec.model_dump(mode="json"), spec.sweep)
