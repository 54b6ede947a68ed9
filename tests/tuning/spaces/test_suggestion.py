"""From a space to the parameters of one trial: conditions, ties, sections, combinations."""

import itertools
import random
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.config import validate
from cluster.base.errors import SpecError
from tuning.spaces.distributions import Distribution
from tuning.spaces.space import SweepSpec, trial_spec_data
from tuning.spaces.suggestion import (
    assignments,
    combinations,
    completed,
    count_combinations,
    example,
    optuna_parameters,
    section_values,
    suggest,
)

CONDITIONAL: dict[str, Any] = {
    "optimizer.momentum": {"choice": [0.0, 0.9], "when": {"optimizer.name": "sgd"}},
    "optimizer.name": {"choice": ["sgd", "adamw"]},
    "model.width": {"integer": [4, 12], "step": 4},
    "model.inner": {"same_as": "model.width"},
    "optimizer.schedule.warmup": {
        "choice": [0.1, 0.2],
        "when": {"optimizer.momentum": 0.9, "model.width": [4, 8]},
    },
}


def sweep(parameters: dict[str, Any], **fields: Any) -> SweepSpec:
    return validate(SweepSpec, {"parameters": parameters, **fields}, "sweep.")


def by_hand() -> list[dict[str, Any]]:
    """The trials of CONDITIONAL, in nested loops."""
    found = []
    for name, width in itertools.product(["sgd", "adamw"], [4, 8, 12]):
        always = {"optimizer.name": name, "model.width": width, "model.inner": width}
        for momentum in [0.0, 0.9] if name == "sgd" else [None]:
            own = {"optimizer.momentum": momentum} if momentum is not None else {}
            for warmup in [0.1, 0.2] if momentum == 0.9 and width < 12 else [None]:
                more = {"optimizer.schedule.warmup": warmup} if warmup is not None else {}
                found.append({**own, **always, **more})
    return found


def as_sets(trials: Any) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(trial.items()) for trial in trials}


def test_a_finite_space_lists_each_trial_once() -> None:
    spec = sweep(CONDITIONAL, search="grid")
    assert len(by_hand()) == 11
    assert spec.total_trials == 11
    assert count_combinations(spec.parameters) == 11
    assert len(spec.combinations()) == 11
    assert as_sets(spec.combinations()) == as_sets(by_hand())
    assert list(spec.combinations()[0]) == [path for path in CONDITIONAL if path in by_hand()[0]]


def test_the_count_needs_no_list_of_all_combinations() -> None:
    huge = {f"model.n{place}": {"integer": [1, 1000]} for place in range(10)}
    assert count_combinations(sweep(huge | CONDITIONAL).parameters) == 11 * 1000**10
    continuous = sweep({"optimizer.lr": {"uniform": [0, 1]}})
    assert count_combinations(continuous.parameters) is None


@pytest.mark.parametrize("sampler", ["RandomSampler", "TPESampler"])
def test_optuna_suggests_only_trials_of_the_space_and_all_of_them(sampler: str) -> None:
    """A study that was made from the suggestions has the same trials as the one that made them."""
    spec = sweep(CONDITIONAL)
    study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=0))
    found = []
    for _ in range(150):
        trial = study.ask()
        found.append(suggest(trial, spec))
        params, distributions = optuna_parameters(spec.parameters, found[-1])
        assert params == trial.params
        assert distributions == trial.distributions
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=0.0)
        )
        study.tell(trial, random.Random(len(found)).random())
    assert as_sets(found) <= as_sets(by_hand())
    if sampler == "RandomSampler":
        assert as_sets(found) == as_sets(by_hand())


def test_changed_values_become_a_trial_of_the_space_again() -> None:
    spec, rng = sweep(CONDITIONAL), random.Random(0)
    [start] = [
        t for t in by_hand() if t.get("optimizer.schedule.warmup") == 0.1 and t["model.width"] == 4
    ]
    other = completed(spec.parameters, {**start, "optimizer.name": "adamw"}, rng)
    assert other == {"optimizer.name": "adamw", "model.width": 4, "model.inner": 4}
    wider = completed(spec.parameters, {**start, "model.width": 12}, rng)
    assert wider == {
        "optimizer.momentum": 0.9,
        "optimizer.name": "sgd",
        "model.width": 12,
        "model.inner": 12,
    }
    back = completed(spec.parameters, {**other, "optimizer.name": "sgd"}, rng)
    assert back["optimizer.momentum"] in (0.0, 0.9)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_space_without_a_circle_has_the_trials_of_plain_loops(data: st.DataObject) -> None:
    """Random conditions on parameters that may stand before or after their condition."""
    names = [f"model.p{place}" for place in range(data.draw(st.integers(1, 5)))]
    order = data.draw(st.permutations(names))
    space: dict[str, Any] = {}
    for place, name in enumerate(order):
        when = {}
        for other in order[:place]:
            if data.draw(st.integers(0, 3)) == 0:
                when[other] = data.draw(st.sampled_from([1, 2, [1, 2], [2, 3]]))
        space[name] = {"choice": data.draw(st.sampled_from([[1], [1, 2], [1, 2, 3]])), "when": when}
    parameters = {name: Distribution.model_validate(space[name]) for name in sorted(names)}

    trials: list[dict[str, Any]] = [{}]
    for name in order:
        extended = []
        for trial in trials:
            holds = all(
                trial.get(other) in (wanted if isinstance(wanted, list) else [wanted])
                for other, wanted in space[name]["when"].items()
            )
            extended += [{**trial, name: v} for v in space[name]["choice"]] if holds else [trial]
        trials = extended
    listed = list(combinations(parameters))
    assert len(listed) == len(trials) == count_combinations(parameters)
    assert as_sets(listed) == as_sets(trials)
    for name in names:
        found = example(parameters, name, 1)
        assert (found is not None) == any(name in trial for trial in trials)
        assert found is None or (found in trials and found[name] == 1)


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        (
            {
                "a": {"choice": [1], "when": {"b": 1}},
                "b": {"choice": [1], "when": {"c": 1}},
                "c": {"choice": [1], "when": {"a": 1}},
            },
            "conditions and ties go in a circle: a -> b -> c -> a",
        ),
        ({"a": {"choice": [1], "when": {"a": 1}}}, "go in a circle: a -> a"),
        ({"a": {"same_as": "b"}, "b": {"same_as": "a"}}, "go in a circle: a -> b -> a"),
        (
            {
                "optimizer": {"choice": [{"name": "sgd"}], "when": {"model.width": 1}},
                "model.width": {"choice": [1], "when": {"optimizer.name": "sgd"}},
            },
            "go in a circle: optimizer -> model.width -> optimizer",
        ),
        ({"a": {"choice": [1], "when": {"b": 1}}}, "a depends on b, which is no parameter"),
        ({"a": {"same_as": "optimizer.lr"}}, "a depends on optimizer.lr, which is no parameter"),
    ],
)
def test_circles_and_conditions_on_what_is_not_varied(
    parameters: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpecError) as caught:
        sweep(parameters)
    assert str(caught.value).startswith("sweep.parameters: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_choice_of_sections_replaces_them_and_a_name_varies_several() -> None:
    spec = sweep(
        {
            "optimizer.schedule.warmup": {"choice": [0.5], "when": {"optimizer.name": "sgd"}},
            "recipe": {
                "choice": [
                    {"optimizer": {"name": "sgd", "lr": 0.1}, "train.clip_norm": 1.0},
                    {"optimizer": {"name": "adamw"}},
                ]
            },
        },
        search="grid",
    )
    base = {"optimizer": {"name": "adamw", "lr": 1.0, "momentum": 0.5}, "train": {"epochs": 3}}
    assert [trial_spec_data(base, chosen) for chosen in spec.combinations()] == [
        {
            "optimizer": {"name": "sgd", "lr": 0.1, "schedule": {"warmup": 0.5}},
            "train": {"epochs": 3, "clip_norm": 1.0},
        },
        {"optimizer": {"name": "adamw"}, "train": {"epochs": 3}},
    ]


def test_a_section_is_set_before_its_fields_whatever_their_order() -> None:
    chosen = {"optimizer.lr": 0.5, "optimizer": {"name": "sgd"}, "optimizer.schedule.final": 0.1}
    assert list(assignments(chosen)) == ["optimizer", "optimizer.lr", "optimizer.schedule.final"]


def test_the_values_of_a_section_with_those_on_which_they_depend() -> None:
    spec = sweep(
        {
            "optimizer.lr": {"uniform": [0, 1]},
            "data.fold": {"integer": [0, 2], "when": {"data.source": "a"}},
            "data.source": {"choice": ["a", "b"]},
            "model.width": {"choice": [1, 2, 3]},
        }
    )
    assert list(section_values(spec.parameters, "data")) == [
        {"data.fold": 0, "data.source": "a"},
        {"data.fold": 1, "data.source": "a"},
        {"data.fold": 2, "data.source": "a"},
        {"data.source": "b"},
    ]
    assert list(section_values(spec.parameters, "scale")) == [{}]
    lr = [each["optimizer.lr"] for each in section_values(spec.parameters, "optimizer")]
    assert lr == [0, 1]


def test_an_example_is_found_in_ranges_that_are_too_long_to_list() -> None:
    wide = {f"model.n{place}": {"integer": [1, 10**9]} for place in range(4)}
    when = {f"model.n{place}": [7, 8] for place in range(3)}
    spec = sweep({"optimizer.lr": {"uniform": [0, 1], "when": {**when, "model.n3": 10**9}}, **wide})
    found = example(spec.parameters, "optimizer.lr", 0.5)
    assert found is not None
    assert (found["optimizer.lr"], found["model.n3"]) == (0.5, 10**9)
    assert {found[f"model.n{place}"] for place in range(3)} <= {7, 8}
    assert example(spec.parameters, "model.n0", 3) == dict.fromkeys(wide, 10**9) | {"model.n0": 3}
