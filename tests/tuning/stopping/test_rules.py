"""Which trials the rules of early stopping stop, by hand and by plain loops."""

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.stopping.rules import Asha, Evaluation, MedianRule, StoppingRule


def ask(rule: StoppingRule, trial: int, since: float, at: float, *losses: float) -> bool | None:
    """Whether the rule stops a trial there; None if it does not decide there."""
    violation = math.inf if math.inf in losses else 0.0
    evaluation = Evaluation(trial, since, at, losses, violation)
    return rule.stops(evaluation) if rule.add(evaluation) else None


def test_asha_decides_at_the_first_evaluation_after_a_rung_only() -> None:
    """Rungs at 1, 3 and 9, and evaluations each 5 epochs: after 5 (rung 3), 10 (rung 9)."""
    asha = Asha([1, 3, 9], 3)
    for trial, loss in enumerate([0.1, 0.2, 0.3]):
        decided = [ask(asha, trial, at - 5, at, loss) for at in (5, 10, 15, 20)]
        assert decided[2:] == [None, None]
        assert decided[0] is (loss > 0.1)


def test_a_late_result_of_the_leader_is_filed_nowhere() -> None:
    """Ray 2.60 filed it under the first rung, and stopped the trial there."""
    asha = Asha([2, 6], 2)
    assert ask(asha, 0, 0, 2, 0.5) is False
    assert ask(asha, 1, 0, 2, 0.4) is False
    assert ask(asha, 1, 2, 4, 0.9) is None
    assert ask(asha, 1, 4, 6, 0.9) is False  # the only one at the second rung


@settings(max_examples=50)
@given(st.lists(st.integers(0, 9).map(float) | st.just(math.inf), min_size=1), st.integers(2, 4))
def test_asha_continues_the_best_of_each_rung(losses: list[float], reduction: int) -> None:
    asha = Asha([1], reduction)
    for trial, loss in enumerate(losses):
        stops = ask(asha, trial, 0, 1, loss)
        there = losses[: trial + 1]
        better = sum(other < loss for other in there)
        assert stops is (better >= max(1, len(there) // reduction))


def test_asha_with_several_objectives_keeps_the_first_front() -> None:
    """Of five with reduction 2 the best two go on; the dominated one is the last of all."""
    asha = Asha([1], 2, objectives=2)
    assert ask(asha, 0, 0, 1, 1.0, 9.0) is False
    assert ask(asha, 1, 0, 1, 9.0, 1.0) is False  # trades off with the first
    assert ask(asha, 2, 0, 1, 9.0, 9.0) is True  # worse than both
    assert ask(asha, 3, 0, 1, 0.5, 0.5) is False  # better than both
    assert ask(asha, 4, 0, 1, math.inf, math.inf) is True


def test_asha_puts_trials_that_break_a_constraint_behind_all_others() -> None:
    """And of those the one that breaks it least first: it may keep it later."""
    asha, stopped = Asha([1], 2), []
    for trial, violation in enumerate([3.0, 2.0, 0.0, 1.0, 0.0, math.inf]):
        evaluation = Evaluation(trial, 0, 1, (0.1 * trial,), violation)
        assert asha.add(evaluation)
        stopped.append(asha.stops(evaluation))
    # So many are better, of one to six of which the best half goes on: 0, 0, 0, 1, 1, 5.
    assert stopped == [False, False, False, False, False, True]


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.integers(0, 9).map(float), min_size=3, max_size=3), min_size=1),
    st.integers(1, 3),
)
def test_the_median_rule_compares_the_best_with_the_means_of_others(
    curves: list[list[float]], grace: int
) -> None:
    rule = MedianRule(grace, 1)
    for trial, losses in enumerate(curves):
        for epoch in (1, 2, 3):
            stops = ask(rule, trial, epoch - 1, epoch, losses[epoch - 1])
            if epoch < grace:
                assert stops is None
                continue
            means = [statistics.mean(other[:epoch]) for other in curves[:trial]]
            expected = trial >= 3 and min(losses[:epoch]) > statistics.median(means)
            assert stops is expected


def test_the_median_rule_counts_a_trial_without_finite_evaluations_as_the_worst() -> None:
    for others, stops in (([math.inf, math.inf, 1.0], False), ([math.inf, 2.0, 1.0], True)):
        rule = MedianRule(1, 1)
        for trial, loss in enumerate(others):
            ask(rule, trial, 0, 1, loss)
        assert ask(rule, 3, 0, 1, 5.0) is stops


@pytest.mark.parametrize("reduction", [2, 3, 4])
def test_asha_continues_about_one_of_reduction(reduction: int) -> None:
    """Losses in an order that is no order: multiples of the golden ratio, modulo 1."""
    losses = [n * 0.6180339887 % 1 for n in range(900)]
    asha = Asha([1], reduction)
    kept = sum(not ask(asha, trial, 0, 1, loss) for trial, loss in enumerate(losses))
    assert kept == pytest.approx(900 / reduction, rel=0.1)
