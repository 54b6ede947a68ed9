"""How long a run will take, with an interval; what it did take; and what is learnt from that.

A forecast is what the probe saw (start, evaluation, save, end) and the steps, predicted by the
scaling model. Its interval is to hold the truth 9 times out of 10. Until a project has runs of
its own, that rests on shipped error bars; each run that ends is compared with its forecast. What
the differences have in common moves what comes next, and what is left of them widens or narrows
it (split conformal prediction: Vovk et al., "Algorithmic Learning in a Random World", 2005).
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
"""In the folder of the runs: forecasts and what became of them, a line each."""
IRRELEVANT_SECTIONS = ("storage", "sweep", "budget", "cost")
"""Sections of a spec that say nothing about how long its run takes."""
COVERAGE = 0.9
"""How often the truth is to lie within the interval."""
OVERHEAD_ERROR = 0.4
"""Relative error of what is not steps: starting workers, evaluating, saving, ending."""
SHIPPED_RUNS = 10
"""How many runs the shipped error bars count for; a project's own take their place one by one."""
MAX_RUNS = 100
"""How many of the newest runs count."""
SHRINKAGE_RUNS = 2
"""How many runs that were just as forecast stand against what a project's own have in common."""
MIN_WIDENING = 0.25
"""Of the shipped interval: a lucky series does not make anything certain."""


class Interval(NamedTuple):
    """A number that is not known exactly: 9 of 10 such intervals hold the truth."""

    low: float
    middle: float
    high: float

    @classmethod
    def around(cls, middle: float, error: float) -> "Interval":
        """From `middle` divided to `middle` multiplied by 1 + `error`."""
        return cls(middle / (1 + error), middle, middle * (1 + error))

    def times(self, other: "Interval | float") -> "Interval":
        """The product; of two intervals that are wrong independently of each other."""
        if not isinstance(other, Interval):
            return Interval(*(bound * other for bound in self))
        middle = self.middle * other.middle
        if not middle:
            return Interval(self.low * other.low, middle, self.high * other.high)
        down = math.hypot(*(math.log(x.middle / x.low) for x in (self, other)))
        up = math.hypot(*(math.log(x.high / x.middle) for x in (self, other)))
        return Interval(middle * math.exp(-down), middle, middle * math.exp(up))

    def calibrated(self, by: "Calibration") -> "Interval":
        """Moved, and its logarithmic width times `by.widening`."""
        down, up = self.middle / self.low, self.high / self.middle
        middle = self.middle * (up if by.shift > 0 else down) ** by.shift
        return Interval(middle / down**by.widening, middle, middle * up**by.widening)


class Calibration(NamedTuple):
    """What a project's own runs do to the shipped error bars."""

    shift: float = 0.0
    """By how many of its half widths an interval is moved; negative when runs take less."""
    widening: float = 1.0


AS_SHIPPED = Calibration()


def sum_independent(parts: Iterable[Interval]) -> Interval:
    """The sum of what is wrong independently of each other."""
    parts = list(parts)
    middle = sum(part.middle for part in parts)
    low = math.hypot(*(part.middle - part.low for part in parts))
    high = math.hypot(*(part.high - part.middle for part in parts))
    return Interval(max(min(part.low for part in parts), middle - low), middle, middle + high)


class RunLength(NamedTuple):
    """How much a run does, on any number of workers."""

    steps: int
    evaluations: int
    tests: int
    saves: int
    """At the least: those that `auto` adds take less than 1 % of the time."""


def run_length(spec: RunSpec, samples: int, has_test: bool) -> RunLength:
    """What the run over `samples` of training does."""
    total = spec.train.total_steps(samples)
    evaluated = spec.train.evaluation_steps(samples)
    every = spec.checkpoint.every_steps
    saved = {total} | (evaluated if spec.checkpoint.keep_best else set())
    if every != "auto":
        saved |= set(range(every, total + 1, every))
    return RunLength(total, len(evaluated), int(has_test), len(saved))


@dataclass(frozen=True)
class Forecast:
    """How long a run takes, from asking for its workers until they are gone."""

    wall_s: Interval
    step_s: Interval
    basis: str
    shipped_s: Interval
    """`wall_s` by the shipped error bars, before a project's own runs have moved and widened it."""
    at: float = 0.0
    """When it was made, in Unix time."""

    def __str__(self) -> str:
        return f"{format_duration(self.wall_s.middle)} ({format_range(self.wall_s)}), {self.basis}"


def forecast(
    probed: ProbedPool, workers: int, run: RunLength, by: Calibration = AS_SHIPPED
) -> Forecast | Unknown:
    """The run on so many workers of the pool."""
    found = probed.predict(workers)
    if isinstance(found, Unknown):
        return found
    step_s = Interval.around(found.step_s, found.error)
    return from_probe(step_s, probed.nearest(workers), run, str(found.basis), by)


def from_probe(
    step_s: Interval, seen: ProbeResult, run: RunLength, basis: str, by: Calibration
) -> Forecast:
    """A run of such steps; all else takes what it took the probe."""
    around_s = (
        seen.start_s
        + run.evaluations * seen.evaluation_s
        + run.tests * seen.test_s
        + run.saves * seen.save_s
        + seen.end_s
    )
    parts = [step_s.times(run.steps - 1), Interval.around(around_s, OVERHEAD_ERROR)]
    shipped_s = sum_independent(parts)
    wall_s, step_s = shipped_s.calibrated(by), step_s.calibrated(by)
    return Forecast(wall_s, step_s, basis, shipped_s, time.time())


def calibrate(scores: Sequence[float]) -> Calibration:
    """How the shipped intervals are to be moved, and widened (or, below 1, narrowed).

    `scores` are those of the project's runs, the newest last: how far off each was, in units of
    the half of its shipped interval on that side. With few, the shipped error bars count as
    further runs, spread as those of normally distributed errors.
    """
    newest = scores[-MAX_RUNS:]
    common = statistics.median(newest) if newest else 0.0
    shift = common * len(newest) / (len(newest) + SHRINKAGE_RUNS)
    own = [abs(score - shift) for score in newest]
    missing = max(0, SHIPPED_RUNS - len(own))
    normal = statistics.NormalDist()
    # Half-normal quantiles, scaled so that the one at 90 % is 1.
    bars = [normal.inv_cdf(0.5 + 0.5 * (k + 1) / (SHIPPED_RUNS + 1)) for k in range(SHIPPED_RUNS)]
    step = SHIPPED_RUNS / missing if missing else 1.0
    shipped = [bars[SHIPPED_RUNS - 1 - int(k * step)] / bars[-1] for k in range(missing)]
    ranked = sorted([*own, *shipped])
    place = min(len(ranked), math.ceil((len(ranked) + 1) * COVERAGE))
    return Calibration(shift, max(MIN_WIDENING, ranked[place - 1]))


def score(expected: Forecast, wall_s: float) -> float:
    """How far off a forecast was, in units of half the shipped interval; negative when too long."""
    low, middle, high = expected.shipped_s
    off = math.log(wall_s / middle)
    return off / math.log(high / middle) if off > 0 else off / math.log(middle / low)


class ForecastHistory:
    """Forecasts and what became of them, in the folder of the runs."""

    def __init__(self, storage: Path) -> None:
        self._path = storage / HISTORY_FILE

    def record_forecast(self, key: str, expected: Forecast) -> None:
        """Keep what was forecast for the runs of this key."""
        self._append({"kind": "forecast", "key": key, **asdict(expected)})

    def latest_for(self, keys: Iterable[str]) -> Forecast | None:
        """The newest forecast for any of the keys."""
        wanted, found = set(keys), None
        for line in self._lines("forecast"):
            if line["key"] in wanted:
                found = Forecast(
                    Interval(*line["wall_s"]),
                    Interval(*line["step_s"]),
                    line["basis"],
                    Interval(*line["shipped_s"]),
                    line["at"],
                )
        return found

    def record_actual(self, run: str, expected: Forecast, wall_s: float) -> None:
        """Keep how long a run took that was forecast."""
        found = {"run": run, "wall_s": wall_s, "score": score(expected, wall_s)}
        what = {"expected_s": expected.wall_s, "basis": expected.basis, "at": time.time()}
        self._append({"kind": "actual", **found, **what})

    def scores(self) -> list[float]:
        """How far off the forecasts were, the oldest first."""
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
    """One name for all runs that do the same on the same number of such workers.

    `data` is the run's spec as plain data, with its number of workers.
    """
    kept = {name: part for name, part in spec_data.items() if name not in IRRELEVANT_SECTIONS}
    kept["tracking"] = {"every_steps": spec_data["tracking"]["every_steps"]}
    kept["scale"] = {**spec_data["scale"], "accelerator": accelerator, "max_restarts": None}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def forecast_keys(spec_data: Mapping[str, Any], with_gpus: bool) -> list[str]:
    """The keys under which a run about to start may have been forecast."""
    asked = str(spec_data["scale"]["accelerator"])
    if asked == "auto":
        return [forecast_key(spec_data, "gpu" if with_gpus else "cpu")]
    return [forecast_key(spec_data, asked)]


def describe_outcome(expected: Forecast, wall_s: float) -> str:
    """What became of a forecast, for people."""
    low, middle, high = expected.wall_s
    off = wall_s / middle - 1
    where = "within" if low <= wall_s <= high else "outside"
    return (
        f"{format_duration(middle)} forecast ({expected.basis}), {format_duration(wall_s)} taken: {off:+.0%}, "
        f"{where} {format_range(expected.wall_s)}"
    )


def format_duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 6000:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h"


def format_range(span: Interval) -> str:
    low, high = format_duration(span.low), format_duration(span.high)
    number, unit = low.split()
    return f"{number} to {high}" if high.endswith(f" {unit}") else f"{low} to {high}"
