"""Times of the training loop, from the calls that a reporter gets."""

import time

import pytest

from trainers.probes.timing import TimingReporter, steady_step_time


def test_the_first_steps_and_the_last_one_are_left_out() -> None:
    durations = [9.0, 5.0, *[0.5] * 20, 30.0]
    step_ends = [sum(durations[: i + 1]) for i in range(len(durations))]
    assert steady_step_time(step_ends) == (pytest.approx(0.5), pytest.approx(0, abs=1e-9))


def test_the_spread_is_that_of_the_means_of_windows() -> None:
    def spread(durations: list[float]) -> float:
        step_ends = [sum(durations[: i + 1]) for i in range(len(durations))]
        return steady_step_time([0.0, 0.0, *step_ends, step_ends[-1]])[1]

    uneven = spread([0.4, 0.6] * 50)
    drifting = spread([0.4] * 50 + [0.6] * 50)
    assert uneven < 0.05 < drifting


def test_the_reporter_times_steps_and_evaluations_and_stops_the_loop() -> None:
    timing = TimingReporter(0.2)
    assert not timing.should_stop()
    began = time.perf_counter()
    while not timing.should_stop():
        time.sleep(0.01)
        timing.on_step_end(len(timing.step_ends) + 1)
    assert time.perf_counter() - began >= 0.2
    timing.log_metrics({"train/loss": 1.0, "perf/step_s": 0.5, "perf/data_share": 0.25}, 9)
    time.sleep(0.05)
    timing.log_metrics({"val/loss": 1.0}, 9)
    time.sleep(0.15)
    timing.log_metrics({"val/loss": 1.0, "test/loss": 2.0}, 10)
    assert timing.evaluation_s == pytest.approx(0.05, abs=0.04)
    assert timing.test_s == pytest.approx(0.15 - timing.evaluation_s, abs=0.04)
    assert timing.shares() == {"data": 0.25, "compute": 0, "communication": 0, "other": 0}
    assert timing.flop_per_sample() is None
    assert not TimingReporter(0).should_stop()  # without a limit the loop goes on to its last step
