"""A search that is restored: with more trials, and with those again that failed."""

import pickle
from pathlib import Path
from typing import Any

from ray.tune.search import ConcurrencyLimiter, Searcher, SearchGenerator

from tuning.search.searcher import JournaledSearcher
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal
from tuning.tune_search import RepeatSearch, SweepSearch


def spec(trials: int) -> SweepSpec:
    parameters = {"optimizer.lr": {"uniform": [0, 1]}}
    return SweepSpec.model_validate({"parameters": parameters, "trials": trials})


def search(folder: Path, trials: int, concurrency: int = 8) -> SweepSearch:
    """A search as Tune unpickles it."""
    journaled = JournaledSearcher(spec(trials), folder / "journal.jsonl")
    made: SweepSearch = pickle.loads(pickle.dumps(SweepSearch(journaled, concurrency)))
    made.set_search_properties("val/loss", "min", {})
    return made


def ended(search: SearchGenerator, trial_id: str, value: float | None) -> None:
    result = {"val/loss": value, "step": 10, "epoch": 1.0, "complete": True}
    search.on_trial_complete(trial_id, result if value is not None else {}, error=value is None)


def run(search: SweepSearch, count: int) -> None:
    """Trials 0 and so on, as Tune's t0 and so on; the last one fails."""
    for number in range(count):
        search.searcher.suggest(f"t{number}")
        ended(search, f"t{number}", None if number == count - 1 else 0.1 * number)


def restored(folder: Path, trials: int, **fields: Any) -> SweepSearch:
    found = search(folder, trials, **fields)
    found.restore_from_dir(str(folder))
    return found


def test_a_search_that_had_finished_goes_on_with_more_trials(tmp_path: Path) -> None:
    first = search(tmp_path, 3)
    run(first, 3)
    assert first.searcher.suggest("none") == Searcher.FINISHED
    first._finished = True  # as its `create_trial_if_possible` notes
    first.save_to_dir(str(tmp_path), "session")
    more = restored(tmp_path, 5)
    assert not more.is_finished()
    assert [more.searcher.suggest(f"u{n}")["trial"] for n in range(2)] == [3, 4]
    assert more.searcher.suggest("none") == Searcher.FINISHED


def test_the_state_of_a_tune_that_counted_its_samples_can_be_read(tmp_path: Path) -> None:
    """As sweeps of earlier versions have it: three samples, at most two at a time."""
    journaled = JournaledSearcher(spec(3), tmp_path / "journal.jsonl")
    earlier = SearchGenerator(ConcurrencyLimiter(journaled, 2))
    earlier.set_state({"counter": 3, "total_samples": 3, "finished": True, "experiment": None})
    for number in range(2):
        earlier.searcher.suggest(f"t{number}")
    earlier.save_to_dir(str(tmp_path), "session")
    found = restored(tmp_path, 8, concurrency=4)
    assert not found.is_finished()
    assert isinstance(found.searcher, ConcurrencyLimiter)
    assert found.searcher.max_concurrent == 4
    assert found.searcher.live_trials == {"t0", "t1"}


def test_a_trial_that_runs_again_counts_as_running_and_the_search_learns_its_end(
    tmp_path: Path,
) -> None:
    first = search(tmp_path, 3)
    run(first, 3)
    first.save_to_dir(str(tmp_path), "session")
    Journal(tmp_path / "journal.jsonl").record_restart(2)
    again = restored(tmp_path, 4, concurrency=1)
    assert again.searcher.live_trials == {"t2"}
    assert again.searcher.suggest("u0") is None, "one at a time"
    ended(again, "t2", 0.25)
    ends = Journal(tmp_path / "journal.jsonl").ends
    assert [(number, ends[number]["value"]) for number in ends][-1] == (2, 0.25)
    assert again.searcher.suggest("u0")["trial"] == 3


def test_repeats_are_suggested_in_their_order_and_end() -> None:
    left = {4: {"trial": 4, "train.seed": 1}, 7: {"trial": 7, "train.seed": 2}}
    searcher = RepeatSearch("sweep", "val/loss", "min", left)
    assert searcher.suggest("a") == left[4]
    assert searcher.suggest("b") == left[7]
    assert searcher.suggest("c") == Searcher.FINISHED
