"""The values of one parameter: what a distribution accepts, lists, draws and tells Optuna."""

import itertools
import json
import math
import random
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.config import validate
from cluster.base.errors import SpecError
from tuning.spaces.distributions import Distribution, equal, identical


def of(**fields: Any) -> Distribution:
    return validate(Distribution, fields, "sweep.parameters.optimizer.lr.")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"uniform": [0, 1], "same_as": "model.width"}, "must have exactly one of"),
        ({"choice": [1, 2], "step": 1}, "choice has no step"),
        ({"choice": [1, 2], "log": True}, "choice has no log"),
        ({"same_as": "model.width", "step": 1}, "same_as has no step"),
        ({"loguniform": [0.1, 1], "step": 0.1}, "loguniform has no step; list the values"),
        ({"integer": [1, 8], "log": True, "step": 2}, "log_integer has no step; list the values"),
        ({"integer": [1, 8], "step": 1.5}, "integer needs a whole number as its step"),
        ({"uniform": [0, 1], "log": True}, "loguniform needs low > 0"),
        ({"uniform": [0, 1], "step": 0}, "must be greater than 0"),
    ],
)
def test_mistakes_are_one_line(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        of(**fields)
    assert problem in str(caught.value)
    assert str(caught.value).startswith("sweep.parameters.optimizer.lr")
    assert "\n" not in str(caught.value)


def test_int_and_log_are_other_words_for_the_same_ranges() -> None:
    assert of(int=[1, 8]) == of(integer=[1, 8])
    assert of(uniform=[1, 8], log=True).kind == "loguniform"
    assert of(int=[1, 8], log=True).to_optuna() == of(log_integer=[1, 8]).to_optuna()
    dumped = of(int=[1, 8], step=2).model_dump(mode="json")
    assert of(**dumped) == of(integer=[1, 8], step=2)


def test_values_with_a_step_are_those_of_decimal_notation() -> None:
    assert of(uniform=[0.1, 0.75], step=0.1).values() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert of(uniform=[0.1, 0.75], step=0.1).bounds == (0.1, 0.7)
    assert list(of(integer=[3, 12], step=4).values() or []) == [3, 7, 11]
    assert of(integer=[3, 12], step=4).boundary_values() == [3, 11]
    assert of(uniform=[0, 1]).values() is None
    assert of(uniform=[2, 2]).values() == [2]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["uniform", "loguniform", "integer", "log_integer", "step", "int step"]),
    low=st.integers(1, 50),
    width=st.integers(0, 300),
    seed=st.integers(0, 9),
)
def test_whatever_is_drawn_or_asked_for_is_a_value(
    kind: str, low: int, width: int, seed: int
) -> None:
    fields: dict[str, Any] = {kind: [low, low + width]}
    if kind == "step":
        fields = {"uniform": [low / 10, (low + width) / 10], "step": 0.3}
    if kind == "int step":
        fields = {"integer": [low, low + width], "step": 7}
    distribution = of(**fields)
    rng = random.Random(seed)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    asked = study.ask({"x": distribution.to_optuna()}).params["x"]
    drawn = [distribution.from_optuna(asked), *(distribution.sample(rng) for _ in range(5))]
    low_bound, high_bound = distribution.bounds or (0, 0)
    for value in drawn:
        assert low_bound <= value <= high_bound
        assert isinstance(value, int if "int" in kind else float)
        assert json.loads(json.dumps(value)) == value
        if "step" in kind:
            assert value in (distribution.values() or [])
        kept = {"x": distribution.optuna_value(value)}
        space = {"x": distribution.to_optuna()}
        optuna.trial.create_trial(value=0.0, params=kept, distributions=space)  # raises if not


def test_a_logarithmic_range_is_drawn_evenly_over_its_decades() -> None:
    rng = random.Random(1)
    for distribution in (of(loguniform=[1e-4, 1e4]), of(log_integer=[1, 10**8])):
        low, high = distribution.bounds or (0, 0)
        middle = math.sqrt(low * high)
        below = sum(distribution.sample(rng) < middle for _ in range(2000))
        assert 900 < below < 1100


def test_choices_that_python_takes_for_equal_are_all_chosen() -> None:
    choice = [1, True, 1.0, "1", None, [1], {"a": 1}, {"a": True}]
    distribution = of(choice=choice)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = {
        json.dumps(distribution.from_optuna(study.ask({"x": distribution.to_optuna()}).params["x"]))
        for _ in range(200)
    }
    assert found == {json.dumps(each) for each in choice}
    for index, each in enumerate(choice):
        assert distribution.optuna_value(json.loads(json.dumps(each))) == index
    with pytest.raises(ValueError, match="2 is not in the choice"):
        distribution.optuna_value(2)


def test_what_is_the_same_choice_and_what_fulfils_a_condition() -> None:
    for one, other in itertools.combinations([1, True, 1.0, "1"], 2):
        assert not identical(one, other)
    assert identical({"a": [1, 2]}, {"a": [1, 2]})
    assert equal(1, 1.0)
    assert not equal(1, True)
    assert not equal(0, False)
    assert equal([1], [1])
