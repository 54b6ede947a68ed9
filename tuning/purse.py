"""What a sweep may spend, while it is spent: who pays what, and which trials can still be paid.

The bill is written by a thread beside Ray Tune. Trials in processes have meters of their own.
Trials that share an engine share what it costs, in proportion to the device time that each of
them took. What nodes cost while no trial works on them is the sweep's.
"""

import contextlib
import json
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.bill import PERIOD_S
from cluster.budget import BudgetSpec, spent
from cluster.ledger import Account, Entry, account, read
from trainers.metering import LEDGER, Metering, metrics
from tuning.schedule import first_rung
from tuning.space import SweepRunSpec
from tuning.trial import LAST, Sweep

ENGINE = "engine"
"""Who pays, in the ledger, for the nodes and devices of engines: `SWEEP/engine`."""
SHARED = ("cost_usd", "energy_j", "energy_low_j", "energy_high_j", "kg_co2e")

_purses: dict[str, "Purse"] = {}
"""By sweep: Tune pickles its searcher and its callbacks, and a purse lives in one process."""


class Purse:
    """The budget of a sweep that runs in this process."""

    def __init__(self, spec: SweepRunSpec, metering: Metering, epochs: float) -> None:
        """`epochs` are those of a whole trial."""
        self._budget, self.metering = spec.budget, metering
        self._rung = first_rung(spec.sweep.scheduler, epochs)
        self._lock = threading.Lock()
        self._account = metering.ledger.account()
        self._epochs: defaultdict[int, float] = defaultdict(float)
        self._running: set[int] = set()
        self._asked = False
        self.reason: str | None = metering.reason
        """Why the sweep ends, or starts no more trials, in a line."""

    def tick(self) -> None:
        """Charge the time since the last one; by the purse's own thread."""
        reason = self.metering.tick()
        with self._lock:
            self._account = self.metering.ledger.account()
            self.reason = reason or self.reason

    def follow(self, event: str, trial: int, result: Mapping[str, Any]) -> None:
        """Take note of how far trials are; events as `tuning.sweep.Watcher` is told them."""
        with self._lock:
            self._epochs[trial] = max(self._epochs[trial], result.get("epoch", 0.0))
            (self._running.add if event in ("start", "result") else self._running.discard)(trial)

    def can_start(self) -> bool:
        """Whether one more trial can be paid to its first rung, beside those under way."""
        with self._lock:
            owed = sum(max(0.0, self._rung - self._epochs[trial]) for trial in self._running)
            done = sum(self._epochs.values())
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
    purse = _purses[sweep.key] = Purse(spec, metering, epochs)
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
    entries: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in read(path):
        entries[entry.run].append(entry)
    found: dict[int, dict[str, float]] = {}
    for number, device_s in _device_s(sweep).items():
        alone = account(entries.get(sweep.trial_key(number), []))
        found[number] = metrics(alone)
        if device_s:
            found[number] |= {"device_s": device_s}
    shared = metrics(account(entries.get(f"{sweep.key}/{ENGINE}", [])))
    total_s = sum(costs.get("device_s", 0.0) for costs in found.values())
    for costs in found.values():
        part = costs.pop("device_s", 0.0) / total_s if total_s else 0.0
        for name in SHARED:
            if part and name in shared:
                costs[name] = costs.get(name, 0.0) + part * shared[name]
    return found


def _device_s(sweep: Sweep) -> dict[int, float]:
    """Number of each trial that was evaluated -> seconds of an engine's device that it took."""
    found = {}
    for path in sweep.folder.glob(f"trials/*/{LAST}"):
        found[int(path.parent.name)] = float(json.loads(path.read_text()).get("device_s", 0.0))
    return found
