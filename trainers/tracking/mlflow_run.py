"""A run as MLflow shows it: its name, its parameters, its tags and its description.

The name is the last part of the run's key: the name of the run's folder, or the number of a trial.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.base.config import flatten
from trainers.outcome import Outcome
from trainers.run_folder import ENVIRONMENT, SPEC, TRACKING, git_tags
from trainers.spec import RunSpec
from trainers.tracking.tracker import TrackedRun, start_tracker, wait_until_sent

DESCRIPTION_TAG = "mlflow.note.content"
"""MLflow's tag for the description of a run."""


def start_tracking(
    folder: Path, spec: RunSpec, spec_data: Mapping[str, Any], kind: str = "train"
) -> Any:
    """Start the tracker of the run or sweep in `folder`; log its spec and its environment."""
    key, tracking = folder.name, spec.tracking
    tracker = start_tracker(folder / TRACKING, str(tracking.uri), tracking.experiment, key)
    tracker.start.remote(tracked_run(key, spec_data, kind=kind))
    for name in (SPEC, ENVIRONMENT):
        tracker.log_artifact.remote(key, str(folder / name))
    return tracker


def tracked_run(
    key: str, spec_data: Mapping[str, Any], parent: str | None = None, kind: str = "train"
) -> TrackedRun:
    """The run as MLflow shows it: the spec's fields are parameters, named by dotted path."""
    params = {k: v for k, v in flatten(spec_data).items() if not k.startswith("sweep.")}
    tags = {"heliostat.kind": kind, **git_tags(Path.cwd())}
    return TrackedRun(key, params, tags, parent)


def end_tracking(tracker: Any, key: str) -> dict[str, Any]:
    """Wait until MLflow has everything; return the run's entry there (`Tracker.read`).

    If MLflow cannot be reached, return {"unsent": LINE} instead. `notice` is added where it is
    without a part: one line on files that wait, and on what it refused.
    """
    import ray

    line = wait_until_sent(tracker, timeout_s=60)
    if line and ray.get(tracker.unsent.remote()).metrics_bytes:
        return {"unsent": line}
    waiting = f"{line}; heliostat track flush {key} sends them" if line else None
    notices = [each for each in (waiting, ray.get(tracker.refused.remote())) if each]
    notice = {"notice": "; ".join(notices)} if notices else {}
    try:
        return {**ray.get(tracker.read.remote(key)), **notice}
    except Exception as error:  # a server that takes what is sent, and does not show it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        return {"unsent": f"MLflow does not show the run ({reason})", **notice}


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(cell: object) -> str:
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", " ")


def run_description(outcome: Outcome, summary: Mapping[str, Any]) -> str:
    """The description of a run that ended; `summary` is that of `execution.run_to_end`."""
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
