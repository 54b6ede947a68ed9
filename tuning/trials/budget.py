"""What a sweep may spend, while it is spent: who pays what, and which trials can still be paid.

The bill is written by a thread beside Ray Tune. Trials in processes have meters of their own.
Trials that share an engine share what it costs, in proportion to the device time that each of
them took. What nodes cost while no trial works on them is the sweep's.
"""

import contextlib
import json
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.base.errors import SpecError
from cluster.cost.billing import BILLING_INTERVAL_S
from cluster.cost.budget import BudgetSpec, limit_usage
from cluster.cost.ledger import CostTotals, read_entries, total_costs_by_run
from trainers.run_folder import LEDGER
from trainers.runs.driver_meter import DriverMeter, account_metrics
from tuning.trials.schedulers import first_rung_epochs
from tuning.trials.space import SweepRunSpec
from tuning.trials.trial import LAST_RESULT_FILE, Sweep

ENGINE_ACCOUNT = "engine"
"""Who pays, in the ledger, for the nodes and devices of engines: `SWEEP/engine`."""
COST_OF_RESOURCE = {"usd": "cost_usd", "joule": "energy_j"}
"""What `scheduler.resource` compares trials after, as MLflow has it."""
SHARED_METRICS = ("cost_usd", "energy_j", "energy_low_j", "energy_high_j", "kg_co2e")

_open_budgets: dict[str, "SweepBudget"] = {}
"""By sweep: Tune pickles its searcher and its callbacks, and a purse lives in one process."""


@dataclass
class _TrialProgress:
    """How far a trial was when it was last heard of."""

    epoch: float = 0.0
    device_s: float = 0.0
    """Seconds of its device that it has taken."""
    running_since_s: float | None = None
    """When that was, by `time.monotonic`; None where it does not run."""


class SweepBudget:
    """The budget of a sweep that runs in this process."""

    def __init__(
        self, sweep: Sweep, spec: SweepRunSpec, metering: DriverMeter, epochs_per_trial: float
    ) -> None:
        """`epochs` are those of a whole trial."""
        self._sweep, self._budget, self.metering = sweep, spec.budget, metering
        self._cost_metric = COST_OF_RESOURCE.get(spec.sweep.scheduler.resource)
        for rate in metering.rates.all_used():
            if self._cost_metric == "cost_usd" and rate.usd_per_h is None:
                raise SpecError(
                    f"sweep.scheduler.resource: {rate.price_source}; say cost.usd_per_h"
                )
        self._first_rung_epochs = first_rung_epochs(spec.sweep.scheduler, epochs_per_trial)
        self._lock = threading.Lock()
        self._totals = metering.ledger.totals()
        self._trials: defaultdict[int, _TrialProgress] = defaultdict(_TrialProgress)
        for number, last in _last_results(sweep).items():
            self._trials[number] = _TrialProgress(last["epoch"], last["device_s"])
        self._cost_per_device_s: dict[int, float] = {}
        self._stop_requested = False
        self.reason: str | None = metering.limit_reached
        """Why the sweep ends, or starts no more trials, in a line."""

    def tick(self) -> None:
        """Charge the time since the last one; by the purse's own thread."""
        reason = self.metering.tick()
        with self._lock:
            self._totals = self.metering.ledger.totals()
            self.reason = reason or self.reason
            if self._cost_metric is not None:
                self._cost_per_device_s = self._compute_cost_per_device_s(self._cost_metric)

    def on_trial_event(self, event: str, trial: int, result: Mapping[str, Any]) -> None:
        """Take note of how far trials are; events as `tuning.sweep.TrialCallback` is told them."""
        with self._lock:
            known = self._trials[trial]
            known.epoch = max(known.epoch, result.get("epoch", 0.0))
            known.device_s = max(known.device_s, result.get("device_s", 0.0))
            known.running_since_s = time.monotonic() if event in ("start", "result") else None

    def cost_per_epoch(self, trial: int, result: Mapping[str, Any]) -> float:
        """What an epoch of the trial costs, over an average one of the sweep's; 1 if unknown."""
        with self._lock:
            charged = [
                (rate, self._trials[number]) for number, rate in self._cost_per_device_s.items()
            ]
            cost = sum(rate * known.device_s for rate, known in charged)
            seconds = sum(known.device_s for _, known in charged)
            epochs = sum(known.epoch for _, known in charged)
            if not (cost and epochs and result["epoch"]):
                return 1.0
            # As dear a second as of the others, while nothing has been charged for this trial.
            rate = self._cost_per_device_s.get(trial, cost / seconds)
            return float(rate * result["device_s"] / result["epoch"] / (cost / epochs))

    @property
    def totals(self) -> CostTotals:
        """What was spent so far."""
        with self._lock:
            return self._totals

    def can_start_trial(self) -> bool:
        """Whether one more trial can be paid to its first rung, beside those under way."""
        with self._lock:
            owed = sum(
                max(0.0, self._first_rung_epochs - known.epoch)
                for known in self._trials.values()
                if known.running_since_s is not None
            )
            done = sum(known.epoch for known in self._trials.values())
            short = budget_shortfall(
                self._budget, self._totals, done, owed, self._first_rung_epochs
            )
            self.reason = self.reason or short
            return self.reason is None

    def stop_when_spent(self, trials_left: bool) -> None:
        """Have Ray Tune end as Ctrl-C has it end, once; from its own thread."""
        with self._lock:
            reached = self.metering.limit_reached is not None
            if not self._stop_requested and (
                reached or (self.reason is not None and not trials_left)
            ):
                self._stop_requested = True
                signal.raise_signal(signal.SIGINT)

    def _compute_cost_per_device_s(self, cost: str) -> dict[int, float]:
        """Number of each trial -> what a second of its device costs, where that is known."""
        now = time.monotonic()
        costs = {
            key: account_metrics(own) for key, own in self.metering.ledger.totals_by_run().items()
        }
        shared = costs.get(f"{self._sweep.key}/{ENGINE_ACCOUNT}", {}).get(cost)
        total_s = sum(known.device_s for known in self._trials.values())
        found = {}
        for number, known in self._trials.items():
            own = costs.get(self._sweep.trial_key(number), {}).get(cost)
            since_s = 0.0 if known.running_since_s is None else now - known.running_since_s
            if shared is not None and total_s:
                found[number] = shared / total_s
            elif own and known.device_s:
                found[number] = own / (known.device_s + since_s)
        return found


@dataclass(frozen=True)
class SweepCostPerEpoch:
    """A `tuning.trials.schedulers.CostPerEpoch` that can be pickled: of the sweep `key`."""

    key: str

    def __call__(self, trial: int, result: Mapping[str, Any]) -> float:
        purse = find_open_budget(self.key)
        return purse.cost_per_epoch(trial, result) if purse is not None else 1.0


def budget_shortfall(
    budget: BudgetSpec,
    totals: CostTotals,
    epochs_done: float,
    committed_epochs: float,
    first_rung: float,
) -> str | None:
    """Which limit one more trial's first rung would exceed, in a line; None if there is none.

    An epoch costs what the `done` epochs of all trials cost on average, idle time included;
    `owed` epochs are to be paid first, and `rung` epochs are asked for. As long as none is done
    nothing is known.
    """
    if epochs_done <= 0:
        return None
    for name, amount, limit, words in limit_usage(budget, totals):
        epoch = amount / epochs_done
        if amount + epoch * (committed_epochs + first_rung) > limit:
            share = epoch * first_rung / limit
            return (
                f"budget.{name}: {words} spent; a trial's first rung takes about {share:.1%} of it"
            )
    return None


def find_open_budget(key: str) -> SweepBudget | None:
    """The purse of the sweep `key`, if it runs in this process."""
    return _open_budgets.get(key)


@contextlib.contextmanager
def open_budget(
    sweep: Sweep, spec: SweepRunSpec, tracker: Any, epochs_per_trial: float
) -> Iterator[SweepBudget]:
    """The purse of a sweep while it runs; at the end, MLflow has what each trial cost.

    Raises SpecError where the budget cannot be kept or is spent.
    """
    metering = DriverMeter(sweep.folder, spec, tracker)
    purse = _open_budgets[sweep.key] = SweepBudget(sweep, spec, metering, epochs_per_trial)
    done = threading.Event()

    def work() -> None:
        while not done.wait(BILLING_INTERVAL_S):
            purse.tick()

    thread = threading.Thread(target=work, daemon=True, name="purse")
    thread.start()
    try:
        yield purse
    finally:
        done.set()
        thread.join()
        del _open_budgets[sweep.key]


def settle(
    sweep: Sweep, budget: SweepBudget, tracker: Any
) -> tuple[dict[str, str], dict[str, str]]:
    """Charge the rest, and tell MLflow; the account as lines, and as tags of the sweep's run."""
    total, tags = budget.metering.finish()
    for number, found in trial_costs(sweep).items():
        budget.metering.log_metrics(sweep.trial_key(number), found)
    return budget.metering.summary_lines(total), tags


def trial_costs(sweep: Sweep) -> dict[int, dict[str, float]]:
    """Number of a trial -> its `cost_usd`, `energy_j`, `kg_co2e` and what belongs to these."""
    path = sweep.folder / LEDGER
    if not path.exists():
        return {}
    paid = {
        key: account_metrics(own) for key, own in total_costs_by_run(read_entries(path)).items()
    }
    shared = paid.get(f"{sweep.key}/{ENGINE_ACCOUNT}", {})
    lasts = _last_results(sweep)
    total_s = sum(last["device_s"] for last in lasts.values())
    found: dict[int, dict[str, float]] = {}
    for number, last in lasts.items():
        costs = found[number] = dict(paid.get(sweep.trial_key(number), {}))
        part = last["device_s"] / total_s if total_s else 0.0
        for name in SHARED_METRICS:
            if part and name in shared:
                costs[name] = costs.get(name, 0.0) + part * shared[name]
    return found


def _last_results(sweep: Sweep) -> dict[int, dict[str, float]]:
    """Number of each trial that was evaluated -> the result of its last evaluation."""
    unknown = {"device_s": 0.0}  # sweeps of earlier versions say it of fused trials alone
    paths = sweep.folder.glob(f"trials/*/{LAST_RESULT_FILE}")
    return {int(path.parent.name): unknown | json.loads(path.read_text()) for path in paths}
