"""Which search a sweep has, and which spaces and points it accepts."""

from typing import Any

import pytest

from cluster.base.config import validate
from cluster.base.errors import SpecError
from tuning.search.samplers import algorithm, build_sampler, search_words, suggestion_seed
from tuning.spaces.space import SweepSpec

NUMBER = {"uniform": [0.1, 1]}


def sweep(parameters: dict[str, Any], **fields: Any) -> SweepSpec:
    data = {"parameters": parameters, "scheduler": {"name": "none"}, **fields}
    return validate(SweepSpec, data, "sweep.")


@pytest.mark.parametrize(
    ("parameters", "fields", "chosen"),
    [
        ({"x": NUMBER}, {}, "gp"),
        ({"x": NUMBER, "y": {"same_as": "x"}}, {}, "gp"),
        ({"x": NUMBER}, {"scheduler": {"name": "asha"}}, "tpe"),
        ({"x": NUMBER}, {"scheduler": {"name": "pbt"}}, "random"),
        ({"x": NUMBER, "c": {"choice": [1, 2]}}, {}, "tpe"),
        ({"x": NUMBER, "y": NUMBER | {"when": {"c": 1}}, "c": {"choice": [1, 2]}}, {}, "tpe"),
        ({"c": {"choice": [1, 2]}, "d": {"integer": [1, 3]}}, {}, "bruteforce"),
        ({"x": NUMBER}, {"trials": 251}, "cmaes"),
        ({"x": NUMBER}, {"trials": 251, "constraints": ["cost_usd < 2"]}, "tpe"),
        ({"x": NUMBER}, {"objective": ["val/loss min", "cost_usd min"]}, "gp"),
        ({"x": NUMBER}, {"objective": ["val/loss min", "cost_usd min"], "trials": 300}, "nsgaii"),
        (
            {"x": NUMBER},
            {"objective": ["val/loss min", "cost_usd min", "energy_j min", "val/a max"]},
            "nsgaiii",
        ),
    ],
)
def test_auto_chooses_and_says_why(
    parameters: dict[str, Any], fields: dict[str, Any], chosen: str
) -> None:
    spec = sweep(parameters, search="auto", **fields)
    assert algorithm(spec) == chosen
    assert search_words(spec).startswith(f"{chosen} (auto: ")
    assert search_words(sweep(parameters, search="random")) == "random"


def test_a_genetic_search_has_generations_within_its_trials() -> None:
    """Optuna's 50 per generation would be all of a sweep of 40 trials."""
    for trials, population in ((16, 8), (160, 20), (10_000, 50)):
        sampler = build_sampler(sweep({"x": NUMBER}, trials=trials), "nsgaii", 0, [])
        assert sampler.population_size == population


def test_seeds_differ_between_trials_attempts_and_sweeps() -> None:
    specs = [sweep({"x": NUMBER}, seed=seed) for seed in range(5)]
    seeds = {
        suggestion_seed(spec, n, attempt) for spec in specs for n in range(20) for attempt in (0, 1)
    }
    assert len(seeds) == 200
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("search", ["tpe", "grid", "auto", "pbt"])
def test_there_are_no_more_trials_than_combinations(search: str) -> None:
    parameters = {
        "c": {"choice": [1, 2]},
        "d": {"integer": [1, 1_000_000], "when": {"c": 2}},
        "e": {"uniform": [0, 1], "step": 0.25},
    }
    scheduler = {"name": "pbt" if search == "pbt" else "asha"}
    name = "random" if search == "pbt" else search
    if search == "grid":
        parameters["d"]["integer"] = [1, 3]
    spec = sweep(parameters, search=name, trials=100, scheduler=scheduler)
    assert spec.total_trials == (5 * (1 + 3) if search == "grid" else 100)
    few = sweep({"c": {"choice": [1, 2]}}, search=name, trials=100, scheduler=scheduler)
    assert few.total_trials == (100 if search == "pbt" else 2)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"search": "grid"}, "sweep: grid needs a choice for every parameter, x has none"),
        ({"search": "bruteforce"}, "sweep: bruteforce needs a choice for every parameter, x has"),
        ({"enqueue": [{"y": 1}]}, "sweep: enqueue.0: y is not among the parameters"),
        ({"enqueue": [{"x": 0.5}, {"x": 5}]}, "sweep: enqueue.1: x: 5 is not within [0.1, 1]"),
        ({"enqueue": [{"x": "a"}]}, "sweep: enqueue.0: x: 'a' is no number"),
        ({"enqueue": [{"c": 3}]}, "sweep: enqueue.0: c: 3 is not in the choice"),
        ({"enqueue": [{"n": 1.5}]}, "sweep: enqueue.0: n: 1.5 is no integer"),
        ({"enqueue": [{"t": 1}]}, "sweep: enqueue.0: t is the same as x; leave it out"),
        ({"constraints": ["val/a"]}, "sweep.constraints: 'val/a' must look like `cost_usd < 2`"),
        ({"constraints": ["euros < 2"]}, "sweep.constraints: 'euros' must be val/... or one of"),
        ({"search": "gird"}, "sweep.search: must be 'auto', 'random', 'grid'"),
    ],
)
def test_mistakes_are_named_in_a_line(fields: dict[str, Any], problem: str) -> None:
    parameters = {
        "x": NUMBER,
        "c": {"choice": [1, 2]},
        "n": {"integer": [1, 4]},
        "t": {"same_as": "x"},
    }
    with pytest.raises(SpecError) as caught:
        sweep(parameters, **fields)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


def test_a_grid_of_millions_is_a_mistake() -> None:
    parameters = {f"x{axis}": {"integer": [0, 99]} for axis in range(4)}
    with pytest.raises(SpecError, match=r"grid would try 100,000,000 combinations, and the most"):
        sweep(parameters, search="grid")
