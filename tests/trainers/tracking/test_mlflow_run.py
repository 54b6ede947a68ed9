"""The description on a run's page in MLflow."""

from trainers.outcome import Outcome
from trainers.tracking.mlflow_run import markdown_table, run_description


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
