"""The simulation of `markets` against known results; its files; its network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.base.config import validate
from cluster.base.errors import DataError
from trainers.counter_rng import SampleRandom
from trainers.data.dataset import prepare_dataset
from trainers.data.splits import open_splits
from trainers.engine.evaluate import evaluate
from trainers.engine.step import TrainStep
from trainers.spec import find_spec, resolve
from trainers.worker import Worker
from trainers.workloads.markets import simulation
from trainers.workloads.markets.books import EXACT_FILE, BookPart
from trainers.workloads.markets.simulation import (
    LEVELS,
    SimulatedBooks,
    exact_up_probability,
    next_moves,
)
from trainers.workloads.markets.workload import Markets, mirror_book
from tuning.spaces.space import SweepRunSpec, check_parameters

PUBLISHED = """
0.500 0.336 0.259 0.216 0.188
0.664 0.500 0.407 0.348 0.307
0.741 0.593 0.500 0.437 0.391
0.784 0.652 0.563 0.500 0.452
0.812 0.693 0.609 0.548 0.500
"""
"""Cont, Stoikov and Talreja's table of upward moves by bids (down) and asks (across) at the best,
for a spread of one tick."""


def markets(model: dict[str, Any] | None = None, **data: Any) -> Markets:
    return Markets(validate(Markets.Data, data), validate(Markets.Model, model or {}))


@pytest.fixture(scope="module")
def simulated() -> dict[str, np.ndarray[Any, Any]]:
    """A part of the data set, with the exact probabilities."""
    workload = markets()
    rows = workload.part(BookPart("val", 7), workload.common([]))["val"]
    features = np.frombuffer(b"".join(rows["book"].to_pylist()), np.float32)
    return {
        "book": features.reshape(len(rows), workload.data.window, LEVELS, 2, 2),
        "up": rows["up"].to_numpy(),
        "exact": rows["exact"].to_numpy(),
    }


class TestSimulation:
    def test_the_published_table_is_reproduced_within_its_rounding(self) -> None:
        published = np.array(PUBLISHED.split(), float).reshape(5, 5)
        assert np.abs(exact_up_probability(1)[:5, :5].T - published).max() <= 0.0015

    def test_prices_move_up_as_often_as_the_exact_probability(
        self, simulated: dict[str, np.ndarray[Any, Any]]
    ) -> None:
        """In each decile of the probabilities; within five standard deviations."""
        exact, up = simulated["exact"].astype(float), simulated["up"]
        assert len(up) > 20_000
        checked = 0
        for low in np.arange(0, 1, 0.1):
            among = (exact >= low) & (exact < low + 0.1)
            if among.sum() > 100:
                checked += 1
                sd = np.sqrt((exact[among] * (1 - exact[among])).sum())
                assert abs((up[among] - exact[among]).sum()) < 5 * sd, low
        assert checked >= 5

    def test_books_are_consistent(self, simulated: dict[str, np.ndarray[Any, Any]]) -> None:
        price, size = simulated["book"][..., 0] * 5, np.expm1(simulated["book"][..., 1] + 1)
        ask, bid = price[:, :, :, 0], price[:, :, :, 1]
        assert np.allclose(ask[:, :, 0], -bid[:, :, 0])  # the mid-price is between them
        assert (ask[:, :, 0] >= 0.5 - 1e-6).all()
        assert (np.diff(ask, axis=2) > 0.9).all()
        assert (np.diff(bid, axis=2) < -0.9).all()
        assert np.allclose(size, np.rint(size), atol=1e-3)
        assert size.min() > 0.99

    def test_centring_a_book_changes_nothing(self) -> None:
        many = SimulatedBooks(40, (0,))
        for _ in range(4000):
            before, shift = many.twice_mid_B, many.shift_B.copy()
            many.advance()
            assert np.abs(many.twice_mid_B - before).max() < 2 * simulation.PRICE_TICKS // 4
            assert (many.asks_BW >= 0).all()
            assert (many.bids_BW >= 0).all()
            if (many.shift_B != shift).any():
                break
        else:
            pytest.fail("no price went far enough")

    def test_the_next_move_is_the_next_change(self) -> None:
        mid = np.array([[4], [4], [5], [5], [3], [3]])
        assert next_moves(mid)[:, 0].tolist() == [1, 1, -1, -1, 0, 0]

    def test_a_seed_determines_a_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(simulation, "BURN_IN_EVENTS", 20)
        monkeypatch.setattr(simulation, "EVENTS_PER_BOOK", 40)
        workload = markets()
        common = workload.common([])
        parts = [workload.part(BookPart("train", seed), common)["train"] for seed in (1, 1, 2)]
        assert parts[0].equals(parts[1])
        assert not parts[0].equals(parts[2])
        assert common.keys() == {EXACT_FILE}


def lobster(path: Path, last: str = "") -> None:
    random = np.random.default_rng(0)
    mid = 1_000_000 + 100 * random.integers(-1, 2, 200).cumsum()
    ticks = np.arange(1, LEVELS + 1) * 100
    rows = np.empty((200, LEVELS, 4), int)
    rows[..., 0], rows[..., 2] = mid[:, None] + ticks, mid[:, None] - ticks
    rows[..., 1] = rows[..., 3] = 100
    lines = [",".join(map(str, row)) for row in rows.reshape(200, -1)]
    path.write_text("\n".join([*lines, last]))


def fi2010(path: Path, rows: int = 149, last: str = "") -> None:
    random = np.random.default_rng(0)
    numbers = random.standard_normal((rows, 60))
    numbers[-5:] = random.integers(1, 4, (5, 60))
    np.savetxt(path, numbers, fmt="%.6e")
    with path.open("a") as file:
        file.write(last)


class TestFiles:
    def test_lobster_days(self, tmp_path: Path) -> None:
        for day in (1, 2, 3):
            lobster(tmp_path / f"ABC_2020-01-0{day}_34200000_57600000_orderbook_10.csv")
        found = markets(source=str(tmp_path), window=4).dataset()
        assert {name: rows.column_names for name, rows in found.items()} == {
            split: ["book", "up"] for split in ("train", "val", "test")
        }
        features = np.frombuffer(found["train"]["book"][0].as_py(), np.float32)
        book = features.reshape(4, LEVELS, 2, 2)
        assert book[0, :, 0, 0] * 5 == pytest.approx(np.arange(1, 11))
        assert book[0, :, 1, 0] * 5 == pytest.approx(-np.arange(1, 11))
        assert book[..., 1] == pytest.approx(np.log(101) - 1)

    def test_fi2010(self, tmp_path: Path) -> None:
        for day in (1, 2, 3):
            fi2010(tmp_path / f"Train_Dst_NoAuction_ZScore_CF_{day}.txt")
        workload = markets(source=str(tmp_path), window=5, horizon=20)
        numbers = np.loadtxt(tmp_path / "Train_Dst_NoAuction_ZScore_CF_1.txt")
        rows = workload.dataset()["train"]
        label = numbers[145, 4:]
        assert rows["up"].to_pylist() == [int(each == 1) for each in label if each != 2]
        first = 4 + int(np.flatnonzero(label != 2)[0])
        shown = np.frombuffer(rows["book"][0].as_py(), np.float32).reshape(5, 40)
        assert shown[-1] == pytest.approx(numbers[:40, first], rel=1e-5)

    @pytest.mark.parametrize(
        ("write", "line"),
        [
            (
                lambda path: lobster(path, "1,2,3"),
                "{path}: line 201: has 3 numbers, the first has 40",
            ),
            (
                lambda path: lobster(path, ",".join(["7"] * 39 + ["seven"])),
                "{path}: line 201: 'seven' is not a number",
            ),
            (
                lambda path: path.write_text("1,2,3,4\n"),
                "{path}: has 4 columns, needs 40 of ten levels",
            ),
        ],
        ids=["short line", "word", "few levels"],
    )
    def test_a_malformed_lobster_file_is_one_line(
        self, tmp_path: Path, write: Callable[[Path], None], line: str
    ) -> None:
        for day in (1, 2, 3):
            lobster(tmp_path / f"day{day}_orderbook_10.csv")
        bad = tmp_path / "day2_orderbook_10.csv"
        write(bad)
        with pytest.raises(DataError) as caught:
            markets(source=str(tmp_path)).dataset()
        assert str(caught.value) == line.format(path=bad)

    @pytest.mark.parametrize(
        ("more", "line"),
        [
            ({"rows": 148}, "{path}: has 148 lines, FI-2010's have 149"),
            ({"last": "1 2 x"}, "{path}: line 150: has 3 numbers, the first has 60"),
        ],
        ids=["too few", "short line"],
    )
    def test_a_malformed_fi2010_file_is_one_line(
        self, tmp_path: Path, more: dict[str, Any], line: str
    ) -> None:
        for day in (1, 2, 3):
            fi2010(tmp_path / f"day{day}.txt")
        fi2010(tmp_path / "day3.txt", **more)
        with pytest.raises(DataError) as caught:
            markets(source=str(tmp_path)).dataset()
        assert str(caught.value) == line.format(path=tmp_path / "day3.txt")

    def test_too_few_files(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="has 0 order-book files; needs at least three"):
            markets(source=str(tmp_path)).dataset()


class TestNetwork:
    def test_mirroring_exchanges_sides_and_signs(
        self, simulated: dict[str, np.ndarray[Any, Any]]
    ) -> None:
        book = torch.from_numpy(simulated["book"][:8].copy()).flatten(2)
        turned = mirror_book(book)
        assert turned.shape == (8, 10, 40)
        assert torch.equal(mirror_book(turned), book)
        sides, other = book.unflatten(-1, (LEVELS, 2, 2)), turned.unflatten(-1, (LEVELS, 2, 2))
        assert torch.equal(other[..., 0, 0], -sides[..., 1, 0])
        assert torch.equal(other[..., 0, 1], sides[..., 1, 1])

    def test_half_of_the_samples_are_mirrored_with_their_labels(self) -> None:
        batch = {
            "book": torch.randn(200, 10, 40),
            "up": torch.ones(200, dtype=torch.uint8),
            "exact": torch.full((200,), 0.9),
        }
        found = markets().augment(batch, SampleRandom(0, torch.arange(200)))
        turned = found["up"] == 0
        assert 70 < turned.sum() < 130
        assert found["exact"][turned].allclose(torch.tensor(0.1))
        assert torch.equal(found["book"][~turned], batch["book"][~turned])
        assert torch.equal(found["book"][turned], mirror_book(batch["book"])[turned])
        assert markets({"mirror": False}).augment(batch, SampleRandom(0, torch.arange(2))) is batch

    def test_the_exact_probability_has_skill_one_and_one_half_has_none(self) -> None:
        workload = markets()
        exact = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
        batch = {"up": torch.tensor([0, 1, 1]), "exact": exact}
        for logit, skill in ((torch.logit(exact), 1.0), (torch.zeros_like(exact), 0.0)):
            means = {
                name: values.mean().item()
                for name, values in workload.metrics(logit, batch).items()
            }
            found = workload.summary({"loss": 0.0, **means})
            assert found["skill"] == pytest.approx(skill, abs=1e-12)
            assert found.keys() == {"loss", "accuracy", "kl", "skill"}


@pytest.mark.slow
def test_training_gets_most_of_the_skill(tmp_path: Path) -> None:
    data = find_spec("markets")[1]
    data["data"] |= {"train_parts": 1}
    data["model"] |= {"channels": 8}
    data["train"] |= {"epochs": 4}
    spec, workload = resolve(data, SweepRunSpec)
    check_parameters(spec.model_dump(mode="json"), spec.sweep)
    assert isinstance(workload, Markets)
    splits = open_splits(prepare_dataset(workload, tmp_path))
    total = spec.train.total_steps(len(splits["train"]["up"]))
    stepper = TrainStep(spec, workload, splits["train"], Worker(), total)
    for step in range(total):
        stepper.run(step)
    found = evaluate(spec, workload, stepper.network, splits["test"], Worker())
    assert found["skill"] > 0.7
