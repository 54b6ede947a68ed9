"""A simulated limit order book, and the exact probability of its next move."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainers.data.tables import table

# Suffixes: B books or samples, W prices, D distances from the best price, T events of a window,
# L levels, F = 4 L features, X price and size of both sides, S spreads.

Array = npt.NDArray[Any]

LEVELS = 10
DISTANCES = np.arange(1, 11)
ARRIVAL_RATE_D = np.array([1.85, 1.51, 1.09, 0.88, 0.77, *(1.92 * DISTANCES[5:] ** -0.52)])
CANCEL_RATE_D = np.array([0.71, 0.81, 0.68, 0.56, 0.47, *[0.47] * 5])
MARKET_ORDER_RATE = 0.94
"""Rates per second of limit orders and of the cancellation of each order, by distance in ticks, and
of market orders; Cont, Stoikov and Talreja's table 2."""
LARGEST_QUEUE, LARGEST_SPREAD = 60, 24
"""The largest queue and spread of the exact solution; larger ones count as these."""

BOOKS_PER_PART, BURN_IN_EVENTS, EVENTS_PER_BOOK, EVENTS_PER_SAMPLE = 512, 300, 1000, 20
"""Books that a part simulates, events until they are stationary, events that are used, and events
between two samples."""
PRICE_TICKS = 128
"""The range of prices in ticks; a book is centred again when it comes near an end of the range."""


def exact_up_probability(spread: int) -> Array:
    """Probability that the mid-price moves up next: [a - 1, b - 1] for a asks and b bids at best.

    The two queues are birth-death chains. By the linear system, the probability is the mean of the
    probabilities after the next event. Limit orders inside the spread have the same rate on both
    sides.
    """
    from scipy.sparse import diags_array, eye_array, kron
    from scipy.sparse.linalg import spsolve

    inside = spread <= len(ARRIVAL_RATE_D)
    birth = float(ARRIVAL_RATE_D[spread - 1]) if inside else 0.0
    death = (
        MARKET_ORDER_RATE
        + np.arange(1, LARGEST_QUEUE + 1) * CANCEL_RATE_D[min(spread, len(CANCEL_RATE_D)) - 1]
    )
    births = np.full(LARGEST_QUEUE, birth)
    births[-1] = 0
    chain = diags_array([death[1:], -(births + death), births[:-1]], offsets=[-1, 0, 1])
    one = eye_array(LARGEST_QUEUE)
    into_spread = ARRIVAL_RATE_D[: spread - 1].sum()
    system = kron(chain, one) + kron(one, chain) - 2 * into_spread * eye_array(LARGEST_QUEUE**2)
    up = np.full((LARGEST_QUEUE, LARGEST_QUEUE), into_spread)
    up[0] += death[0]
    return np.asarray(spsolve(system.tocsc(), -up.ravel())).reshape(up.shape)


class SimulatedBooks:
    """Independent order books; `advance` simulates the next event of each.

    Sizes are [B, W] by price in ticks. Orders outside the range of prices never matter.
    """

    def __init__(self, count: int, seed: Sequence[int]) -> None:
        self._random = np.random.default_rng(seed)
        middle = PRICE_TICKS // 2
        self.asks_BW = self._random.poisson(2.0, (count, PRICE_TICKS))
        self.bids_BW = self._random.poisson(2.0, (count, PRICE_TICKS))
        self.asks_BW[:, : middle + 1] = self.bids_BW[:, middle + 1 :] = 0
        self.asks_BW[:, middle + 1] = self.bids_BW[:, middle] = 1
        self.bid_B, self.ask_B = np.full(count, middle), np.full(count, middle + 1)
        self.shift_B = np.zeros(count, int)
        self._book_index = np.arange(count)

    @property
    def twice_mid_B(self) -> Array:
        twice_B: Array = self.bid_B + self.ask_B + 2 * self.shift_B
        return twice_B

    def advance(self) -> None:
        """One event in each book, by Gillespie's method without the times."""
        count, many = len(self._book_index), len(DISTANCES)
        below_BD, above_BD = self.ask_B[:, None] - DISTANCES, self.bid_B[:, None] + DISTANCES
        rates = np.empty((count, 4 * many + 2))
        rates[:, : 2 * many] = np.tile(ARRIVAL_RATE_D, 2)
        rates[:, 2 * many : 3 * many] = CANCEL_RATE_D * np.take_along_axis(
            self.bids_BW, below_BD, 1
        )
        rates[:, 3 * many : 4 * many] = CANCEL_RATE_D * np.take_along_axis(
            self.asks_BW, above_BD, 1
        )
        rates[:, 4 * many :] = MARKET_ORDER_RATE
        total = rates.cumsum(1)
        draw_B1 = self._random.random((count, 1)) * total[:, -1:]
        event_B = np.minimum((total <= draw_B1).sum(1), 4 * many + 1)
        kind_B, distance_B = np.divmod(event_B, many)
        market_B, arrival_B = kind_B == 4, kind_B < 2
        # Kinds 0 and 2 change bids, 1 and 3 asks; a market order takes from the opposite side.
        of_asks_B = np.where(market_B, distance_B == 0, kind_B % 2 == 1)
        price_B = np.where(
            of_asks_B,
            np.where(market_B, self.ask_B, self.bid_B + 1 + distance_B),
            np.where(market_B, self.bid_B, self.ask_B - 1 - distance_B),
        )
        change_B = np.where(arrival_B, 1, -1)
        self.asks_BW[self._book_index, price_B] += np.where(of_asks_B, change_B, 0)
        self.bids_BW[self._book_index, price_B] += np.where(of_asks_B, 0, change_B)
        new_B = np.where(arrival_B, price_B, self.ask_B)
        self.ask_B = np.where(of_asks_B, np.minimum(self.ask_B, new_B), self.ask_B)
        new_B = np.where(arrival_B, price_B, self.bid_B)
        self.bid_B = np.where(of_asks_B, self.bid_B, np.maximum(self.bid_B, new_B))
        self._update_best_prices()

    def _update_best_prices(self) -> None:
        """Move on if the best queue is empty; centre books that are near an end of the range."""
        gone = np.flatnonzero(self.bids_BW[self._book_index, self.bid_B] == 0)
        self.bid_B[gone] = PRICE_TICKS - 1 - (self.bids_BW[gone, ::-1] > 0).argmax(1)
        gone = np.flatnonzero(self.asks_BW[self._book_index, self.ask_B] == 0)
        self.ask_B[gone] = (self.asks_BW[gone] > 0).argmax(1)
        away_B = (self.bid_B + self.ask_B) // 2 - PRICE_TICKS // 2
        for book in np.flatnonzero(np.abs(away_B) > PRICE_TICKS // 5):
            away = away_B[book]
            fresh = slice(-away, None) if away > 0 else slice(None, -away)
            for sizes, has in ((self.asks_BW[book], away > 0), (self.bids_BW[book], away < 0)):
                sizes[:] = np.roll(sizes, -away)
                sizes[fresh] = self._random.poisson(2.0, abs(away)) if has else 0
            self.bid_B[book] -= away
            self.ask_B[book] -= away
            self.shift_B[book] += away

    def features(self) -> Array:
        """Features [B, F] of the first ten occupied levels of each side."""
        ticks = np.arange(PRICE_TICKS // 4)
        features = np.empty((len(self._book_index), LEVELS, 4))
        for side, (sizes_BW, best_B, sign) in enumerate(
            ((self.asks_BW, self.ask_B, 1), (self.bids_BW, self.bid_B, -1))
        ):
            near = np.take_along_axis(sizes_BW, best_B[:, None] + sign * ticks, 1)
            order = np.sort(np.where(near > 0, ticks, ticks + len(ticks)), 1)
            level = order[:, :LEVELS] % len(ticks)
            price = best_B[:, None] + sign * level - (self.bid_B + self.ask_B)[:, None] / 2
            features[:, :, 2 * side] = price
            features[:, :, 2 * side + 1] = np.take_along_axis(near, level, 1)
        return scale_features(features)


def scale_features(features_BLX: Array) -> Array:
    """Prices, in ticks from the mid-price, and sizes, both scaled to order one; [B, F]."""
    prices, sizes = np.clip(features_BLX[..., ::2], -50, 50) / 5, features_BLX[..., 1::2]
    both = np.stack([prices, np.log1p(sizes) - 1], -1)
    return both.reshape(len(features_BLX), -1).astype(np.float32)


def next_moves(mid_TB: Array) -> Array:
    """The direction of each price's next change after each event; 0 if there is none."""
    step_TB = np.sign(np.diff(mid_TB, axis=0, append=mid_TB[-1:]))
    for event in range(len(step_TB) - 2, -1, -1):
        step_TB[event] = np.where(step_TB[event] == 0, step_TB[event + 1], step_TB[event])
    return step_TB


def simulate(seed: Sequence[int], window: int, exact_SBB: Array) -> pa.Table:
    books = SimulatedBooks(BOOKS_PER_PART, seed)
    for _ in range(BURN_IN_EVENTS):
        books.advance()
    mids, seen, shown, states = [], [], [], []
    each = np.arange(BOOKS_PER_PART)
    for event in range(EVENTS_PER_BOOK):
        books.advance()
        mids.append(books.twice_mid_B)
        if event % EVENTS_PER_SAMPLE >= EVENTS_PER_SAMPLE - window:
            seen.append(books.features())
        if event % EVENTS_PER_SAMPLE == EVENTS_PER_SAMPLE - 1:
            shown.append(np.stack(seen, 1))
            spread_B = np.minimum(books.ask_B - books.bid_B, LARGEST_SPREAD)
            queues = (books.asks_BW[each, books.ask_B], books.bids_BW[each, books.bid_B])
            states.append(
                exact_SBB[spread_B - 1, *(np.minimum(q, LARGEST_QUEUE) - 1 for q in queues)]
            )
            seen = []
    moves = next_moves(np.stack(mids))[EVENTS_PER_SAMPLE - 1 :: EVENTS_PER_SAMPLE].ravel()
    moved = moves != 0
    return table(
        book=np.concatenate(shown)[moved],
        up=(moves[moved] > 0).astype(np.uint8),
        exact=np.concatenate(states)[moved].astype(np.float32),
    )
