"""`hedging` compared with Black and Scholes, Boyle and Emanuel, and Leland."""

import math
import tempfile
from pathlib import Path

import torch
from answers import shipped_spec, table

from cluster.base.config import apply_overrides
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_splits
from trainers.engine.loop import train
from trainers.engine.reporter import NullReporter
from trainers.spec import RunSpec, resolve
from trainers.workloads.hedging.workload import (
    PERCENT,
    Hedging,
    black_scholes_delta,
    black_scholes_price,
    remaining_deviation,
    terminal_wealth,
)

FOLDER = Path(tempfile.gettempdir()) / "heliostat-answers"
REBALANCINGS = (5, 20, 80)
COST = 0.002
"""Cost of a trade, relative to its value: 20 basis points."""


def answer() -> str:
    free = [run(f"data.rebalancings={count}") for count in REBALANCINGS]
    costly, workload, dataset = run(f"model.cost={COST}")
    return "\n\n".join(
        [
            "A call option at the money was sold for 20 of 252 days, at a volatility of 0.2, and "
            "is hedged without costs, on 25,000 paths that were not in the training set. Prices "
            "and errors are in percent of the strike. The learned price should be that of Black "
            "and Scholes, the learned holding their delta, and the hedging error the one that "
            "remains because trading is not continuous.",
            table(
                [
                    (
                        *("rebalancings", "price", "Black-Scholes price"),
                        *("holding minus delta, rms", "hedging error, rms"),
                        *("hedging error of the delta, rms", "Boyle and Emanuel's limit"),
                    ),
                    *(
                        (
                            str(workload.data.rebalancings),
                            f"{found['test/price']:.4f}",
                            f"{PERCENT * black_scholes_price(workload.data):.4f}",
                            f"{found['test/delta_deviation']:.4f}",
                            f"{found['test/hedging_error']:.4f}",
                            f"{found['test/delta_hedged']:.4f}",
                            f"{remaining_deviation(workload.data):.4f}",
                        )
                        for found, workload, _ in free
                    ),
                ]
            ),
            f"The same with 20 rebalancings, where each trade costs {COST:.1%} of its value. The "
            "price is the one at which the strategy breaks even on the training set.",
            table(
                [
                    ("", "price", "hedging error, rms"),
                    *others(workload, dataset),
                    (
                        "`hedging` as shipped, with the cost",
                        f"{costly['test/price']:.4f}",
                        f"{costly['test/hedging_error']:.4f}",
                    ),
                ]
            ),
        ]
    )


def run(*changes: str) -> tuple[dict[str, float], Hedging, Path]:
    """Train the shipped spec with the changes; returns metrics, workload and data set."""
    spec, workload = resolve(apply_overrides(shipped_spec("hedging"), changes), RunSpec)
    assert isinstance(workload, Hedging)
    dataset = prepare_dataset(workload, FOLDER)
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    return train(spec, workload, dataset, folder, NullReporter()).metrics, workload, dataset


def others(workload: Hedging, dataset: Path) -> list[tuple[str, str, str]]:
    """The rows of the usual strategies with costs of trading."""
    data, splits = workload.data, open_splits(dataset)
    step = math.sqrt(data.years / data.rebalancings)
    larger = math.sqrt(1 + math.sqrt(8 / math.pi) * COST / (data.volatility * step))
    rows = []
    for name, factor in (("Black and Scholes' delta", 1.0), ("Leland's delta", larger)):
        lacking = {}
        for split in ("train", "test"):
            price = splits[split]["price"].double()
            holding = black_scholes_delta(data, price, factor * data.volatility)
            nothing = torch.zeros(len(price)).double()
            lacking[split] = -PERCENT * terminal_wealth(nothing, holding, price, COST)
        price = lacking["train"].mean()
        error = (price - lacking["test"]).square().mean().sqrt()
        rows.append((name, f"{price:.4f}", f"{error:.4f}"))
    return rows
