"""Heliostat's own metrics for Prometheus, exported by Ray, which prefixes their names with `ray_`.

A run's tracker computes them from the metrics that it receives anyway, outside of the training
step, in 5 us for each value. Ray exports them from the metrics port of the tracker's node, and
drops them when the tracker ends.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

GAUGES = {
    "heliostat_step_seconds": "Time of an optimizer step, mean over the run's trials",
    "heliostat_samples_per_second": "Training samples per second, of all the run's trials together",
    "heliostat_goodput_ratio": "Share of the time spent on steps whose work was kept",
    "heliostat_mfu_ratio": "Model FLOP/s over the devices' peak, mean over the run's trials",
    "heliostat_trials": "Trials that report now; 1 for a training run",
    "heliostat_watts": "Power drawn, as the run's meters measure or estimate it",
    "heliostat_usd_per_hour": "What the run costs now",
    "heliostat_usd": "What the run has cost so far",
    "heliostat_slots": "Slots of an engine of a fused sweep",
    "heliostat_slots_in_use": "Slots that hold a trial",
}
"""Every metric that is exported, with its help text. Each has the tag `run`."""
_GAUGE_OF_METRIC = {
    "perf/step_s": "heliostat_step_seconds",
    "perf/samples_per_s": "heliostat_samples_per_second",
    "perf/goodput": "heliostat_goodput_ratio",
    "perf/mfu": "heliostat_mfu_ratio",
}
_SUMMED_GAUGE = "heliostat_samples_per_second"
_RATE_GAUGES = {
    "energy_j": ("heliostat_watts", 1.0),
    "cost_usd": ("heliostat_usd_per_hour", 3600.0),
}
"""Cumulative metric -> the gauge of its growth, and the seconds in the gauge's unit of time."""


def set_gauge(name: str, value: float, run: str) -> None:
    """Set a gauge of a run or sweep until this process ends. Works in processes of Ray's only."""
    _gauge(name).set(value, {"run": run})


@cache
def _gauge(name: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(name, description=GAUGES[name], tag_keys=("run",))


class RunGauges:
    """The gauges of a run, or of a sweep with all its trials, from the metrics they report.

    Trials have no series of their own: a sweep of a thousand would leave thousands behind.
    """

    def __init__(self) -> None:
        self._latest: dict[str, dict[str, float]] = {}
        """Run or trial -> gauge -> its latest value."""
        self._totals: dict[tuple[str, str], tuple[float, float]] = {}
        """Run and cumulative metric -> its latest value, and its Unix time."""

    def record(self, key: str, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Record metrics (name, value, step, Unix time in ms) of the run or trial `key`."""
        run, found = key.partition("/")[0], False
        for name, value, _, at_ms in points:
            if name in _GAUGE_OF_METRIC:
                self._latest.setdefault(key, {})[_GAUGE_OF_METRIC[name]] = value
                found = True
            elif name in _RATE_GAUGES and key == run:
                self._set_rate(run, name, value, at_ms / 1000)
        if found:
            self._publish(run)

    def finish(self, key: str) -> None:
        """Drop a run or trial that has ended."""
        if self._latest.pop(key, None) is not None:
            self._publish(key.partition("/")[0])

    def _publish(self, run: str) -> None:
        live = [gauges for key, gauges in self._latest.items() if key.partition("/")[0] == run]
        set_gauge("heliostat_trials", len(live), run=run)
        for name in _GAUGE_OF_METRIC.values():
            values = [gauges[name] for gauges in live if name in gauges]
            if values:
                mean = sum(values) / (1 if name == _SUMMED_GAUGE else len(values))
                set_gauge(name, mean, run=run)
        if not live:
            set_gauge(_SUMMED_GAUGE, 0.0, run=run)

    def _set_rate(self, run: str, name: str, total: float, at_s: float) -> None:
        before, before_s = self._totals.get((run, name), (total, at_s))
        self._totals[run, name] = total, at_s
        gauge, seconds = _RATE_GAUGES[name]
        if at_s > before_s:
            set_gauge(gauge, (total - before) / (at_s - before_s) * seconds, run=run)
        if name == "cost_usd":
            set_gauge("heliostat_usd", total, run=run)
