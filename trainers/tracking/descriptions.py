"""The description on a run's page in MLflow, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainers.outcome import Outcome

DESCRIPTION_TAG = "mlflow.note.content"
"""MLflow's tag for the description of a run."""


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(cell: object) -> str:
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", " ")


def run_description(outcome: Outcome, summary: Mapping[str, Any]) -> str:
    """The description of a run that ended; `summary` is as `trainers.runs.run` returns it."""
    steps = f"{outcome.step:,} of {outcome.total_steps:,} steps"
    reason = summary.get("reason")
    head = "**Complete**" if outcome.complete else f"**Stopped**{f' ({reason})' if reason else ''}"
    speed = f", {outcome.samples_per_s:,.0f} samples/s" if outcome.samples_per_s else ""
    return with_facts(
        f"{head}: {steps}{speed}.",
        {
            **{name: float(value) for name, value in sorted(outcome.metrics.items())},
            **({"forecast": summary["forecast"]} if "forecast" in summary else {}),
            **summary.get("account", {}),
        },
    )


def with_facts(head: str, facts: Mapping[str, object]) -> str:
    """A headline and a table of facts."""
    return f"{head}\n\n{markdown_table(('', ''), list(facts.items()))}" if facts else head
