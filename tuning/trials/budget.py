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
from cluster.cost.billing import PERIOD_S
from cluster.cost.budget import BudgetSpec, spent
from cluster.cost.ledger import Account, accounts, read
from trainers.runs.metering import LEDGER, Metering, metrics
from tuning.trials.schedulers import first_rung
from tuning.trials.space import SweepRunSpec
from tuning.trials.trial import LAST, Sweep

ENGINE = "engine"
"""Who pays, in the ledger, for the nodes and devices of engines: `SWEEP/engine`."""
COST_PER = {"usd": "cost_usd", "joule": "energy_j"}
"""What `scheduler.per` compares trials after, as MLflow has it."""
SHARED = ("cost_usd", "energy_j", "energy_low_j", "energy_high_j", "kg_co2e")

_purses: dict[str, "Purse"] = {}
"""By sweep: Tune pickles its searcher and its callbacks, and a purse lives in one process."""


@dataclass
class _Progress:
    """How far a trial was when it was last heard of."""

    epoch: float = 0.0
    device_s: float = 0.0
    """Seconds of its device that it has taken."""
    running_since: float | None = None
    """When that was, by `time.monotonic`; None where it does not run."""


class Purse:
    """The budget of a sweep that runs in this process."""

    def __init__(self, sweep: Sweep, spec: SweepRunSpec, metering: Metering, epochs: float) -> None:
        """`epochs` are those of a whole trial."""
        self._sweep, self._budget, self.metering = sweep, spec.budget, metering
        self._cost = COST_PER.get(spec.sweep.scheduler.per)
        for rate in metering.rates.known():
            if self._cost == "cost_usd" and rate.usd_per_h is None:
                raise SpecError(f"sweep.scheduler.per: {rate.price}; say cost.usd_per_h")
        self._rung = first_rung(spec.sweep.scheduler, epochs)
        self._lock = threading.Lock()
        self._account = metering.ledger.account()
        self._trials: defaultdict[int, _Progress] = defaultdict(_Progress)
        for number, last in _last_results(sweep).items():
            self._trials[number] = _Progress(last["epoch"], last["device_s"])
        self._rates: dict[int, float] = {}
        self._asked = False
        self.reason: str | None = metering.reason
        """Why the sweep ends, or starts no more trials, in a line."""

    def tick(self) -> None:
        """Charge the time since the last one; by the purse's own thread."""
        reason = self.metering.tick()
        with self._lock:
            self._account = self.metering.ledger.account()
            self.reason = reason or self.reason
            if self._cost is not None:
                self._rates = self._rates_now(self._cost)

    def follow(self, event: str, trial: int, result: Mapping[str, Any]) -> None:
        """Take note of how far trials are; events as `tuning.sweep.Watcher` is told them."""
        with self._lock:
            known = self._trials[trial]
            known.epoch = max(known.epoch, result.get("epoch", 0.0))
            known.device_s = max(known.device_s, result.get("device_s", 0.0))
            known.running_since = time.monotonic() if event in ("start", "result") else None

    def price(self, trial: int, result: Mapping[str, Any]) -> float:
        """What an epoch of the trial costs, over an average one of the sweep's; 1 if unknown."""
        with self._lock:
            charged = [(rate, self._trials[number]) for number, rate in self._rates.items()]
            cost = sum(rate * known.device_s for rate, known in charged)
            seconds = sum(known.device_s for _, known in charged)
            epochs = sum(known.epoch for _, known in charged)
            if not (cost and epochs and result["epoch"]):
                return 1.0
            # As dear a second as of the others, while nothing has been charged for this trial.
            rate = self._rates.get(trial, cost / seconds)
            return float(rate * result["device_s"] / result["epoch"] / (cost / epochs))

    @property
    def account(self) -> Account:
        """What was spent so far."""
        with self._lock:
            return self._account

    def can_start(self) -> bool:
        """Whether one more trial can be paid to its first rung, beside those under way."""
        with self._lock:
            owed = sum(
                max(0.0, self._rung - known.epoch)
                for known in self._trials.values()
                if known.running_since is not None
            )
            done = sum(known.epoch for known in self._trials.values())
            short = unpaid(self._budget, self._account, done, owed, self._rung)
            self.reason = self.reason or short
            return self.reason is None

    def end_when_spent(self, trials_left: bool) -> None:
        """Have Ray Tune end as Ctrl-C has it end, once; from its own thread."""
        with self._lock:
            reached = self.metering.reason is not None
            if not self._asked and (reached or (self.reason is not None and not trials_left)):
                self._asked = True
                signal.raise_signal(signal.SIGINT)

    def _rates_now(self, cost: str) -> dict[int, float]:
        """Number of each trial -> what a second of its device costs, where that is known."""
        now = time.monotonic()
        costs = {key: metrics(own) for key, own in self.metering.ledger.accounts().items()}
        shared = costs.get(f"{self._sweep.key}/{ENGINE}", {}).get(cost)
        total_s = sum(known.device_s for known in self._trials.values())
        found = {}
        for number, known in self._trials.items():
            own = costs.get(self._sweep.trial_key(number), {}).get(cost)
            since_s = 0.0 if known.running_since is None else now - known.running_since
            if shared is not None and total_s:
                found[number] = shared / total_s
            elif own and known.device_s:
                found[number] = own / (known.device_s + since_s)
        return found


@dataclass(frozen=True)
class SweepPrice:
    """A `tuning.trials.schedulers.Price` that can be pickled: of the sweep `key`."""

    key: str

    def __call__(self, trial: int, result: Mapping[str, Any]) -> float:
        purse = purse_of(self.key)
        return purse.price(trial, result) if purse is not None else 1.0


def unpaid(
    budget: BudgetSpec, account: Account, done: float, owed: float, rung: float
) -> str | None:
    """Which limit one more trial's first rung would exceed, in a line; None if there is none.

    An epoch costs what the `done` epochs of all trials cost on average, idle time included;
    `owed` epochs are to be paid first, and `rung` epochs are asked for. As long as none is done
    nothing is known.
    """
    if done <= 0:
        return None
    for name, amount, limit, words in spent(budget, account):
        epoch = amount / done
        if amount + epoch * (owed + rung) > limit:
            share = epoch * rung / limit
            return (
                f"budget.{name}: {words} spent; a trial's first rung takes about {share:.1%} of it"
            )
    return None


def purse_of(key: str) -> Purse | None:
    """The purse of the sweep `key`, if it runs in this process."""
    return _purses.get(key)


@contextlib.contextmanager
def opened(sweep: Sweep, spec: SweepRunSpec, tracker: Any, epochs: float) -> Iterator[Purse]:
    """The purse of a sweep while it runs; at the end, MLflow has what each trial cost.

    Raises SpecError where the budget cannot be kept or is spent.
    """
    metering = Metering(sweep.folder, spec, tracker)
    purse = _purses[sweep.key] = Purse(sweep, spec, metering, epochs)
    done = threading.Event()

    def work() -> None:
        while not done.wait(PERIOD_S):
            purse.tick()

    thread = threading.Thread(target=work, daemon=True, name="purse")
    thread.start()
    try:
        yield purse
    finally:
        done.set()
        thread.join()
        del _purses[sweep.key]


def close(sweep: Sweep, purse: Purse, tracker: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Charge the rest, and tell MLflow; the account as lines, and as tags of the sweep's run."""
    total, tags = purse.metering.finish()
    for number, found in trial_costs(sweep).items():
        purse.metering.show(sweep.trial_key(number), found)
    return purse.metering.lines(total), tags


def trial_costs(sweep: Sweep) -> dict[int, dict[str, float]]:
    """Number of a trial -> its `cost_usd`, `energy_j`, `kg_co2e` and what belongs to these."""
    path = sweep.folder / LEDGER
    if not path.exists():
        return {}
    paid = {key: metrics(own) for key, own in accounts(read(path)).items()}
    shared = paid.get(f"{sweep.key}/{ENGINE}", {})
    lasts = _last_results(sweep)
    total_s = sum(last["device_s"] for last in lasts.values())
    found: dict[int, dict[str, float]] = {}
    for number, last in lasts.items():
        costs = found[number] = dict(paid.get(sweep.trial_key(number), {}))
        part = last["device_s"] / total_s if total_s else 0.0
        for name in SHARED:
            if part and name in shared:
                costs[name] = costs.get(name, 0.0) + part * shared[name]
    return found


def _last_results(sweep: Sweep) -> dict[int, dict[str, float]]:
    """Number of each trial that was evaluated -> the result of its last evaluation."""
    unknown = {"device_s": 0.0}  # sweeps of earlier versions say it of fused trials alone
    paths = sweep.folder.glob(f"trials/*/{LAST}")
    return {int(path.parent.name): unknown | json.loads(path.read_text()) for path in paths}
