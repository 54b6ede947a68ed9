"""Hedging: the price of an option, and how many shares its seller should hold at each moment.

**Data.** Paths of a share's price under Black and Scholes (Journal of Political Economy 81, 1973):
the logarithm is a Brownian motion with the spec's volatility, the interest rate is zero, prices are
in units of the strike. The seller of a call may trade at `rebalancings` moments, evenly spaced from
the start to one before the end, at a cost of `model.cost` of each trade's value.

**Model.** The price of the option and the holding at each moment, as functions of time, the share's
price and, if trading costs, the current holding. Training minimises the squared error at the end
(deep hedging: Buehler, Gonon, Teichmann and Wood 2019, doi:10.1080/14697688.2019.1571683).

**Known results.** Without costs, in the limit of many rebalancings, the holding and the price are
those of Black and Scholes. With n rebalancings, an error remains whose standard deviation is close
to sqrt(pi / 4 / n) vega volatility (Boyle and Emanuel, Journal of Financial Economics 8, 1980, for
its rate). With costs, Leland (Journal of Finance 40, 1985) hedges at a larger volatility.

**Metrics.** `hedging_error`, root mean square in percent of the strike; `delta_hedged`, the same
for Black and Scholes' price and delta on the same paths with the same costs; `delta_deviation`, the
root mean square difference of the two holdings; `price` in percent of the strike.

**Not shown:** real prices jump and their volatility changes, so real errors are larger.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn

from cluster.base.config import Spec
from trainers.data.tables import table
from trainers.workload import Batch, PartitionedWorkload

# Suffixes: B samples, N rebalancings, F features.

PATHS_PER_PART = 25_000
"""Paths per part; every second path mirrors the one before, so that noise cancels."""
PERCENT = 100.0


class PathPart(NamedTuple):
    split: str
    seed: int


class Hedging(PartitionedWorkload):
    """Hedges a call on a share for its seller."""

    class Data(Spec):
        """The share, and the moments of trading."""

        rebalancings: Annotated[int, Field(gt=0)] = 20
        years: Annotated[float, Field(gt=0)] = 20 / 252
        """Time until the option expires."""
        volatility: Annotated[float, Field(gt=0)] = 0.2
        """Standard deviation of the change of the price's logarithm in a year."""
        train_parts: Annotated[int, Field(gt=0)] = 4
        """Training parts, of 25,000 paths each; there is one part more for validation and one for
        testing."""
        seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
        """Seed of the paths."""

    class Model(Spec):
        """The size of the network, and the cost of trading."""

        width: Annotated[int, Field(gt=0)] = 32
        layers: Annotated[int, Field(gt=0)] = 2
        cost: Annotated[float, Field(ge=0, lt=1)] = 0.0
        """Cost of a trade, as a share of its value."""

    data: Data
    model: Model

    def parts(self) -> list[PathPart]:
        splits = [*["train"] * self.data.train_parts, "val", "test"]
        return [PathPart(split, number) for number, split in enumerate(splits)]

    def part(self, part: PathPart, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        data = self.data
        step = data.volatility * math.sqrt(data.years / data.rebalancings)
        random = np.random.default_rng((data.seed, part.seed))
        half_BN = random.standard_normal((PATHS_PER_PART // 2, data.rebalancings))
        normal_BN = np.stack([half_BN, -half_BN], axis=1).reshape(PATHS_PER_PART, -1)
        log_BN = np.cumsum(step * normal_BN - step**2 / 2, axis=1)
        price_BN1 = np.exp(np.pad(log_BN, ((0, 0), (1, 0))))
        return {part.split: table(price=price_BN1.astype(np.float32))}

    def build(self) -> nn.Module:
        return Hedger(self.data, self.model)

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The option's price [B] and the holdings [B, N]."""
        price_B, holding_BN = model(batch["price"])
        return price_B, holding_BN

    def loss(self, output: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """The square of the hedging error, which is in percent of the strike."""
        price_B, holding_BN = output
        return self._terminal_wealth_percent(price_B, holding_BN, batch["price"]).square()

    def metrics(self, output: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Tensor]:
        asked_B, holding_BN = output
        price_BN1 = batch["price"].to(holding_BN.dtype)
        delta_BN = black_scholes_delta(self.data, price_BN1)
        known_B = torch.full_like(asked_B, black_scholes_price(self.data))
        return {
            "hedging_error": self._terminal_wealth_percent(asked_B, holding_BN, price_BN1).square(),
            "delta_hedged": self._terminal_wealth_percent(known_B, delta_BN, price_BN1).square(),
            "delta_deviation": (holding_BN - delta_BN).square().mean(1),
            "price": PERCENT * asked_B,
        }

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        roots = ("hedging_error", "delta_hedged", "delta_deviation")
        return {name: math.sqrt(x) if name in roots else x for name, x in means.items()}

    def example(self) -> Tensor:
        return torch.ones(1, self.data.rebalancings + 1)

    def _terminal_wealth_percent(
        self, asked_B: Tensor, holding_BN: Tensor, price_BN1: Tensor
    ) -> Tensor:
        return PERCENT * terminal_wealth(asked_B, holding_BN, price_BN1, self.model.cost)


def terminal_wealth(asked_B: Tensor, holding_BN: Tensor, price_BN1: Tensor, cost: float) -> Tensor:
    """The seller's wealth at the end, in units of the strike [B].

    The option's price, plus the gains of the holdings, minus trading costs and the option's payoff.
    Shares held at the end are sold.
    """
    price_BN1 = price_BN1.to(holding_BN.dtype)
    earned_B = (holding_BN * price_BN1.diff(dim=1)).sum(1)
    before_and_after = nn.functional.pad(holding_BN, (1, 1))
    traded_B = (before_and_after.diff(dim=1).abs() * price_BN1).sum(1)
    owed_B = (price_BN1[:, -1] - 1).clamp(min=0)
    return asked_B + earned_B - cost * traded_B - owed_B


def black_scholes_delta(
    data: Hedging.Data, price_BN1: Tensor, volatility: float | None = None
) -> Tensor:
    """Black and Scholes' holding at each moment [B, N]; the default volatility is the share's."""
    sd_N = remaining_log_deviation(data, price_BN1, volatility)
    log_BN = price_BN1[:, :-1].log()
    delta_BN: Tensor = torch.special.ndtr(log_BN / sd_N + sd_N / 2)
    return delta_BN


def remaining_log_deviation(
    data: Hedging.Data, like: Tensor, volatility: float | None = None
) -> Tensor:
    """Standard deviation of the price's logarithm at the end, as of each moment: [N]."""
    left_N = 1 - torch.arange(data.rebalancings, device=like.device) / data.rebalancings
    at = data.volatility if volatility is None else volatility
    return (at * (data.years * left_N).sqrt()).to(like.dtype)


def black_scholes_price(data: Hedging.Data) -> float:
    """Black and Scholes' price of the call at the start, in units of the strike."""
    return math.erf(data.volatility * math.sqrt(data.years / 8))


def remaining_deviation(data: Hedging.Data) -> float:
    """Standard deviation of delta hedging's error (Boyle and Emanuel), in percent of the strike."""
    sd = data.volatility * math.sqrt(data.years)
    vega_times_volatility = sd * math.exp(-((sd / 2) ** 2) / 2) / math.sqrt(2 * math.pi)
    return PERCENT * math.sqrt(math.pi / 4 / data.rebalancings) * vega_times_volatility


class Hedger(nn.Module):
    """The option's price [B] and the holdings [B, N], for paths of the share's price [B, N + 1]."""

    def __init__(self, data: Hedging.Data, model: Hedging.Model) -> None:
        super().__init__()
        self.data = data
        self.sees_holding = model.cost > 0
        sizes = [4 if self.sees_holding else 3, *[model.width] * model.layers]
        self.hidden = nn.ModuleList(
            nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(sizes)
        )
        self.last = nn.Linear(sizes[-1], 1)
        self.asked = nn.Parameter(torch.zeros(()))

    def forward(self, price_BN1: Tensor) -> tuple[Tensor, Tensor]:
        dtype = self.last.weight.dtype
        asked_B = self.asked.expand(len(price_BN1))
        seen_BNF = self._inputs(price_BN1).to(dtype)
        if not self.sees_holding:
            return asked_B, self._holding(seen_BNF)
        held_B = torch.zeros_like(asked_B)
        holdings = []
        for seen_BF in seen_BNF.unbind(1):
            held_B = self._holding(torch.cat([seen_BF, held_B[:, None]], 1))
            holdings.append(held_B)
        return asked_B, torch.stack(holdings, 1)

    def _inputs(self, price_BN1: Tensor) -> Tensor:
        """Remaining deviation; log-price over the remaining and the total deviation: [B, N, 3]."""
        sd_N = remaining_log_deviation(self.data, price_BN1)
        log_BN = price_BN1[:, :-1].log()
        time_BN = (sd_N / sd_N[0]).expand_as(log_BN)
        return torch.stack([time_BN, log_BN / sd_N, log_BN / sd_N[0]], -1)

    def _holding(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = nn.functional.silu(layer(x))
        holding: Tensor = self.last(x).squeeze(-1).sigmoid()
        return holding
