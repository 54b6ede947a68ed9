"""The best configurations, trained several times: which, how often, and by which mean."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cluster.base.config import validate
from cluster.base.errors import SpecError
from trainers.run_folder import TRIALS
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import has_ended, read_leaderboard
from tuning.trials.repeats import Repeated, plan_repeats
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, LAST_RESULT_FILE, Sweep

SPEC: dict[str, Any] = {
    "parameters": {"optimizer.lr": {"uniform": [0, 1]}},
    "trials": 4,
    "repeat": 3,
    "finalists": 2,
}


def sweep_in(folder: Path, **fields: Any) -> Sweep:
    spec = SweepSpec.model_validate({**SPEC, **fields})
    data = {"train": {"seed": 5}, "data": {"fold": 0}, "optimizer": {"lr": 0.1}}
    return Sweep(data, spec, folder, folder)


def end(sweep: Sweep, number: int, value: float, complete: bool = True) -> None:
    folder = sweep.folder / TRIALS / f"{number:04d}"
    folder.mkdir(parents=True)
    last = {"val/loss": value, "step": 10, "epoch": 1.0, "complete": complete, "device_s": 1.0}
    (folder / LAST_RESULT_FILE).write_text(json.dumps(last))
    (folder / ENDED_FILE).write_text(json.dumps({"complete": complete}))


def searched(folder: Path, values: list[float], **fields: Any) -> Sweep:
    """A sweep whose search has ended with these values; the parameter of each is its number."""
    sweep = sweep_in(folder, **fields)
    journal = Journal(folder / JOURNAL_FILE)
    for number, value in enumerate(values):
        journal.record_suggestion(number, {"optimizer.lr": number / 10})
        end(sweep, number, value)
    return sweep


def planned(sweep: Sweep) -> dict[int, dict[str, Any]]:
    finalists = read_leaderboard(sweep).finalists(sweep.spec)
    return plan_repeats(sweep, {each.number: each.parameters for each in finalists})


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_mean_and_interval_are_students(values: list[float]) -> None:
    repeated = Repeated(values, len(values))
    assert repeated.mean == pytest.approx(np.mean(values), abs=1e-12)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    if not math.isnan(low):
        assert repeated.half_width == pytest.approx((high - low) / 2, rel=1e-9, abs=1e-9)


def test_the_text_of_a_mean() -> None:
    """By hand: mean 2, deviation 1, t 4.303 with two degrees of freedom, 4.303 / sqrt(3) = 2.5."""
    assert str(Repeated([1.0, 2.0, 3.0], 3)) == "2.0000 ± 2.5 of 3"
    assert str(Repeated([1.0, 2.0], 3)) == "1.5000 ± 6.4 of 2 of 3"


def test_the_best_two_are_trained_with_two_more_seeds_each(tmp_path: Path) -> None:
    sweep = searched(tmp_path, [0.4, 0.1, 0.3, 0.2])
    left = planned(sweep)
    assert left == {
        4: {"trial": 4, "repeats": 1, "optimizer.lr": 0.1, "train.seed": 6},
        5: {"trial": 5, "repeats": 1, "optimizer.lr": 0.1, "train.seed": 7},
        6: {"trial": 6, "repeats": 3, "optimizer.lr": 0.3, "train.seed": 6},
        7: {"trial": 7, "repeats": 3, "optimizer.lr": 0.3, "train.seed": 7},
    }
    assert planned(sweep) == left, "a plan is made once"
    assert sweep.trial_spec_data(left[4]) == {
        "train": {"seed": 6},
        "data": {"fold": 0},
        "optimizer": {"lr": 0.1},
    }
    end(sweep, 4, 0.5)
    assert list(planned(sweep)) == [5, 6, 7]


def test_the_best_by_the_mean_comes_first(tmp_path: Path) -> None:
    """Trial 1 was lucky: its mean is 0.4, that of trial 3 is 0.25."""
    sweep = searched(tmp_path, [0.4, 0.1, 0.3, 0.2])
    planned(sweep)
    assert [r.number for r in read_leaderboard(sweep).results] == [1, 3, 2, 0]
    for number, value in ((4, 0.5), (5, 0.6), (6, 0.25)):
        end(sweep, number, value)
    board = read_leaderboard(sweep)
    assert [r.number for r in board.results] == [1, 3, 2, 0], "trial 3 is not repeated in full"
    assert not has_ended(sweep, board)
    end(sweep, 7, 0.3)
    board = read_leaderboard(sweep)
    assert [r.number for r in board.results] == [3, 1, 2, 0]
    assert board.best is not None
    assert board.best.repeated is not None
    assert board.best.repeated.values == [0.2, 0.25, 0.3]
    assert board.best.repeated.mean == pytest.approx(0.25)
    assert has_ended(sweep, board)
    assert planned(sweep) == {}


def test_a_configuration_that_failed_once_is_not_ahead(tmp_path: Path) -> None:
    sweep = searched(tmp_path, [0.4, 0.1, 0.3, 0.2])
    planned(sweep)
    for number, value in ((5, 0.1), (6, 0.25), (7, 0.3)):
        end(sweep, number, value)
    (tmp_path / TRIALS / "0004").mkdir()
    (tmp_path / TRIALS / "0004" / FAILED_FILE).write_text("the loss is nan at step 3")
    board = read_leaderboard(sweep)
    assert [r.number for r in board.results] == [3, 1, 2, 0]
    assert has_ended(sweep, board)


def test_stopped_trials_are_no_finalists(tmp_path: Path) -> None:
    sweep = searched(tmp_path, [0.4, 0.2])
    Journal(tmp_path / JOURNAL_FILE).record_suggestion(2, {"optimizer.lr": 0.2})
    end(sweep, 2, 0.1, complete=False)
    assert {config["repeats"] for config in planned(sweep).values()} == {0, 1}


def test_folds_of_which_the_search_used_one(tmp_path: Path) -> None:
    """The search trained on fold 0: it counts as one of the three."""
    sweep = searched(tmp_path, [0.4, 0.1], repeat=1, folds={"data.fold": [0, 1, 2]}, finalists=1)
    left = planned(sweep)
    assert [config["data.fold"] for config in left.values()] == [1, 2]
    assert sweep.trial_spec_data(left[2])["data"] == {"fold": 1}
    end(sweep, 2, 0.3)
    end(sweep, 3, 0.2)
    best = read_leaderboard(sweep).results[0]
    assert best.number == 1
    assert best.repeated is not None
    assert sorted(best.repeated.values) == [0.1, 0.2, 0.3]


def test_folds_of_which_the_search_used_none(tmp_path: Path) -> None:
    sweep = searched(tmp_path, [0.4, 0.1], repeat=1, folds={"data.fold": [1, 2]}, finalists=1)
    planned(sweep)
    end(sweep, 2, 0.3)
    end(sweep, 3, 0.2)
    best = read_leaderboard(sweep).results[0]
    assert best.repeated is not None
    assert sorted(best.repeated.values) == [0.2, 0.3], "the search's own value is of no fold"


def test_seeds_and_folds_are_combined(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, repeat=2, folds={"data.fold": [0, 1]})
    assert sweep.spec.repeat_settings(5) == [
        {"train.seed": 5, "data.fold": 0},
        {"train.seed": 5, "data.fold": 1},
        {"train.seed": 6, "data.fold": 0},
        {"train.seed": 6, "data.fold": 1},
    ]
    assert sweep.spec.planned_trials == 4 + 2 * 3


def test_more_trials_after_the_repeats_have_numbers_of_their_own(tmp_path: Path) -> None:
    sweep = searched(tmp_path, [0.4, 0.1, 0.3, 0.2])
    assert list(planned(sweep)) == [4, 5, 6, 7]
    journal = Journal(tmp_path / JOURNAL_FILE)
    assert journal.next_number == 8
    assert list(journal.parameters) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repeat": 0}, "sweep.repeat: must be greater than 0 (got 0)"),
        ({"finalists": 0}, "sweep.finalists: must be greater than 0 (got 0)"),
        ({"folds": {"data.fold": [1]}}, "sweep.folds.data.fold: "),
        ({"scheduler": {"name": "pbt"}}, "sweep: repeat: not with pbt"),
        (
            {"parameters": {"train.seed": {"integer": [0, 9]}}},
            "sweep: repeat: train.seed is one of the parameters",
        ),
        (
            {
                "parameters": {"data": {"choice": [{"fold": 1}]}},
                "folds": {"data.fold": [1, 2]},
                "repeat": 1,
            },
            "sweep: folds: data.fold is one of the parameters",
        ),
    ],
)
def test_bad_repeats_are_refused_in_a_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        validate(SweepSpec, {**SPEC, **fields}, "sweep.")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_folds_by_dotted_path_or_as_sections() -> None:
    """`--set sweep.folds.data.fold=[0,1]` gives sections."""
    spec = SweepSpec.model_validate({**SPEC, "folds": {"data": {"fold": [0, 1]}}})
    assert spec.folds == {"data.fold": [0, 1]}
