"""Rules that stop the worse trials early, as plain functions of the evaluations that came in.

A rule notes each evaluation by `add`, and says by `stops` whether the trial of the one that was
noted last is to be stopped. The same evaluations in the same order give the same decisions, so that
an interrupted sweep goes on with the rungs that it had.
"""

import bisect
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tuning.stopping.fronts import Fronts

MIN_OTHERS = 3
"""Other trials that the median rule needs before it stops one."""
ROUNDING = 1e-9
"""Relative error of a computed epoch."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of a trial, as the rules compare it."""

    trial: int
    since: float
    """What the trial had used at its evaluation before this one; 0 at the first one."""
    at: float
    """What it has used now: epochs, or cost in epochs of average cost."""
    losses: tuple[float, ...]
    """What counts of the trial by now, by each objective; smaller is better."""
    violation: float = 0.0
    """How far it breaks constraints: 0 if it keeps them all, infinity if a loss is not finite. Of
    two trials the one that breaks them less is better, whatever their losses."""
    finite: bool = True
    """Whether this very evaluation is finite, whatever the trial was before."""


class StoppingRule(Protocol):
    """Decides at some evaluations of a trial whether it is stopped."""

    def add(self, evaluation: Evaluation) -> bool:
        """Note an evaluation; returns whether the rule decides about the trial there."""

    def stops(self, evaluation: Evaluation) -> bool:
        """Whether the trial is to be stopped at the evaluation that was added last."""


class Rung:
    """The trials that came to one point of comparison."""

    def __init__(self, objectives: int) -> None:
        self._losses: list[float] = []
        self._fronts = Fronts() if objectives > 1 else None
        self._violations: list[float] = []
        """Of the trials that break a constraint, or are not finite, in order."""
        self.better = 0
        """How many trials are better than the one that was added last."""

    def __len__(self) -> int:
        return self._count_valid() + len(self._violations)

    def _count_valid(self) -> int:
        return len(self._losses) if self._fronts is None else len(self._fronts)

    def add(self, evaluation: Evaluation) -> None:
        if evaluation.violation > 0:
            less = bisect.bisect_left(self._violations, evaluation.violation)
            self._violations.insert(less, evaluation.violation)
            self.better = self._count_valid() + less
        elif self._fronts is not None:
            self.better = self._fronts.add(evaluation.losses)
        else:
            self.better = bisect.bisect_left(self._losses, evaluation.losses[0])
            self._losses.insert(self.better, evaluation.losses[0])


class Asha:
    """Asynchronous successive halving (Li et al., MLSys 2020), by stopping.

    A trial is compared at its first evaluation at or after each rung with all trials that came
    there before it. It goes on if it is one of the best: of `n`, itself included, the best
    `n // reduction`, and always the very best. Later evaluations do not count at that rung. One
    that passes several rungs at once counts at the last of them.

    With several objectives the best are those of the first non-dominated fronts, and of a front
    those in its emptier places, which is one of the rules that Schmucker et al. compared ("Multi-
    objective asynchronous successive halving", arXiv 2106.12639).
    """

    def __init__(self, rungs: Sequence[float], reduction: int, objectives: int = 1) -> None:
        """`rungs` are ascending, in the unit of `Evaluation.at`."""
        self._milestones, self._reduction = list(rungs), reduction
        self._rungs = [Rung(objectives) for _ in self._milestones]

    def add(self, evaluation: Evaluation) -> bool:
        if self._reached(evaluation.at) == self._reached(evaluation.since):
            return False
        self._rungs[self._reached(evaluation.at) - 1].add(evaluation)
        return True

    def stops(self, evaluation: Evaluation) -> bool:
        rung = self._rungs[self._reached(evaluation.at) - 1]
        return rung.better >= max(1, len(rung) // self._reduction)

    def _reached(self, at: float) -> int:
        """How many rungs a trial has reached."""
        return bisect.bisect_right(self._milestones, at * (1 + ROUNDING))


@dataclass
class _Mean:
    """What the median rule keeps of a trial."""

    total: float = 0.0
    count: int = 0
    best: float = math.inf

    def add(self, loss: float) -> None:
        self.total, self.count = self.total + loss, self.count + 1
        self.best = min(self.best, loss)


class MedianRule:
    """The median stopping rule (Golovin et al., "Google Vizier", KDD 2017).

    A trial is stopped if its best evaluation is worse than the median of the other trials' means up
    to the same point. It compares by the first objective; an evaluation that breaks a constraint,
    or is not finite, is the worst.
    """

    def __init__(self, grace: float, interval: float) -> None:
        """`interval` is that of the evaluations, at whose multiples trials are compared."""
        self._grace, self._interval = grace, interval
        self._trials: defaultdict[int, _Mean] = defaultdict(_Mean)
        self._means: defaultdict[int, list[float]] = defaultdict(list)
        """Multiple of the interval -> means up to there of the trials that came there, sorted."""
        self._median_of_others = math.inf

    def add(self, evaluation: Evaluation) -> bool:
        own = self._trials[evaluation.trial]
        if evaluation.violation == 0:
            own.add(evaluation.losses[0])
        before, reached = self._slot(evaluation.since), self._slot(evaluation.at)
        if reached == before:
            return False
        others = self._means[reached]
        enough = len(others) >= MIN_OTHERS
        self._median_of_others = statistics.median(others) if enough else math.inf
        mean = own.total / own.count if evaluation.violation == 0 else math.inf
        for slot in range(before + 1, reached + 1):
            bisect.insort(self._means[slot], mean)
        return evaluation.at * (1 + ROUNDING) >= self._grace

    def _slot(self, at: float) -> int:
        return int(at / self._interval * (1 + ROUNDING))

    def stops(self, evaluation: Evaluation) -> bool:
        return self._trials[evaluation.trial].best > self._median_of_others
