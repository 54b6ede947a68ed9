"""`hedging` beside Black and Scholes, Boyle and Emanuel, Leland, and Whalley and Wilmott."""

import math
import tempfile
from pathlib import Path

import torch
from answers import table
from torch import Tensor

from cluster.config import override
from trainers.data import open_splits, prepare
from trainers.loop import train
from trainers.reporter import SilentReporter
from trainers.spec import RunSpec, find_spec, resolve
from trainers.workloads.hedging import (
    PERCENT,
    Hedging,
    black_scholes_delta,
    black_scholes_price,
    deviation_left,
    left_over,
    remaining_deviation,
)

FOLDER = Path(tempfile.gettempdir()) / "heliostat-answers"
REBALANCINGS = (5, 20, 80)
COST = 0.002
"""Of each trade: 20 basis points."""
BANDS = torch.linspace(0, 0.5, 26)
"""Half-widths at a gamma of one, of which the best in training is taken."""


def answer() -> str:
    free = [run(f"data.rebalancings={count}") for count in REBALANCINGS]
    costly, workload, dataset = run(f"model.cost={COST}")
    return "\n\n".join(
        [
            "A call sold at the money for 20 of 252 days at a volatility of 0.2, hedged without "
            "costs, on 25,000 paths that were not trained on; percent of the strike. The learned "
            "price is to be Black and Scholes', the holding their delta, and the error the one "
            "that remains because trading is not continuous.",
            table(
                [
                    (
                        *("rebalancings", "price", "Black-Scholes", "holding off the delta, rms"),
                        *("hedging error, rms", "of the delta", "Boyle-Emanuel's limit"),
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
            f"The same with 20 rebalancings, where each trade costs {COST:.1%} of its value. Each "
            "asks the price at which it breaks even in training.",
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
    """Train the shipped spec with the changes: metrics, workload and data set."""
    spec, workload = resolve(override(find_spec("hedging")[1], changes), RunSpec)
    assert isinstance(workload, Hedging)
    dataset = prepare(workload, FOLDER)
    folder = Path(tempfile.mkdtemp(dir=FOLDER))
    return train(spec, workload, dataset, folder, SilentReporter()).metrics, workload, dataset


def others(workload: Hedging, dataset: Path) -> list[tuple[str, str, str]]:
    """What is usual where trades cost."""
    data, splits = workload.data, open_splits(dataset)
    seen, tested = (splits[name]["price"].double() for name in ("train", "test"))
    step = math.sqrt(data.years / data.rebalancings)
    larger = data.volatility * math.sqrt(
        1 + math.sqrt(8 / math.pi) * COST / (data.volatility * step)
    )
    errors = [left(seen, banded(data, seen, float(width))).std() for width in BANDS]
    best = float(BANDS[int(torch.stack(errors).argmin())])
    hedges = {
        "Black and Scholes' delta": lambda price: black_scholes_delta(data, price),
        "Leland's delta": lambda price: black_scholes_delta(data, price, larger),
        f"Whalley and Wilmott's band, {best:.2f} gamma^(2/3)": lambda price: banded(
            data, price, best
        ),
    }
    rows = []
    for name, hedge in hedges.items():
        price = -left(seen, hedge(seen)).mean()
        error = (price + left(tested, hedge(tested))).square().mean().sqrt()
        rows.append((name, f"{price:.4f}", f"{error:.4f}"))
    return rows


def left(price_BN1: Tensor, holding_BN: Tensor) -> Tensor:
    """In percent of the strike, when nothing was asked."""
    return PERCENT * left_over(torch.zeros_like(price_BN1[:, 0]), holding_BN, price_BN1, COST)


def banded(data: Hedging.Data, price_BN1: Tensor, width: float) -> Tensor:
    """Trades to the edge of a band around the delta, as wide as gamma^(2/3) [B, N]."""
    delta_BN = black_scholes_delta(data, price_BN1)
    sd_N = deviation_left(data, price_BN1)
    now_BN = price_BN1[:, :-1]
    d_BN = now_BN.log() / sd_N + sd_N / 2
    gamma_BN = torch.exp(-d_BN.square() / 2) / math.sqrt(2 * math.pi) / (now_BN * sd_N)
    half_BN = width * (now_BN * gamma_BN.square() * 1e-3).pow(1 / 3)
    held_B = torch.zeros_like(delta_BN[:, 0])
    holdings = []
    for delta_B, half_B in zip(delta_BN.unbind(1), half_BN.unbind(1), strict=True):
        held_B = held_B.clamp(delta_B - half_B, delta_B + half_B)
        holdings.append(held_B)
    return torch.stack(holdings, 1)
