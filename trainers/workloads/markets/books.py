"""Limit order books: simulated, with the exact probability of their next move, and from files.

What `trainers.workloads.markets.workload` says of its data is done here.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, field_validator

from cluster.base.config import Spec
from cluster.base.errors import DataError
from trainers.data.tables import table
from trainers.workload import PartitionedWorkload, shipped_or_path

# Suffixes: B books or samples, W prices, D distances from the best price, T events of a window,
# L levels, F = 4 L features, X price and size of both sides, S spreads, N rows of a file.

Array = npt.NDArray[Any]

LEVELS = 10
DISTANCES = np.arange(1, 11)
ARRIVAL_RATE_D = np.array([1.85, 1.51, 1.09, 0.88, 0.77, *(1.92 * DISTANCES[5:] ** -0.52)])
CANCEL_RATE_D = np.array([0.71, 0.81, 0.68, 0.56, 0.47, *[0.47] * 5])
MARKET_ORDER_RATE = 0.94
"""Orders per second: arrivals and cancellations of each order by distance in ticks, and market
orders; Cont, Stoikov and Talreja's table 2."""
LARGEST_QUEUE, LARGEST_SPREAD = 60, 24
"""What is solved for exactly. Larger ones count as these."""

BOOKS_PER_PART, BURN_IN_EVENTS, EVENTS_PER_BOOK, EVENTS_PER_SAMPLE = 512, 300, 1000, 20
"""Of a part: books side by side, events until they are stationary, events that are used, and
between samples."""
PRICE_TICKS = 128
"""Ticks that a book has room for; it is put back into the middle when it comes near an end."""
EXACT_FILE = "exact.npy"

PositiveInt = Annotated[int, Field(gt=0)]


class BookPart(NamedTuple):
    """Books that are simulated from a seed, or some rows of a file."""

    split: str
    seed: int = 0
    path: str = ""


class OrderBooks(PartitionedWorkload):
    """What has windows of an order book for its data."""

    class Data(Spec):
        """Which books, and how much of them a sample shows."""

        source: Annotated[str, shipped_or_path("simulated")] = "simulated"
        """simulated; or a folder with LOBSTER's `*_orderbook_*.csv` or FI-2010's `*.txt`, whose
        files by name are for training, the last but one for validation, the last for testing."""
        window: PositiveInt = 10
        """Events that a sample shows."""
        train_parts: PositiveInt = 4
        """Simulated parts to train on, of some 25,000 samples each; one more each to validate and
        to test on."""
        seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
        """Decides what is simulated."""
        horizon: Literal[10, 20, 30, 50, 100] = 10
        """Events ahead of which FI-2010's labels speak."""

        @field_validator("window")
        @classmethod
        def _between_samples(cls, window: int) -> int:
            if window > EVENTS_PER_SAMPLE:
                raise ValueError(f"must be at most {EVENTS_PER_SAMPLE}")
            return window

    data: Data

    def parts(self) -> list[BookPart]:
        if self.data.source != "simulated":
            return _file_parts(Path(self.data.source))
        count = self.data.train_parts
        splits = [*["train"] * count, "val", "test"]
        return [BookPart(split, number) for number, split in enumerate(splits)]

    def common(self, parts: Sequence[BookPart]) -> dict[str, bytes]:
        if self.data.source != "simulated":
            return {}
        file = io.BytesIO()
        np.save(
            file, np.stack([exact_up_probability(spread + 1) for spread in range(LARGEST_SPREAD)])
        )
        return {EXACT_FILE: file.getvalue()}

    def part(self, part: BookPart, common: Mapping[str, bytes]) -> dict[str, pa.Table]:
        if part.path:
            read = _read_fi2010 if part.path.endswith(".txt") else _read_lobster
            return {part.split: read(Path(part.path), self.data)}
        exact_SBB = np.load(io.BytesIO(common[EXACT_FILE]))
        return {part.split: _simulate((self.data.seed, part.seed), self.data.window, exact_SBB)}


def exact_up_probability(spread: int) -> Array:
    """Probability that the mid-price moves up next: [a - 1, b - 1] for a best asks, b best bids.

    The two queues are birth-death chains; the system says that the probability is the mean of
    those after the next event. A limit order into the spread comes with the same rate from both
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
    """Order books side by side, of which each has its next event when `advance` is called.

    Sizes [B, W] by price in ticks; what stands outside of the room for prices never comes near.
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
        """One event in each book: Gillespie's method, without the times."""
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
        # Kinds 0 and 2 are of bids, 1 and 3 of asks; a market order takes from the other side.
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
        """Where a best queue is gone, the next one; where prices near an end, new room for them."""
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
    """Prices in ticks from the mid-price, and sizes, as numbers of order one; [B, F]."""
    prices, sizes = np.clip(features_BLX[..., ::2], -50, 50) / 5, features_BLX[..., 1::2]
    both = np.stack([prices, np.log1p(sizes) - 1], -1)
    return both.reshape(len(features_BLX), -1).astype(np.float32)


def next_moves(mid_TB: Array) -> Array:
    """The direction of the next change of each price after each event; 0 where none follows."""
    step_TB = np.sign(np.diff(mid_TB, axis=0, append=mid_TB[-1:]))
    for event in range(len(step_TB) - 2, -1, -1):
        step_TB[event] = np.where(step_TB[event] == 0, step_TB[event + 1], step_TB[event])
    return step_TB


def _simulate(seed: Sequence[int], window: int, exact_SBB: Array) -> pa.Table:
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


def _file_parts(folder: Path) -> list[BookPart]:
    """The folder's files in the order of their names, which for days is that of time."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = [*sorted(folder.glob("*_orderbook_*.csv")), *sorted(folder.glob("*.txt"))]
    if len(files) < 3:
        raise DataError(
            f"{folder}: has {len(files)} order-book files; it takes three, to train, validate, test"
        )
    splits = [*["train"] * (len(files) - 2), "val", "test"]
    return [BookPart(split, path=str(path)) for split, path in zip(splits, files, strict=True)]


def _read_numbers(path: Path, separator: str | None) -> Array:
    """A file of rows of equally many numbers, [N, columns]."""
    try:
        return np.loadtxt(path, delimiter=separator, ndmin=2)
    except ValueError:
        width = None
        with path.open(errors="replace") as file:
            for line, text in enumerate(file, start=1):
                cells = text.split(separator)
                width = width or len(cells)
                if len(cells) != width:
                    raise DataError(
                        f"{path}: line {line}: has {len(cells)} numbers, the first has {width}"
                    ) from None
                for cell in cells:
                    if not re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", cell):
                        raise DataError(
                            f"{path}: line {line}: {cell.strip()[:40]!r} is no number"
                        ) from None
        raise


def _read_lobster(path: Path, data: OrderBooks.Data) -> pa.Table:
    """An order-book file of LOBSTER: prices in 1/10,000 dollars, a tick being a cent."""
    rows = _read_numbers(path, ",")
    if rows.shape[1] < 4 * LEVELS or rows.shape[1] % 4:
        raise DataError(f"{path}: has {rows.shape[1]} columns, needs {4 * LEVELS} of ten levels")
    book = rows[:, : 4 * LEVELS].reshape(-1, LEVELS, 4)
    mid_N = (book[:, 0, 0] + book[:, 0, 2]) / 2
    book[..., ::2] = (book[..., ::2] - mid_N[:, None, None]) / 100
    return _windows(
        scale_features(book), next_moves(mid_N[:, None])[:, 0], data.window, EVENTS_PER_SAMPLE
    )


def _read_fi2010(path: Path, data: OrderBooks.Data) -> pa.Table:
    """A file of FI-2010: a sample a column, normalised as the file's name says.

    Its labels are 1 for up, 2 for stationary, 3 for down; what is stationary is seen, not asked.
    """
    rows = _read_numbers(path, None)
    if len(rows) != 149:
        raise DataError(f"{path}: has {len(rows)} lines, FI-2010's have 149")
    label_N = rows[144 + (10, 20, 30, 50, 100).index(data.horizon)]
    if not np.isin(label_N, (1, 2, 3)).all():
        raise DataError(
            f"{path}: line {145 + (10, 20, 30, 50, 100).index(data.horizon)}: labels are 1, 2 or 3"
        )
    return _windows(rows[: 4 * LEVELS].T.astype(np.float32), 2 - label_N, data.window, 1)


def _windows(features_NF: Array, move_N: Array, window: int, every: int) -> pa.Table:
    """Samples that end at every so manyth row, where the price moves at all."""
    ends = np.arange(window - 1, len(features_NF), every)
    ends = ends[move_N[ends] != 0]
    index = ends[:, None] + np.arange(1 - window, 1)
    return table(book=features_NF[index], up=(move_N[ends] > 0).astype(np.uint8))
