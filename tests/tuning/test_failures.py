"""Trials that fail: a mistake of all ends the sweep, one of some does not; they run again."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.checks.finite import not_finite, state_not_finite
from trainers.run_folder import TRIALS
from tuning.failures import MistakeWatch, run_failed_again
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import failure_lines
from tuning.trials.trial import ENDED_FILE, FAILED_FILE, JOURNAL_FILE, Sweep

MISTAKE = "TypeError: loss() takes 2 arguments (model.py:12)"
LR = {"loguniform": [1e-4, 1.0]}
"""Its middle is 0.01."""


def sweep_of(folder: Path, parameters: dict[str, Any]) -> Sweep:
    spec = SweepSpec.model_validate({"parameters": parameters, "trials": 16})
    return Sweep({}, spec, folder, folder)


def fail(sweep: Sweep, watch: MistakeWatch, reason: str, **parameters: Any) -> bool:
    """Have the next trial fail; returns whether the sweep is to be ended."""
    journal = Journal(sweep.folder / JOURNAL_FILE)
    number = journal.next_number
    journal.record_suggestion(number, {k.replace("__", "."): v for k, v in parameters.items()})
    folder = sweep.folder / TRIALS / f"{number:04d}"
    folder.mkdir(parents=True)
    (folder / FAILED_FILE).write_text(reason)
    return watch.on_trial_event("error", number, {})


def test_a_mistake_of_three_different_trials_ends_the_sweep(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"optimizer.lr": LR})
    watch = MistakeWatch(sweep)
    assert not fail(sweep, watch, MISTAKE, optimizer__lr=0.5)
    assert not fail(sweep, watch, MISTAKE, optimizer__lr=0.3)
    assert watch.line is None
    assert fail(sweep, watch, MISTAKE, optimizer__lr=0.001)
    assert watch.line == f"3 of the first trials failed alike: {MISTAKE}"
    assert not fail(sweep, watch, MISTAKE, optimizer__lr=0.002), "it is ended once"


def test_reasons_that_differ_in_numbers_are_alike(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"model.width": {"integer": [4, 12]}})
    watch = MistakeWatch(sweep)
    ends = [
        fail(sweep, watch, f"RuntimeError: shapes 10x{width} and 3x{width}", model__width=width)
        for width in (4, 8, 12)
    ]
    assert ends == [False, False, True]


@pytest.mark.parametrize(
    ("parameters", "values"),
    [
        ({"optimizer.lr": LR}, [0.5, 0.3, 0.9, 0.05, 0.02]),
        ({"model.kind": {"choice": ["a", "b"]}}, ["a"] * 5),
        ({"model.kind": {"choice": [1, True]}}, [True] * 5),
        ({"model.width": {"integer": [4, 64]}}, [4, 5, 6, 7, 33]),
    ],
)
def test_a_failure_that_a_parameter_may_explain_does_not(
    tmp_path: Path, parameters: dict[str, Any], values: list[Any]
) -> None:
    """33 of 4 to 64 is below the middle: the larger half may do better."""
    sweep = sweep_of(tmp_path, parameters)
    watch = MistakeWatch(sweep)
    path = next(iter(parameters)).replace(".", "__")
    assert not any(fail(sweep, watch, MISTAKE, **{path: value}) for value in values)


def test_a_failure_by_a_trials_own_values_does_not(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"optimizer.lr": LR})
    watch = MistakeWatch(sweep)
    reasons = [
        not_finite(math.nan, 6, 2.3),
        not_finite(math.inf, 6, 2.3),
        not_finite(2.0, 6, 2.3),
        state_not_finite(["weight"], 6),
        "out of memory on cuda",
    ]
    for reason, lr in itertools.product(reasons, (0.5, 0.001, 0.2, 0.002)):
        assert not fail(sweep, watch, reason, optimizer__lr=lr), reason


def test_an_evaluation_shows_that_not_all_trials_fail(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"optimizer.lr": LR})
    watch = MistakeWatch(sweep)
    watch.on_trial_event("result", 7, {"val/loss": 1.0})
    assert not any(fail(sweep, watch, MISTAKE, optimizer__lr=lr) for lr in (0.5, 0.001, 0.2, 0.002))


def test_a_mistake_in_a_field_that_no_trial_varies_ends_the_sweep_at_once(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, {"optimizer.lr": LR})
    watch = MistakeWatch(sweep)
    assert not fail(sweep, watch, "optimizer.lr: too large for this model", optimizer__lr=0.5)
    missing = "sweep.metric: the workload has no val/auc (it has val/loss)"
    assert fail(sweep, watch, missing, optimizer__lr=0.4)
    assert watch.line == f"trial 0001 failed as all would: {missing}"


@settings(max_examples=25)
@given(st.lists(st.floats(1e-4, 1.0), max_size=12))
def test_no_half_of_a_range_is_condemned_unseen(
    tmp_path_factory: pytest.TempPathFactory, rates: list[float]
) -> None:
    """Independently: the sweep ends at the first place with three values, on both sides of 0.01."""
    sweep = sweep_of(tmp_path_factory.mktemp("watch"), {"optimizer.lr": LR})
    watch = MistakeWatch(sweep)
    ended = next(
        (n for n, lr in enumerate(rates) if fail(sweep, watch, MISTAKE, optimizer__lr=lr)), None
    )
    expected = None
    for n in range(2, len(rates)):
        seen = [math.log10(lr) for lr in rates[: n + 1]]
        if min(seen) <= -2 <= max(seen) or math.isclose(min(map(abs, [s + 2 for s in seen])), 0):
            expected = n
            break
    assert ended == expected


def test_the_lines_tell_how_many_failed_and_each_reason_once() -> None:
    failed = {number: f"the loss is nan at step {number}" for number in range(8)}
    failed[9] = MISTAKE
    assert failure_lines(failed, 10) == [
        "9 of 10 trials failed",
        "trials 0000, 0001, 0002, 0003, 0004 and 3 more failed: the loss is nan at step 0",
        f"trial 0009 failed: {MISTAKE}",
    ]
    assert failure_lines({}, 10) == []


def test_failed_and_lost_trials_run_again_and_the_search_learns_from_their_next_end(
    tmp_path: Path,
) -> None:
    """0 is complete, 1 failed, 2 was lost too often by an earlier version, 3 is running, 4 repeats
    another trial and failed."""
    sweep = sweep_of(tmp_path, {"optimizer.lr": LR})
    journal = Journal(tmp_path / JOURNAL_FILE)
    for number in range(4):
        journal.record_suggestion(number, {"optimizer.lr": 0.1})
        (tmp_path / TRIALS / f"{number:04d}").mkdir(parents=True)
    journal.record_end(0, 0.5, 10, True)
    journal.record_end(1, None, 0, False)
    journal.record_end(2, None, 0, False)
    journal.record_repeat(4, 0, {"optimizer.lr": 0.1, "train.seed": 1})
    (tmp_path / TRIALS / "0004").mkdir()
    (tmp_path / TRIALS / "0000" / ENDED_FILE).write_text(json.dumps({"complete": True}))
    for number in (1, 4):
        (tmp_path / TRIALS / f"{number:04d}" / FAILED_FILE).write_text(MISTAKE)
    assert run_failed_again(sweep) == [1, 2, 4]
    assert list(Journal(tmp_path / JOURNAL_FILE).ends) == [0]
    assert not list(tmp_path.glob(f"{TRIALS}/*/{FAILED_FILE}"))
    assert run_failed_again(sweep) == []
