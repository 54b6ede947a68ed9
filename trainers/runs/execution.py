"""A run from its first step to its end: trained, metered, tracked, exported."""

import threading
import time
from pathlib import Path
from typing import Any

from cluster.base.errors import HeliostatError
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.checkpoints.export import export_latest
from trainers.outcome import Outcome
from trainers.planning.forecast import Forecast, ForecastHistory, describe_outcome, forecast_keys
from trainers.run_folder import CHECKPOINTS, MODEL
from trainers.runs.driver_meter import DriverMeter
from trainers.runs.failure_policy import log_traceback
from trainers.runs.ray_train import (
    ProgressCallback,
    WorkerConfig,
    resources_per_worker,
    run_workers,
)
from trainers.runs.run import Run
from trainers.spec import spec_at
from trainers.tracking.mlflow_run import (
    DESCRIPTION_TAG,
    end_tracking,
    run_description,
    start_tracking,
)
from trainers.tracking.operation_log import now_ms
from trainers.tracking.tracker import wait_until_sent


def run_to_end(
    run: Run, on_progress: ProgressCallback, stop: threading.Event
) -> tuple[Outcome, dict[str, Any]]:
    """Train `run` in the connected Ray until its last step, or until `stop` is set.

    Returns the outcome and a summary: the run's entry in MLflow (`Tracker.read`), or `unsent`
    with one line if MLflow cannot be reached; `account`, lines on the cost so far; `reason`, the
    budget limit that stopped the run; `forecast`, one line on how good it was.
    """
    tracker = start_tracking(run.folder, run.spec, run.spec_data)
    forecast = _latest_forecast(run)
    if forecast is not None:
        tracker.log_note.remote(run.key, "forecast", str(forecast))
    meter: DriverMeter | None = None
    wall_s = 0.0
    try:
        if (run.folder / MODEL).exists():  # exported after the last step: nothing is left to do
            outcome = Outcome(run.total_steps, run.total_steps, {}, 0.0)
        else:
            meter = DriverMeter(run.folder, run.spec, tracker)
            config = WorkerConfig(run.spec_data, run.dataset, run.folder, run.key)
            began = time.monotonic()
            outcome = run_workers(config, tracker, meter.wrap_progress(on_progress, stop), stop)
            wall_s = time.monotonic() - began
    except BaseException as error:
        _record_failure(tracker, run, error, meter)
        raise
    summary: dict[str, Any] = {}
    tags: dict[str, str] = {}
    if meter is not None:
        account, tags = meter.finish()
        summary = {"account": meter.summary_lines(account), "reason": meter.limit_reached}
    if outcome.complete:
        for line in _export_if_missing(run):
            tracker.log_note.remote(run.key, "export", line)
        if forecast is not None and wall_s:
            summary["forecast"] = _record_forecast_outcome(run, tracker, forecast, outcome, wall_s)
        tracker.log_model.remote(run.key, str(run.folder / MODEL))
    else:
        tags["heliostat.reason"] = summary.get("reason") or "stopped"
    tags[DESCRIPTION_TAG] = run_description(outcome, summary)
    tracker.finish.remote(run.key, "FINISHED" if outcome.complete else "KILLED", tags)
    return outcome, {**end_tracking(tracker, run.key), **summary}


def _record_failure(
    tracker: Any, run: Run, error: BaseException, meter: DriverMeter | None
) -> None:
    """End the MLflow run as FAILED, or as KILLED after an interruption, with the reason.

    The traceback of an error in the user's code goes to the run's log.
    """
    if isinstance(error, Exception):
        log_traceback(run.folder, error)
    failed = isinstance(error, HeliostatError)
    title = "Failed" if failed else "Interrupted"
    tags = {
        "heliostat.reason": str(error) if failed else "interrupted",
        DESCRIPTION_TAG: f"**{title}**: {error}".removesuffix(": "),
    }
    tags |= meter.finish()[1] if meter else {}
    tracker.finish.remote(run.key, "FAILED" if failed else "KILLED", tags)
    wait_until_sent(tracker, timeout_s=10)


def _latest_forecast(run: Run) -> Forecast | None:
    """The forecast that `heliostat plan` made for this run; None if the run was begun before.

    Needs the connected Ray, which decides what `scale.accelerator: auto` means.
    """
    if run.saved_steps:
        return None
    keys = forecast_keys(run.spec_data, with_gpus="GPU" in resources_per_worker(run.spec.scale))
    return ForecastHistory(Path(run.spec.storage)).latest_for(keys)


def _record_forecast_outcome(
    run: Run, tracker: Any, forecast: Forecast, outcome: Outcome, wall_s: float
) -> str:
    """Record how long the run took, for later forecasts and in MLflow; return that as a line."""
    ForecastHistory(Path(run.spec.storage)).record_actual(run.key, forecast, wall_s)
    text = describe_outcome(forecast, wall_s)
    metrics = {
        "forecast/wall_s": forecast.wall_s.middle,
        "forecast/low_s": forecast.wall_s.low,
        "forecast/high_s": forecast.wall_s.high,
        "forecast/actual_s": wall_s,
    }
    points = [(name, value, outcome.step, now_ms()) for name, value in metrics.items()]
    tracker.log.remote(run.key, points, outcome.step)
    tracker.log_note.remote(run.key, "forecast", text)
    return text


def _export_if_missing(run: Run) -> list[str]:
    """Export the model here if rank 0 ran on a machine that cannot see the run's folder.

    Returns what `export_latest` does.
    """
    if (run.folder / MODEL).exists():
        return []
    lines = export_latest(run.folder, *spec_at(run.spec, run.workload, run.total_steps))
    Checkpoints(run.folder / CHECKPOINTS).forget_copies()
    return lines
