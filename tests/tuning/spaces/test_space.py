"""The spec of a sweep: what it accepts, and what it means."""

from typing import Any

import pytest

from cluster.base.config import validate
from cluster.base.errors import SpecError
from trainers.workloads.vision.workload import Vision
from tuning.spaces.space import SweepSpec, file_schema, trial_spec_data


@pytest.mark.parametrize(
    ("distribution", "problem"),
    [
        ({}, "must have exactly one of uniform, loguniform, integer, log_integer, choice"),
        ({"uniform": [0, 1], "choice": [1]}, "must have exactly one of"),
        ({"uniform": [1, 0]}, "uniform must be [low, high] with low <= high"),
        ({"loguniform": [0, 1]}, "loguniform needs low > 0"),
        ({"choice": []}, "list should have at least 1 item"),
        ({"unifrom": [0, 1]}, "unknown key; did you mean 'uniform'?"),
    ],
)
def test_a_distribution_has_one_kind_and_its_bounds_in_order(
    distribution: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpecError) as caught:
        validate(SweepSpec, {"parameters": {"optimizer.lr": distribution}}, "sweep.")
    assert str(caught.value).startswith("sweep.parameters.optimizer.lr")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_grid_needs_values_to_list() -> None:
    with pytest.raises(SpecError, match=r"grid needs a choice for every parameter, optimizer.lr"):
        validate(
            SweepSpec, {"parameters": {"optimizer.lr": {"uniform": [0, 1]}}, "search": "grid"}, ""
        )


def test_grid_is_every_combination_in_the_order_of_the_file() -> None:
    sweep = SweepSpec.model_validate(
        {"parameters": {"a": {"choice": [1, 2]}, "b": {"choice": ["x", "y"]}}, "search": "grid"}
    )
    assert sweep.total_trials == 4
    assert sweep.combinations() == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]


def test_a_trials_spec_is_the_sweeps_with_its_parameters() -> None:
    data = {"workload": "vision", "optimizer": {"lr": 1, "name": "sgd"}, "sweep": {"trials": 3}}
    assert trial_spec_data(data, {"optimizer.lr": 0.1, "model.width": 8}) == {
        "workload": "vision",
        "optimizer": {"lr": 0.1, "name": "sgd"},
        "model": {"width": 8},
    }
    assert data["optimizer"] == {"lr": 1, "name": "sgd"}


def test_the_schema_has_a_description_of_every_field() -> None:
    schema = file_schema(Vision)
    assert set(schema["properties"]) >= {"workload", "data", "model", "optimizer", "sweep"}
    assert "width" in schema["properties"]["model"]["properties"]
    assert "parameters" in schema["properties"]["sweep"]["properties"]
    assert not schema["additionalProperties"]
    sections = [*schema["$defs"].values(), schema]
    sections += [schema["properties"][name] for name in ("data", "model", "sweep")]
    for section in sections:
        for name, field in section.get("properties", {}).items():
            inside = "$ref" in field or "properties" in field
            assert inside or field.get("description"), f"{section.get('title')}.{name}"


def test_the_first_objective_is_the_metric_of_the_search() -> None:
    several = ["val/accuracy max", "cost_usd min"]
    parameters = {"optimizer.lr": {"uniform": [0, 1]}}
    spec = validate(SweepSpec, {"parameters": parameters, "objective": several})
    assert (spec.metric, spec.mode) == ("val/accuracy", "max")
    assert validate(SweepSpec, spec.model_dump(mode="json")) == spec
    unset = {"parameters": parameters, "objective": several, "metric": None, "mode": None}
    assert validate(SweepSpec, unset) == spec, "the command line cannot take a field out"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"objective": ["cost_usd min"]}, "metric must be one of validation"),
        ({"objective": ["val/loss"]}, "'val/loss' must be `val/... max` or min"),
        ({"objective": ["val/loss min", "euros min"]}, "'euros min' must be `val/... max` or min"),
        ({"objective": ["val/loss min"], "metric": "val/accuracy"}, "metric and objective exclude"),
    ],
)
def test_mistakes_in_objectives(more: dict[str, Any], problem: str) -> None:
    data = {"parameters": {"optimizer.lr": {"uniform": [0, 1]}}, **more}
    with pytest.raises(SpecError) as caught:
        validate(SweepSpec, data, "sweep.")
    assert problem in str(caught.value)
