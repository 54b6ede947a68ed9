"""Markets: the direction of the next move of a limit order book's mid-price.

**Data.** `simulated` is the order book of Cont, Stoikov and Talreja (Operations Research 58, 2010,
doi:10.1287/opre.1090.0780) with the intensities that they estimated for Sky Perfect Communications
in Tokyo: limit orders of one size arrive at i ticks from the opposite best price at the rate
1.85, 1.51, 1.09, 0.88, 0.77 (i = 1 to 5; 1.92 i^-0.52 up to 10, none beyond), each resting order is
cancelled at 0.71, 0.81, 0.68, 0.56, 0.47 (and so on), market orders arrive at 0.94 on each side.
A sample is the book after each of the last `window` events, as price and size of the ask and of the
bid on ten levels, and whether the mid-price moves up next. Your own data: LOBSTER's order-book
files (`*_orderbook_*.csv`), and FI-2010's text files (Ntakaris et al. 2018, arXiv:1705.03233).

**Exact solution.** Given the spread and the sizes at both best prices, the next move depends on
which queue empties first, unless a limit order arrives inside the spread before. The probability of
an upward move solves a linear system over queue sizes (`exact_up_probability`). The data set stores
it with each simulated sample, so predictions are compared with the exact probability instead of one
random outcome: `kl` is the divergence from it in nats, and `skill` is 1 - kl / (kl of predicting
one half). The best possible accuracy is about 0.61.

**Model.** Convolutions over price and size, over bid and ask, over levels, then over time, as in
DeepLOB (Zhang, Zohren and Roberts 2019, arXiv:1808.03668), with group instead of batch
normalisation and a linear layer instead of its LSTM: windows are short, and its trials can be
fused.

**Not shown:** profit. Nothing is traded: there are costs and delays, one's own orders move prices,
and the future of a real book depends on more than its state.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cluster.base.config import Spec
from trainers.counter_rng import SampleRandom
from trainers.workload import Batch
from trainers.workloads.markets.books import OrderBooks
from trainers.workloads.markets.simulation import LEVELS

# Suffixes: B samples, T events of a window, L levels, S sides, X price and size, F = L S X
# features, C channels.


class Markets(OrderBooks):
    """Predicts the next move of the price from a window of an order book."""

    class Model(Spec):
        """The size of the network."""

        channels: Annotated[int, Field(ge=4, multiple_of=4)] = 16
        """Channels of every convolution."""
        mirror: bool = True
        """Exchange bids and asks in half of the training samples."""

    data: OrderBooks.Data
    model: Model

    def build(self) -> nn.Module:
        return Network(self.data.window, self.model.channels)

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        if not self.model.mirror:
            return batch
        turn_B = random.uniform() < 0.5
        mirrored = {"book": mirror_book(batch["book"]), "up": 1 - batch["up"]}
        if "exact" in batch:
            mirrored["exact"] = 1 - batch["exact"]
        return {
            name: torch.where(turn_B.view(-1, *[1] * (batch[name].ndim - 1)), values, batch[name])
            for name, values in mirrored.items()
        }

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Log-odds of an upward move [B]."""
        logit_B: Tensor = model(batch["book"])
        return logit_B

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            output, batch["up"].to(output.dtype), reduction="none"
        )

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        found = {"accuracy": ((output > 0) == (batch["up"] > 0)).float()}
        if "exact" in batch:
            exact_B = batch["exact"].to(output.dtype)
            found["kl"] = _kl_divergence(exact_B, output)
            found["kl_of_half"] = _kl_divergence(exact_B, torch.zeros_like(output))
        return found

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        if "kl" not in means:
            return means
        half = means.pop("kl_of_half")
        return {**means, "skill": 1 - means["kl"] / half}

    def example(self) -> Tensor:
        return torch.zeros(1, self.data.window, 4 * LEVELS)


def mirror_book(book_BTF: Tensor) -> Tensor:
    """The book with bids and asks exchanged, and prices mirrored at the mid-price."""
    sides_BTLSX = book_BTF.reshape(*book_BTF.shape[:2], LEVELS, 2, 2).flip(3)
    sign_X = torch.tensor([-1.0, 1.0], dtype=book_BTF.dtype, device=book_BTF.device)
    return (sides_BTLSX * sign_X).flatten(2)


def _kl_divergence(exact_B: Tensor, logit_B: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a prediction from the exact probability, in nats."""
    entropy_B = -(torch.xlogy(exact_B, exact_B) + torch.xlogy(1 - exact_B, 1 - exact_B))
    cross_B = F.binary_cross_entropy_with_logits(logit_B, exact_B, reduction="none")
    return cross_B - entropy_B


class Network(nn.Module):
    """Log-odds [B] of an upward move, for windows of books [B, T, F]."""

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        each = (1, 2), (1, 2), (1, LEVELS)  # price and size; bid and ask; levels
        self.levels = nn.Sequential(
            *(
                layer
                for index, size in enumerate(each)
                for layer in (
                    *_conv_layers(1 if index == 0 else channels, channels, size, stride=size),
                    *_conv_layers(channels, channels, (3, 1), padding=(1, 0)),
                )
            )
        )
        self.times = nn.ModuleList(
            nn.Sequential(*_conv_layers(channels, channels, (size, 1), padding=(size // 2, 0)))
            for size in (1, 3, 5)
        )
        self.hidden = nn.Linear(3 * channels * window, 2 * channels)
        self.last = nn.Linear(2 * channels, 1)

    def forward(self, book_BTF: Tensor) -> Tensor:
        x_BCT1 = self.levels(book_BTF[:, None].to(self.last.weight.dtype))
        x_BC = torch.cat([over(x_BCT1) for over in self.times], 1).flatten(1)
        logit_B1 = self.last(F.leaky_relu(self.hidden(x_BC)))
        logit_B: Tensor = logit_B1.squeeze(1)
        return logit_B.to(self.last.weight.dtype)


def _conv_layers(
    inputs: int, outputs: int, size: tuple[int, int], **more: Any
) -> Iterator[nn.Module]:
    yield nn.Conv2d(inputs, outputs, size, bias=False, **more)
    yield nn.GroupNorm(4, outputs)
    yield nn.LeakyReLU(0.01)
