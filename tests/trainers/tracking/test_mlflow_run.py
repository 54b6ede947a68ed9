"""The description on a run's page in MLflow."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from trainers.outcome import Outcome
from trainers.tracking.mlflow_run import end_tracking, markdown_table, run_description
from trainers.tracking.tracker import Unsent


def test_a_description_has_metrics_forecast_and_costs() -> None:
    became = {
        "forecast": "40 s forecast (measured), 44 s taken: +10%, within 30 to 50 s",
        "account": {"cost": "$0.0082 (a|b)"},
    }
    note = run_description(
        Outcome(236, 236, {"val/loss": 0.12345, "test/loss": 0.5}, 2029.4), became
    )
    assert note.splitlines() == [
        "**Complete**: 236 of 236 steps, 2,029 samples/s.",
        "",
        "|  |  |",
        "| --- | --- |",
        "| test/loss | 0.5 |",
        "| val/loss | 0.1235 |",
        "| forecast | 40 s forecast (measured), 44 s taken: +10%, within 30 to 50 s |",
        "| cost | $0.0082 (a\\|b) |",
    ]


def test_a_stopped_run_has_its_reason() -> None:
    stopped = Outcome(1, 10, {}, 0.0)
    reason = "budget.usd reached: $5 of $5"
    assert run_description(stopped, {"reason": reason}) == f"**Stopped** ({reason}): 1 of 10 steps."
    assert run_description(stopped, {}) == "**Stopped**: 1 of 10 steps."


def test_a_cell_is_one_line() -> None:
    assert markdown_table(("a",), [("b\nc",)]) == "| a |\n| --- |\n| b c |"


def actor(unsent: Unsent, refused: str | None, found: Any) -> Any:
    """In the place of a tracker: what it returns at the end of a run."""
    answers = {"unsent": unsent, "refused": refused, "read": found}
    return SimpleNamespace(
        **{
            name: SimpleNamespace(remote=lambda *_, answer=answer: answer)
            for name, answer in answers.items()
        }
    )


def answer_of(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


ENTRY = {"run_id": "7", "model_uri": None}
DONE = Unsent(0, None, 0, None, 0, False)
WAITS = Unsent(0, None, 2, "PermissionError: /mnt/x", 9, False)
WHY = "2 files not yet in MLflow (PermissionError: /mnt/x); heliostat track flush r sends them"


@pytest.mark.parametrize(
    ("unsent", "refused", "found", "expected"),
    [
        (DONE, None, ENTRY, ENTRY),
        (WAITS, None, ENTRY, {**ENTRY, "notice": WHY}),
        (DONE, "MLflow refused", ENTRY, {**ENTRY, "notice": "MLflow refused"}),
        (WAITS, "MLflow refused", ENTRY, {**ENTRY, "notice": f"{WHY}; MLflow refused"}),
        (
            DONE,
            None,
            ValueError("trace\nRestException: 403"),
            {"unsent": "MLflow does not show the run (RestException: 403)"},
        ),
    ],
)
def test_the_end_of_a_run_tells_what_mlflow_does_not_have(
    unsent: Unsent,
    refused: str | None,
    found: Any,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once where files are refused again and again, and never by an error."""
    monkeypatch.setattr(ray, "get", answer_of)
    assert end_tracking(actor(unsent, refused, found), "r") == expected
