"""Forecasts of a run's wall time, with an interval, and their calibration by earlier runs.

A forecast adds the steps, predicted by the step-time model, and the times that a probe measured
(start, evaluation, save, end). Its interval should hold the truth 9 times out of 10. Until a
project has runs of its own, the interval rests on shipped error bars. Each run that ends is
compared with its forecast. What these differences have in common moves later forecasts, and their
spread widens or narrows the intervals (split conformal prediction: Vovk et al., "Algorithmic
Learning in a Random World", 2005).
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainers.planning.pools import ProbedPool, ProbeResult
from trainers.planning.step_time import Unknown
from trainers.spec import RunSpec

HISTORY_FILE = "forecasts.jsonl"
"""File in the storage folder: forecasts and actual times, a line each."""
IRRELEVANT_SECTIONS = ("storage", "sweep", "budget", "cost")
"""Sections of a spec that do not change how long its run takes."""
COVERAGE = 0.9
"""Share of runs whose actual time should lie within the interval."""
OVERHEAD_ERROR = 0.4
"""Relative error of the time outside steps: starting workers, evaluating, saving, ending."""
SHIPPED_RUNS = 10
"""Number of runs that the shipped error bars count as; a project's own replace them one by one."""
MAX_RUNS = 100
"""Number of the newest runs that count."""
SHRINKAGE_RUNS = 2
"""Number of assumed runs without any error, which shrink the shift of a project's own runs."""
MIN_WIDENING = 0.25
"""The least width, relative to the shipped interval: a lucky series is no certainty."""


class Interval(NamedTuple):
    """An uncertain number: 9 of 10 such intervals hold the truth."""

    low: float
    middle: float
    high: float

    @classmethod
    def around(cls, middle: float, error: float) -> "Interval":
        """From `middle` / (1 + `error`) to `middle` * (1 + `error`)."""
        return cls(middle / (1 + error), middle, middle * (1 + error))

    def times(self, other: "Interval | float") -> "Interval":
        """The product; errors of two intervals are taken as independent."""
        if not isinstance(other, Interval):
            return Interval(*(bound * other for bound in self))
        middle = self.middle * other.middle
        if not middle:
            return Interval(self.low * other.low, middle, self.high * other.high)
        down = math.hypot(*(math.log(x.middle / x.low) for x in (self, other)))
        up = math.hypot(*(math.log(x.high / x.middle) for x in (self, other)))
        return Interval(middle * math.exp(-down), middle, middle * math.exp(up))

    def calibrated(self, by: "Calibration") -> "Interval":
        """The interval moved by `by.shift`, with its logarithmic width times `by.widening`."""
        down, up = self.middle / self.low, self.high / self.middle
        middle = self.middle * (up if by.shift > 0 else down) ** by.shift
        return Interval(middle / down**by.widening, middle, middle * up**by.widening)


class Calibration(NamedTuple):
    """The correction of the shipped intervals by a project's own runs."""

    shift: float = 0.0
    """Shift of an interval, in its half widths; negative if runs take less than forecast."""
    widening: float = 1.0
    """Factor of the width; below 1 it narrows."""


AS_SHIPPED = Calibration()


def sum_independent(parts: Iterable[Interval]) -> Interval:
    """Sum of intervals with independent errors."""
    parts = list(parts)
    middle = sum(part.middle for part in parts)
    low = math.hypot(*(part.middle - part.low for part in parts))
    high = math.hypot(*(part.high - part.middle for part in parts))
    return Interval(max(min(part.low for part in parts), middle - low), middle, middle + high)


class RunLength(NamedTuple):
    """The work of a run, on any number of workers."""

    steps: int
    evaluations: int
    tests: int
    saves: int
    """The least number: those that `auto` adds take less than 1 % of the time."""


def run_length(spec: RunSpec, samples: int, has_test: bool) -> RunLength:
    """Count the work of a run with `samples` in its training split."""
    total = spec.train.total_steps(samples)
    evaluated = spec.train.evaluation_steps(samples)
    every = spec.checkpoint.every_steps
    saved = {total} | (evaluated if spec.checkpoint.keep_best else set())
    if every != "auto":
        saved |= set(range(every, total + 1, every))
    return RunLength(total, len(evaluated), int(has_test), len(saved))


@dataclass(frozen=True)
class Forecast:
    """The time of a run from the request for workers until they have ended."""

    wall_s: Interval
    step_s: Interval
    basis: str
    shipped_s: Interval
    """`wall_s` by the shipped error bars, before the calibration by a project's own runs."""
    at: float = 0.0
    """When it was made, in Unix time."""

    def __str__(self) -> str:
        return f"{format_duration(self.wall_s.middle)} ({format_range(self.wall_s)}), {self.basis}"


def forecast(
    probed: ProbedPool, workers: int, run: RunLength, by: Calibration = AS_SHIPPED
) -> Forecast | Unknown:
    """Forecast the run on `workers` of the pool."""
    found = probed.predict(workers)
    if isinstance(found, Unknown):
        return found
    step_s = Interval.around(found.step_s, found.error)
    return from_probe(step_s, probed.nearest(workers), run, str(found.basis), by)


def from_probe(
    step_s: Interval, probe: ProbeResult, run: RunLength, basis: str, by: Calibration
) -> Forecast:
    """Forecast a run with steps of `step_s`; all other times are those of the probe."""
    overhead_s = (
        probe.start_s
        + run.evaluations * probe.evaluation_s
        + run.tests * probe.test_s
        + run.saves * probe.save_s
        + probe.end_s
    )
    parts = [step_s.times(run.steps - 1), Interval.around(overhead_s, OVERHEAD_ERROR)]
    shipped_s = sum_independent(parts)
    wall_s, step_s = shipped_s.calibrated(by), step_s.calibrated(by)
    return Forecast(wall_s, step_s, basis, shipped_s, time.time())


def calibrate(scores: Sequence[float]) -> Calibration:
    """The shift and widening of the shipped intervals that the project's runs suggest.

    `scores` are the results of `score` for these runs, the newest last. If there are few, the
    shipped error bars count as further runs with normally distributed errors.
    """
    newest = scores[-MAX_RUNS:]
    median = statistics.median(newest) if newest else 0.0
    shift = median * len(newest) / (len(newest) + SHRINKAGE_RUNS)
    own = [abs(score - shift) for score in newest]
    missing = max(0, SHIPPED_RUNS - len(own))
    normal = statistics.NormalDist()
    # Half-normal quantiles, scaled so that the one at 90 % is 1.
    bars = [normal.inv_cdf(0.5 + 0.5 * (k + 1) / (SHIPPED_RUNS + 1)) for k in range(SHIPPED_RUNS)]
    step = SHIPPED_RUNS / missing if missing else 1.0
    shipped = [bars[SHIPPED_RUNS - 1 - int(k * step)] / bars[-1] for k in range(missing)]
    ranked = sorted([*own, *shipped])
    rank = min(len(ranked), math.ceil((len(ranked) + 1) * COVERAGE))
    return Calibration(shift, max(MIN_WIDENING, ranked[rank - 1]))


def score(forecast: Forecast, wall_s: float) -> float:
    """The error of a forecast, in logarithmic half widths of the shipped interval on that side.

    Negative if the run took less than forecast.
    """
    low, middle, high = forecast.shipped_s
    error = math.log(wall_s / middle)
    return error / math.log(high / middle) if error > 0 else error / math.log(middle / low)


class ForecastHistory:
    """Forecasts and actual times of runs, in their storage folder."""

    def __init__(self, storage: Path) -> None:
        self._path = storage / HISTORY_FILE

    def record_forecast(self, key: str, forecast: Forecast) -> None:
        """Record the forecast for runs with this key (`forecast_key`)."""
        self._append({"kind": "forecast", "key": key, **asdict(forecast)})

    def latest_for(self, keys: Iterable[str]) -> Forecast | None:
        """The newest forecast for any of the keys."""
        wanted, latest = set(keys), None
        for line in self._lines("forecast"):
            if line["key"] in wanted:
                latest = Forecast(
                    Interval(*line["wall_s"]),
                    Interval(*line["step_s"]),
                    line["basis"],
                    Interval(*line["shipped_s"]),
                    line["at"],
                )
        return latest

    def record_actual(self, run: str, forecast: Forecast, wall_s: float) -> None:
        """Record the actual time of a run that had a forecast."""
        actual = {"run": run, "wall_s": wall_s, "score": score(forecast, wall_s)}
        expected = {"expected_s": forecast.wall_s, "basis": forecast.basis, "at": time.time()}
        self._append({"kind": "actual", **actual, **expected})

    def scores(self) -> list[float]:
        """The scores of all recorded runs, the oldest first."""
        return [float(line["score"]) for line in self._lines("actual")]

    def _append(self, line: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _lines(self, kind: str) -> Iterable[dict[str, Any]]:
        if not self._path.exists():
            return
        for text in self._path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut off by a crash
                continue
            if line.get("kind") == kind:
                yield line


def forecast_key(spec_data: Mapping[str, Any], accelerator: str) -> str:
    """A key that is equal for runs with the same work on the same number of such workers.

    `spec_data` is the run's spec as plain data, with its number of workers.
    """
    kept = {name: part for name, part in spec_data.items() if name not in IRRELEVANT_SECTIONS}
    kept["tracking"] = {"every_steps": spec_data["tracking"]["every_steps"]}
    kept["scale"] = {**spec_data["scale"], "accelerator": accelerator, "max_restarts": None}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def forecast_keys(spec_data: Mapping[str, Any], with_gpus: bool) -> list[str]:
    """The keys under which the history may have a forecast for a run."""
    accelerator = str(spec_data["scale"]["accelerator"])
    if accelerator == "auto":
        accelerator = "gpu" if with_gpus else "cpu"
    return [forecast_key(spec_data, accelerator)]


def describe_outcome(forecast: Forecast, wall_s: float) -> str:
    """One line that compares a forecast with the actual time."""
    low, middle, high = forecast.wall_s
    difference = wall_s / middle - 1
    where = "within" if low <= wall_s <= high else "outside"
    return (
        f"{format_duration(middle)} forecast ({forecast.basis}), {format_duration(wall_s)} taken: "
        f"{difference:+.0%}, {where} {format_range(forecast.wall_s)}"
    )


def format_duration(seconds: float) -> str:
    """A time with its unit, s, min or h, in three digits."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 6000:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h"


def format_range(span: Interval) -> str:
    low, high = format_duration(span.low), format_duration(span.high)
    number, unit = low.split()
    return f"{number} to {high}" if high.endswith(f" {unit}") else f"{low} to {high}"
