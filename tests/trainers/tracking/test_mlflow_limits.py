"""Names that MLflow accepts, one to one, and numbers that fit in its requests."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.tracking.mlflow_limits import AllowedNames, NumberOutOfRangeError, check_range
from trainers.tracking.mlflow_store import is_permanent_error
from trainers.tracking.operation_log import MetricPoint


@given(st.lists(st.text("a_@#./ ", min_size=1, max_size=6), unique=True))
def test_names_are_allowed_and_one_to_one(names: list[str]) -> None:
    first, second = AllowedNames(), AllowedNames()
    allowed = [first.get("run", "metric", name) for name in names]
    assert len(set(allowed)) == len(names)
    assert allowed == [second.get("run", "metric", name) for name in names]
    assert all(re.fullmatch(r"[/\w.\- :]{1,250}", name) for name in allowed)


def test_runs_and_kinds_have_their_own_names() -> None:
    names = AllowedNames()
    assert {names.get("a", "metric", "x@"), names.get("b", "metric", "x#")} == {"x_"}
    assert names.get("a", "param", "x#") == "x_"
    assert re.fullmatch(r"x_-[0-9a-f]{8}", names.get("a", "metric", "x#"))


@pytest.mark.parametrize("step", [2**63, -(2**63) - 1])
def test_a_number_that_does_not_fit_is_a_permanent_error(step: int) -> None:
    with pytest.raises(NumberOutOfRangeError, match=str(step)) as refused:
        check_range([MetricPoint("loss", 0.0, step, 0)])
    assert is_permanent_error(refused.value)
    assert not is_permanent_error(ValueError("of MLflow's own code"))
    check_range([MetricPoint("loss", 0.0, 2**63 - 1, -(2**63))])
