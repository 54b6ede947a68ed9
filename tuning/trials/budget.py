"""Tracks the cost of a running sweep and decides whether another trial fits its budget.

A thread beside Ray Tune does the billing. Each trial in a process has its own meter. The trials in
the slots of an engine share its cost in proportion to the device time of each. The cost of nodes
while no trial runs on them is the sweep's alone.
"""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.base.errors import SpecError
from cluster.cost.billing import BILLING_INTERVAL_S
from cluster.cost.budget import BudgetSpec, limit_usage
from cluster.cost.ledger import CostTotals, read_entries, total_costs_by_run
from trainers.run_folder import LEDGER
from trainers.runs.driver_meter import DriverMeter, account_metrics
from tuning.spaces.rungs import first_rung_epochs
from tuning.spaces.space import SweepRunSpec
from tuning.trials.trial import LAST_RESULT_FILE, Sweep

ENGINE_ACCOUNT = "engine"
"""The ledger's account of the nodes and devices of engines is `SWEEP/engine`."""
COST_OF_RESOURCE = {"usd": "cost_usd", "joule": "energy_j"}
"""`scheduler.resource` -> the MLflow metric of that cost."""
SHARED_METRICS = ("cost_usd", "energy_j", "energy_low_j", "energy_high_j", "kg_co2e")
"""Metrics of an engine's costs that are divided among its trials."""

_open_budgets: dict[str, "SweepBudget"] = {}
"""Sweep key -> budget. Tune pickles its searcher and callbacks, and a budget cannot be pickled."""


@dataclass
class _TrialProgress:
    """The last known progress of a trial."""

    epoch: float = 0.0
    device_s: float = 0.0
    """Seconds of device time so far."""
    running_since_s: float | None = None
    """Time of the last event, by `time.monotonic`; None while the trial does not run."""
    cost_per_device_s: float | None = None
    """Cost of a second of its device; None where that is not known."""


@dataclass
class _Sums:
    """What some trials have done together."""

    epochs: float = 0.0
    device_s: float = 0.0
    cost: float = 0.0

    def add(self, trial: _TrialProgress, sign: int = 1) -> None:
        self.epochs += sign * trial.epoch
        self.device_s += sign * trial.device_s
        self.cost += sign * trial.device_s * (trial.cost_per_device_s or 0.0)


class _Progress:
    """The progress of all trials, and the sums over them, which a change brings up to date.

    A sweep asks for a sum at each suggestion and evaluation: it may not look at 10,000 trials.
    """

    def __init__(self) -> None:
        self.trials: dict[int, _TrialProgress] = {}
        self.running: dict[int, _TrialProgress] = {}
        self.all, self.priced = _Sums(), _Sums()
        """Of all trials, and of those whose cost is known."""

    def update(self, number: int, result: Mapping[str, Any], running_since_s: float | None) -> None:
        """Record a trial's newest result; what it has done does not become less."""
        trial = self._take(number)
        trial.epoch = max(trial.epoch, result.get("epoch", 0.0))
        trial.device_s = max(trial.device_s, result.get("device_s", 0.0))
        trial.running_since_s = running_since_s
        self._put(number, trial)

    def price(self, number: int, cost_per_device_s: float) -> None:
        """Record what a second of a trial's device costs."""
        trial = self._take(number)
        trial.cost_per_device_s = cost_per_device_s
        self._put(number, trial)

    def _take(self, number: int) -> _TrialProgress:
        """A trial, taken out of the sums."""
        trial = self.trials.setdefault(number, _TrialProgress())
        self.all.add(trial, -1)
        if trial.cost_per_device_s is not None:
            self.priced.add(trial, -1)
        return trial

    def _put(self, number: int, trial: _TrialProgress) -> None:
        """Add a trial to the sums again."""
        self.all.add(trial)
        if trial.cost_per_device_s is not None:
            self.priced.add(trial)
        if trial.running_since_s is not None:
            self.running[number] = trial
        else:
            self.running.pop(number, None)


class SweepBudget:
    """The budget of a sweep that runs in this process."""

    def __init__(
        self, sweep: Sweep, spec: SweepRunSpec, metering: DriverMeter, epochs_per_trial: float
    ) -> None:
        """`epochs_per_trial` are the epochs of a trial that no scheduler stops."""
        self._sweep, self._budget, self.metering = sweep, spec.budget, metering
        self._cost_metric = COST_OF_RESOURCE.get(spec.sweep.scheduler.resource)
        for rate in metering.rates.all_used():
            if self._cost_metric == "cost_usd" and rate.usd_per_h is None:
                raise SpecError(
                    f"sweep.scheduler.resource: {rate.price_source}; set cost.usd_per_h"
                )
            if rate.usd_per_h is None and any("cost_usd" in c for c in spec.sweep.constraints):
                raise SpecError(f"sweep.constraints: {rate.price_source}; set cost.usd_per_h")
        self._first_rung_epochs = first_rung_epochs(
            spec.sweep.scheduler, epochs_per_trial, spec.train.evaluate_every_epochs
        )
        self._lock = threading.Lock()
        self._totals = metering.ledger.totals()
        self._progress = _Progress()
        for number, last in _last_results(sweep).items():
            self._progress.update(number, last, None)
        self._accounts: dict[str, CostTotals] = {}
        """The ledger's accounts at the last tick."""
        self._heard_of: set[int] = set()
        """Trials that run, or had an event since the last tick."""
        self._engine_cost: float | None = None
        """The cost of the sweep's engines; None where each trial has its own."""
        self._stop_requested = False
        self.reason: str | None = metering.limit_reached
        """One line on why the sweep ends, or starts no more trials."""

    def tick(self) -> None:
        """Charge the time since the last call; called by the billing thread."""
        reason = self.metering.tick()
        totals = self.metering.ledger.totals()
        accounts = {} if self._cost_metric is None else self.metering.ledger.totals_by_run()
        with self._lock:
            self._totals = totals
            self.reason = reason or self.reason
            self._price_trials(accounts)

    def on_trial_event(self, event: str, trial: int, result: Mapping[str, Any]) -> None:
        """Record the progress of a trial; a `tuning.tuner.TrialCallback`."""
        with self._lock:
            running = event in ("start", "result")
            self._progress.update(trial, result, time.monotonic() if running else None)
            self._heard_of.add(trial)

    def cost_per_epoch(self, trial: int, result: Mapping[str, Any]) -> float:
        """Cost of the trial per epoch, divided by the sweep's average; 1 if unknown."""
        with self._lock:
            sums = self._progress.priced if self._engine_cost is None else self._progress.all
            cost = sums.cost if self._engine_cost is None else self._engine_cost
            if not (cost and sums.device_s and sums.epochs and result["epoch"]):
                return 1.0
            known = self._progress.trials.get(trial) if self._engine_cost is None else None
            rate = known.cost_per_device_s if known is not None else None
            if rate is None:  # of a slot, or not charged yet: the average price per second
                rate = cost / sums.device_s
            return float(rate * result["device_s"] / result["epoch"] / (cost / sums.epochs))

    @property
    def totals(self) -> CostTotals:
        """Costs so far."""
        with self._lock:
            return self._totals

    def can_start_trial(self) -> bool:
        """Whether the budget covers the first rung of one more trial, besides the running ones."""
        with self._lock:
            committed = sum(
                max(0.0, self._first_rung_epochs - progress.epoch)
                for progress in self._progress.running.values()
            )
            done = self._progress.all.epochs
            shortfall = budget_shortfall(
                self._budget, self._totals, done, committed, self._first_rung_epochs
            )
            self.reason = self.reason or shortfall
            return self.reason is None

    def costs_of(self, trial: int) -> dict[str, float]:
        """`cost_usd`, `energy_j` and `kg_co2e` of a trial so far, as far as they are known.

        A trial that has not been charged yet, or that shares its device with others, has cost its
        share of the sweep by its time on the device.
        """
        own = self.metering.ledger.totals_by_run().get(self._sweep.trial_key(trial))
        with self._lock:
            known, total_s = self._progress.trials.get(trial), self._progress.all.device_s
            share = known.device_s / total_s if known is not None and total_s else 0.0
            costs = account_metrics(self._totals)
        costs = {name: share * cost for name, cost in costs.items()}
        return costs | (account_metrics(own) if own is not None else {})

    def stop_when_spent(self, trials_left: bool) -> None:
        """End Ray Tune as Ctrl-C does, at most once; called in Tune's thread."""
        with self._lock:
            limit_reached = self.metering.limit_reached is not None
            ends = limit_reached or (self.reason is not None and not trials_left)
            if ends and not self._stop_requested:
                self._stop_requested = True
                signal.raise_signal(signal.SIGINT)

    def _price_trials(self, accounts: dict[str, CostTotals]) -> None:
        """Learn what a second of each trial's device costs, where that may have changed.

        Trials in slots share the cost of their engines in proportion to their time.
        """
        self._engine_cost = self._cost(accounts.get(f"{self._sweep.key}/{ENGINE_ACCOUNT}"))
        changed = {k for k, totals in accounts.items() if self._accounts.get(k) is not totals}
        self._accounts = accounts
        names = (key.rpartition("/")[2] for key in changed)
        due = {int(name) for name in names if name.isdecimal()} | self._heard_of
        self._heard_of = set(self._progress.running)  # its second gets cheaper until it reports
        now = time.monotonic()
        for number in due & self._progress.trials.keys():
            trial = self._progress.trials[number]
            cost = self._cost(accounts.get(self._sweep.trial_key(number)))
            if cost and trial.device_s:
                since = trial.running_since_s
                since_s = 0.0 if since is None else now - since
                self._progress.price(number, cost / (trial.device_s + since_s))

    def _cost(self, account: CostTotals | None) -> float | None:
        """The cost by which trials are compared, of an account of the ledger."""
        if account is None or self._cost_metric is None:
            return None
        return account_metrics(account).get(self._cost_metric)


@dataclass(frozen=True)
class SweepCostPerEpoch:
    """The `tuning.search.schedulers.CostPerEpoch` of the sweep `key`; it can be pickled."""

    key: str

    def __call__(self, trial: int, result: Mapping[str, Any]) -> float:
        budget = find_open_budget(self.key)
        return budget.cost_per_epoch(trial, result) if budget is not None else 1.0


def budget_shortfall(
    budget: BudgetSpec,
    totals: CostTotals,
    epochs_done: float,
    committed_epochs: float,
    first_rung: float,
) -> str | None:
    """One line on the limit that the first rung of another trial would exceed, None if it fits.

    The cost of an epoch is the average over the `epochs_done` of all trials, idle time included.
    `committed_epochs` of running trials come first; the new trial needs `first_rung` epochs. While
    no epoch is done the cost is unknown, and the trial fits.
    """
    if epochs_done <= 0:
        return None
    for name, amount, limit, words in limit_usage(budget, totals):
        per_epoch = amount / epochs_done
        if amount + per_epoch * (committed_epochs + first_rung) > limit:
            share = per_epoch * first_rung / limit
            return (
                f"budget.{name}: {words} spent; a trial's first rung takes about {share:.1%} of it"
            )
    return None


def find_open_budget(key: str) -> SweepBudget | None:
    """The budget of the sweep `key`, if it runs in this process."""
    return _open_budgets.get(key)


@contextlib.contextmanager
def open_budget(
    sweep: Sweep, spec: SweepRunSpec, tracker: Any, epochs_per_trial: float
) -> Iterator[SweepBudget]:
    """The budget of a sweep while it runs, with the thread that does the billing.

    Raises SpecError if the budget cannot be enforced or is spent.
    """
    metering = DriverMeter(sweep.folder, spec, tracker)
    budget = _open_budgets[sweep.key] = SweepBudget(sweep, spec, metering, epochs_per_trial)
    done = threading.Event()

    def bill() -> None:
        while not done.wait(BILLING_INTERVAL_S):
            budget.tick()

    thread = threading.Thread(target=bill, daemon=True, name="sweep-budget")
    thread.start()
    try:
        yield budget
    finally:
        done.set()
        thread.join()
        del _open_budgets[sweep.key]


def settle(sweep: Sweep, budget: SweepBudget) -> tuple[dict[str, str], dict[str, str]]:
    """Charge the time since the last billing, and log the cost of each trial to MLflow.

    Returns the costs as lines, and as tags of the sweep's run.
    """
    total, tags = budget.metering.finish()
    for number, costs in trial_costs(sweep).items():
        budget.metering.log_metrics(sweep.trial_key(number), costs)
    return budget.metering.summary_lines(total), tags


def trial_costs(sweep: Sweep) -> dict[int, dict[str, float]]:
    """Number of a trial -> its `cost_usd`, `energy_j`, `kg_co2e` and the bounds of these."""
    path = sweep.folder / LEDGER
    if not path.exists():
        return {}
    costs = {
        key: account_metrics(totals)
        for key, totals in total_costs_by_run(read_entries(path)).items()
    }
    of_engines = costs.get(f"{sweep.key}/{ENGINE_ACCOUNT}", {})
    results = _last_results(sweep)
    total_s = sum(last["device_s"] for last in results.values())
    found: dict[int, dict[str, float]] = {}
    for number, last in results.items():
        own = found[number] = dict(costs.get(sweep.trial_key(number), {}))
        share = last["device_s"] / total_s if total_s else 0.0
        for name in SHARED_METRICS:
            if share and name in of_engines:
                own[name] = own.get(name, 0.0) + share * of_engines[name]
    return found


def _last_results(sweep: Sweep) -> dict[int, dict[str, float]]:
    """Number of each evaluated trial -> the result of its last evaluation."""
    unknown = {"device_s": 0.0}  # sweeps of earlier versions have it for fused trials only
    paths = sweep.folder.glob(f"trials/*/{LAST_RESULT_FILE}")
    return {int(path.parent.name): unknown | json.loads(path.read_text()) for path in paths}
