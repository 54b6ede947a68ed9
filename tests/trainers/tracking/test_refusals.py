"""An operation that is divided comes to the same; what is left out is told in one line."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trainers.tracking.operation_log import MetricPoint
from trainers.tracking.refusals import Refusals, parts_of

POINTS = st.builds(
    MetricPoint, st.sampled_from("abc"), st.floats(-1, 1), st.integers(0, 99), st.integers(0, 9)
)
NAMES = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.text("xyz"), max_size=9)


def smallest(operation: dict[str, Any]) -> list[dict[str, Any]]:
    parts = parts_of(operation)
    return [small for part in parts for small in smallest(part)] if parts else [operation]


@given(st.lists(POINTS, min_size=1, max_size=12))
def test_points_are_divided_one_by_one(points: list[MetricPoint]) -> None:
    parts = smallest({"do": "log", "run": "r", "rows": points})
    assert all(len(part["rows"]) == 1 and part["run"] == "r" for part in parts)
    for name in "abc":
        own = [part["rows"][0] for part in parts if part["rows"][0].name == name]
        assert own == [point for point in points if point.name == name], "in their order"


@given(NAMES, NAMES)
def test_parameters_and_tags_are_divided_one_by_one(
    params: dict[str, str], tags: dict[str, str]
) -> None:
    start = {"do": "start", "key": "r", "id": "1", "parent": None, "params": params, "tags": tags}
    parts = smallest(start)
    assert len(parts) == max(1, len(params) + len(tags))
    for section, whole in (("params", params), ("tags", tags)):
        assert {k: v for part in parts for k, v in part[section].items()} == whole
    assert all({**part, "params": params, "tags": tags} == start for part in parts)


def test_a_status_is_more_than_its_tags() -> None:
    ended = {"do": "finish", "run": "r", "status": "FAILED", "at": 9, "tags": {"a": "1", "b": "2"}}
    assert smallest(ended) == [
        {"do": "tag", "run": "r", "tags": {"a": "1"}},
        {"do": "tag", "run": "r", "tags": {"b": "2"}},
        {**ended, "tags": {}},
    ]


def test_the_line_names_what_is_missing_and_why() -> None:
    refusals = Refusals()
    assert refusals.line() is None
    too_large = ValueError("413: too large\nmore")
    model = {"do": "model", "run": "r", "folder": "/runs/r/model"}
    assert refusals.add(model, too_large) == {
        "do": "tag",
        "run": "r",
        "tags": {"heliostat.refused.model": "model: 413: too large"},
    }
    for step in range(3):
        rows = [MetricPoint("loss", 0.5, step, 7)]
        refusals.add({"do": "log", "run": "r", "rows": rows}, ValueError("no"))
    for name in ("a.txt", "b.txt", "c.txt"):
        refusals.add({"do": "artifact", "run": "r", "path": f"/x/{name}"}, OSError("gone"))
    assert refusals.line() == (
        "MLflow refused, and is without model: 413: too large; loss (3 times): no; a.txt: gone; "
        "and 2 more"
    )
