"""The reporter does not wait for the tracker, nor fill its queue while it is away."""

import time
from pathlib import Path

import ray

from trainers.tracking.reporter import TrackerReporter


def test_a_tracker_that_is_away_gets_everything_in_one_call(
    ray_cluster: str, tmp_path: Path
) -> None:
    @ray.remote(num_cpus=0)
    class SlowTracker:
        def __init__(self) -> None:
            self.calls: list[list[tuple[str, float, int, int]]] = []

        def log(
            self, run: str, points: list[tuple[str, float, int, int]], step: int, sync: bool
        ) -> bool:
            while not (tmp_path / "back").exists():
                time.sleep(0.01)
            self.calls.append(points)
            return True

        def received(self) -> list[list[tuple[str, float, int, int]]]:
            return self.calls

    tracker = SlowTracker.remote()
    reporter = TrackerReporter(tracker, "run", interval_s=0)
    for step in range(1, 101):
        reporter.log_metrics({"loss": 1 / step}, step)
        reporter.on_step_end(step)
    assert not reporter.should_stop()
    (tmp_path / "back").touch()
    reporter.flush()
    assert reporter.should_stop()
    calls = ray.get(tracker.received.remote())
    assert [point[2] for points in calls for point in points] == list(range(1, 101))
    assert len(calls) == 2, "one call while it was away, one of the flush"
