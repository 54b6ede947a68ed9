"""A search that is made again from its journal goes on as if it had not been interrupted."""

import itertools
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuning.search.optuna_study import SearchStudy
from tuning.spaces.searches import WITHOUT_MEMORY, Search
from tuning.spaces.space import SweepSpec
from tuning.trials.journal import Journal

NUMBERS: dict[str, Any] = {
    "optimizer.lr": {"loguniform": [1e-4, 1e-1]},
    "model.width": {"integer": [4, 64]},
    "model.dropout": {"uniform": [0, 0.5], "step": 0.1},
}
MIXED = NUMBERS | {
    "optimizer.name": {"choice": ["sgd", "adamw"]},
    "optimizer.momentum": {"uniform": [0, 0.9], "when": {"optimizer.name": "sgd"}},
    "model.blocks": {"choice": [[1], 1, True, 1.0, None]},
    "model.depth": {"same_as": "model.width"},
}


def sweep(search: str, parameters: dict[str, Any] = NUMBERS, **fields: Any) -> SweepSpec:
    fields = {"scheduler": {"name": "asha"}, "trials": 24, **fields}
    return SweepSpec.model_validate({"parameters": parameters, "search": search, **fields})


def loss_of(parameters: dict[str, Any]) -> float:
    return abs(math.log(parameters["optimizer.lr"] / 0.01)) + parameters["model.width"] / 64


class Play:
    """A search with its journal, and trials that run, end and are suggested in any order."""

    def __init__(self, spec: SweepSpec, path: Path) -> None:
        self.spec, self.path = spec, path
        self.running: list[int] = []
        self.suggested: list[dict[str, Any]] = []
        self.resume()

    def resume(self) -> None:
        self.journal = Journal(self.path)
        self.search = SearchStudy(self.spec, self.journal)

    def suggest(self) -> bool:
        number = len(self.suggested)
        found = self.search.suggest(number)
        if found is None:
            return False
        self.journal.record_suggestion(number, *found)
        self.suggested.append(found[0])
        self.running.append(number)
        return True

    def end(self, place: int, how: str) -> None:
        """`how` is complete, stopped, nan or failed."""
        number = self.running.pop(place % len(self.running))
        value: float | None = loss_of(self.journal.parameters[number])
        if how in ("nan", "failed"):
            value = math.nan if how == "nan" else None
        more: dict[str, Any] = {}
        if value is not None and self.spec.objective:
            more["losses"] = [value if math.isfinite(value) else math.inf, number % 7]
        if value is not None and self.spec.constraints:
            more["violations"] = dict.fromkeys(self.spec.constraints, number % 5 - 3.0)
        self.journal.record_end(number, value, 3 + number % 2, how == "complete", **more)
        self.search.tell(number)


Step = tuple[str, int, str]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["suggest", "suggest", "end"]),
        st.integers(0, 3),
        st.sampled_from(["complete", "complete", "stopped", "nan", "failed"]),
    ),
    min_size=6,
    max_size=30,
)


def play(spec: SweepSpec, path: Path, steps: list[Step], resumes: Callable[[int], bool]) -> Play:
    """Follow the steps, and make the search anew from its journal before some of them."""
    played = Play(spec, path)
    for number, (action, place, how) in enumerate(steps):
        if resumes(number):
            played.resume()
        if action == "suggest" and len(played.suggested) < spec.total_trials:
            assert played.suggest()
        elif played.running:
            played.end(place, how)
    return played


def steady(trials: int, at_once: int = 3) -> list[Step]:
    """Steps of a sweep with some trials at a time, of which the oldest ends before the next one."""
    ways = ["complete", "stopped", "complete", "nan", "complete", "failed"]
    steps: list[Step] = [("suggest", 0, "")] * at_once
    for number in range(trials - at_once):
        steps += [("end", 0, ways[number % len(ways)]), ("suggest", 0, "")]
    return steps


SEARCHES = ["random", "grid", "bruteforce", "qmc", "tpe", "cmaes", "nsgaii", "nsgaiii"]
CHOICES = {
    "optimizer.lr": {"choice": [1e-3, 1e-2, 1e-1]},
    "model.width": {"choice": [4, 8, 16]},
    "model.blocks": {"choice": [1, True, 1.0]},
}


@pytest.mark.parametrize("search", SEARCHES)
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS, seed=st.integers(0, 9), mixed=st.booleans())
def test_a_resumed_search_suggests_what_an_uninterrupted_one_does(
    search: str,
    steps: list[Step],
    seed: int,
    mixed: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    parameters = CHOICES if search in ("grid", "bruteforce") else MIXED if mixed else NUMBERS
    spec = sweep(search, parameters, seed=seed)
    folder = tmp_path_factory.mktemp("search")
    chance = random.Random(seed)
    whole = play(spec, folder / "whole", steps, lambda _: False)
    resumed = play(spec, folder / "resumed", steps, lambda _: chance.random() < 0.3)
    assert resumed.suggested == whole.suggested


@pytest.mark.parametrize(
    ("search", "fields"),
    [
        pytest.param("gp", {}, marks=pytest.mark.slow),
        ("cmaes", {"trials": 24}),
        ("nsgaii", {"trials": 24}),
        ("tpe", {"objective": ["val/loss min", "cost_usd min"]}),
        ("nsgaiii", {"objective": ["val/loss min", "cost_usd min"], "trials": 24}),
        ("tpe", {"constraints": ["cost_usd < 2"]}),
        ("tpe", {"enqueue": [{"model.width": 5}, {"optimizer.lr": 0.05, "model.width": 6}]}),
        ("cmaes", {"enqueue": [{"model.width": 5}], "constraints": ["cost_usd < 2"]}),
    ],
)
def test_a_search_that_has_learned_goes_on_after_a_resume(
    search: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Long enough for generations to follow on each other, with a resume before each seventh step.

    The search is resumed where a trial has just been suggested and where one has just ended.
    """
    spec = sweep(search, **fields)
    steps = steady(16 if search == "gp" else spec.trials)  # its first ten are random
    whole = play(spec, tmp_path / "whole", steps, lambda _: False)
    resumed = play(spec, tmp_path / "resumed", steps, lambda number: number % 7 == 6)
    assert resumed.suggested == whole.suggested


def test_cmaes_has_its_distribution_after_a_resume(tmp_path: Path) -> None:
    """It closes in on the best values although it is made anew for each tenth trial."""
    parameters = {"optimizer.lr": {"loguniform": [1e-6, 1.0]}, "model.width": {"uniform": [0, 64]}}
    spec = sweep("cmaes", parameters, trials=70)
    played = Play(spec, tmp_path / "journal")
    for number in range(70):
        if number % 10 == 9:
            played.resume()
        played.suggest()
        played.end(0, "complete")
    losses = [loss_of(parameters) for parameters in played.suggested]
    assert sorted(losses[-20:])[10] < 0.5 * sorted(losses[:20])[10]


def test_trials_that_run_are_known_after_a_resume(tmp_path: Path) -> None:
    """So that a search of several trials at a time does not suggest their neighbours."""
    played = Play(sweep("tpe"), tmp_path / "journal")
    for _ in range(3):
        played.suggest()
    played.end(1, "complete")
    played.resume()
    assert [trial.state.name for trial in played.search.trials] == [
        "RUNNING",
        "COMPLETE",
        "RUNNING",
    ]


@pytest.mark.parametrize("search", [*SEARCHES, "auto"])
@pytest.mark.parametrize("trials", [5, 200])
def test_a_finite_space_is_tried_once_each_and_then_the_search_ends(
    search: str, trials: int, tmp_path: Path
) -> None:
    """12 combinations: `sgd` has 3 momenta for each of 3 widths, `adamw` none."""
    parameters = {
        "optimizer.name": {"choice": ["sgd", "adamw"]},
        "optimizer.momentum": {"choice": [0, 0.5, 0.9], "when": {"optimizer.name": "sgd"}},
        "model.width": {"integer": [1, 3]},
    }
    spec = sweep(search, parameters, trials=trials)
    expected = 5 if trials == 5 and search not in ("grid", "bruteforce") else 12
    assert spec.total_trials == expected
    played = Play(spec, tmp_path / "journal")
    for number in range(expected):
        assert played.suggest()
        played.journal.record_end(number, number % 3 / 7, 1, number % 2 == 0)
        played.search.tell(number)
    tried = {tuple(sorted(parameters.items())) for parameters in played.suggested}
    assert len(tried) == expected
    if expected == 12:
        assert not played.suggest()


def test_grid_goes_through_the_file_and_bruteforce_through_all_of_it_in_another_order(
    tmp_path: Path,
) -> None:
    orders = {}
    for search in ("grid", "bruteforce"):
        played = Play(sweep(search, CHOICES), tmp_path / search)
        for _ in range(27):
            played.suggest()
        orders[search] = [tuple(parameters.values()) for parameters in played.suggested]
    expected = list(itertools.product([1e-3, 1e-2, 1e-1], [4, 8, 16], [1, True, 1.0]))
    assert [tuple(map(repr, values)) for values in orders["grid"]] == [
        tuple(map(repr, values)) for values in expected
    ]
    assert orders["bruteforce"] != orders["grid"]
    assert sorted(orders["bruteforce"]) == sorted(orders["grid"])


def test_a_grid_of_ten_thousand_is_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {f"model.x{axis}": {"integer": [0, 9]} for axis in range(4)}
    spec = sweep("grid", parameters)
    assert spec.total_trials == 10_000
    journal = Journal(tmp_path / "journal")
    monkeypatch.setattr(journal, "record_suggestion", lambda *entry: None)
    listings = []
    original = SweepSpec.combinations
    monkeypatch.setattr(
        SweepSpec, "combinations", lambda self: listings.append(1) or original(self)
    )
    search = SearchStudy(spec, journal)
    for number in range(2_000):
        suggested = search.suggest(number)
        assert suggested is not None
        digits = [suggested[0][f"model.x{axis}"] for axis in range(4)]
        assert digits == [int(digit) for digit in f"{number:04d}"]
    assert listings == [1]


def test_pbt_may_begin_trials_with_the_same_values(tmp_path: Path) -> None:
    """It changes them, and a population is larger than a choice."""
    spec = sweep("random", {"model.width": {"choice": [4, 8]}}, scheduler={"name": "pbt"}, trials=6)
    played = Play(spec, tmp_path / "journal")
    assert [played.suggest() for _ in range(6)] == [True] * 6


def test_given_points_come_first_and_the_search_completes_them(tmp_path: Path) -> None:
    points = [{"optimizer.lr": 0.02, "model.width": 7}, {"model.blocks": True}]
    for search in ("random", "tpe", "cmaes", "qmc"):
        played = Play(sweep(search, MIXED, enqueue=points), tmp_path / search)
        for _ in range(3):
            played.suggest()
        first, second, third = played.suggested
        assert (first["optimizer.lr"], first["model.width"], first["model.depth"]) == (0.02, 7, 7)
        assert second["model.blocks"] is True
        assert third != second


def test_a_grid_does_not_repeat_its_given_points(tmp_path: Path) -> None:
    point = {"optimizer.lr": 1e-2, "model.width": 8, "model.blocks": True}
    played = Play(sweep("grid", CHOICES, enqueue=[point, point]), tmp_path / "journal")
    while played.suggest():
        pass
    assert played.suggested[0] == point
    assert len({repr(parameters) for parameters in played.suggested}) == 27
    assert len(played.suggested) == 27


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ("tpe", [("COMPLETE", 0.5), ("PRUNED", 0.7), ("PRUNED", None), ("FAIL", None)]),
        ("gp", [("COMPLETE", 0.5), ("COMPLETE", 0.7), ("COMPLETE", math.inf), ("FAIL", None)]),
    ],
)
def test_how_a_trial_ended_is_told_in_the_form_from_which_the_search_learns(
    search: str, expected: list[tuple[str, float | None]], tmp_path: Path
) -> None:
    """A stopped trial is not ignored, and one that is not finite is the worst of all."""
    played = Play(sweep(search), tmp_path / "journal")
    for number, (value, complete) in enumerate(
        [(0.5, True), (0.7, False), (math.nan, True), (None, False)]
    ):
        played.suggest()
        played.journal.record_end(number, value, 10, complete)
        played.search.tell(number)
    assert [(t.state.name, t.value) for t in played.search.trials] == expected


@pytest.mark.parametrize("search", ["tpe", "nsgaii"])
def test_all_objectives_are_searched(search: str, tmp_path: Path) -> None:
    """Two losses that trade off: each is optimal at another end of the range."""
    spec = sweep(
        search,
        {"x": {"uniform": [-2, 3]}, "y": {"uniform": [-1, 1]}},
        objective=["val/loss min", "val/latency min"],
        trials=64,
    )
    played = Play(spec, tmp_path / "journal")
    for number in range(spec.trials):
        played.suggest()
        x, y = played.suggested[-1]["x"], played.suggested[-1]["y"]
        both = [x**2 + y**2, (x - 1) ** 2 + y**2]
        played.journal.record_end(number, both[0], 5, True, both)
        played.search.tell(number)
    told = [trial.values for trial in played.search.trials if trial.values is not None]
    assert told == [played.journal.ends[number]["losses"] for number in range(spec.trials)]
    late = played.suggested[-24:]
    near = sum(-0.3 < p["x"] < 1.3 and abs(p["y"]) < 0.4 for p in late)
    assert near > 2 * len(late) * 1.6 / 5 * 0.4, "no more often near the front than by chance"


@pytest.mark.parametrize("search", ["tpe", "cmaes"])
def test_constraints_keep_the_search_away_from_what_breaks_them(
    search: str, tmp_path: Path
) -> None:
    """The loss is the smaller the larger x is; of x only the half below 0.5 is allowed."""
    spec = sweep(
        search,
        {"x": {"uniform": [0, 1]}, "y": {"uniform": [0, 1]}},
        constraints=["val/latency_ms < 0.5"],
        trials=50,
    )
    played = Play(spec, tmp_path / "journal")
    for number in range(50):
        played.suggest()
        x = played.suggested[-1]["x"]
        broken = {"val/latency_ms < 0.5": x - 0.5}
        played.journal.record_end(number, -x, 5, True, violations=broken)
        played.search.tell(number)
    late = [parameters["x"] for parameters in played.suggested[-20:]]
    assert 0.4 < statistics.median(late) < 0.65, "without the constraint it is above 0.8"


def test_a_journal_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Its suggestions have nothing but their parameters."""
    path = tmp_path / "journal"
    path.write_text(
        '{"trial": 0, "parameters": {"optimizer.lr": 0.01, "model.width": 8, "model.dropout": 0.1}}'
        '\n{"trial": 0, "value": 0.5, "step": 10, "complete": true}\n'
    )
    for search in ("tpe", "cmaes", "random"):
        played = Play(sweep(search), path)
        assert len(played.search.trials) == (0 if search in WITHOUT_MEMORY else 1)
        assert played.search.suggest(1) is not None


def test_every_search_is_covered() -> None:
    assert {*SEARCHES, "gp", "auto"} == set(Search.__args__)  # type: ignore[attr-defined]
