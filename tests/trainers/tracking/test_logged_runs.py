"""What is new in a run is known after its end, after a restart and after a take-over."""

from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainers.tracking.kept_memory import kept_bytes
from trainers.tracking.logged_runs import LoggedRuns
from trainers.tracking.operation_log import OperationLog, read_metrics

EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("log"),
            st.lists(st.tuples(st.sampled_from(["loss", "cost"]), st.integers(0, 9)), max_size=4),
        ),
        st.tuples(st.sampled_from(["finish", "resume", "restart"]), st.none()),
        st.tuples(st.just("rewind"), st.integers(0, 9)),
    ),
    max_size=25,
)


def opened(folder: Path) -> tuple[OperationLog, LoggedRuns]:
    log = OperationLog(folder)
    runs = LoggedRuns(log, lambda at_ms: None)
    for operation, begin, _ in log.outline():
        runs.observe(operation, begin)
    return log, runs


@settings(deadline=None, max_examples=40)
@given(EVENTS)
def test_a_point_is_new_if_its_step_is_later_than_any_before(
    tmp_path_factory: Any, events: list[tuple[str, Any]]
) -> None:
    """By the last step of each series, which a take-over sets back."""
    log, runs = opened(tmp_path_factory.mktemp("log"))
    runs.append_start({"do": "start", "id": "1", "key": "a", "params": {}, "at": 1})
    last = {"loss": -1, "cost": -1}
    logged: list[tuple[str, int]] = []
    for event, detail in events:
        if event == "log":
            expected = []
            for name, step in detail:
                if step > last[name]:
                    last[name] = step
                    expected.append((name, step))
            new = runs.append_points("a", [(name, 0.5, step, 7) for name, step in detail])
            assert [(point.name, point.step) for point in new] == expected
            logged += expected
        elif event == "rewind":
            runs.append({"do": "rewind", "run": "a", "step": detail})
            last = {name: min(step, detail - 1) for name, step in last.items()}
            logged = [point for point in logged if point[1] < detail]
        elif event == "restart":
            log.close()
            log, runs = opened(log.folder)
        else:
            runs.append({"do": event, "run": "a", "tags": {}})
    points = [(point.name, point.step) for point in read_metrics(log.folder, "a")]
    log.close()
    assert points == logged


def test_runs_that_ended_take_no_memory(tmp_path: Path) -> None:
    """Also where their costs come after their end: a sweep of 10,000 trials has 10,000 of both."""
    log, runs = opened(tmp_path)

    def train(number: int) -> None:
        key = f"sweep/{number:04d}"
        runs.append_start({"do": "start", "id": "1", "key": key, "params": {}, "at": 1})
        for step in range(0, 100, 10):
            rows = [(f"metric {n}", 0.5, s, 7) for n in range(10) for s in range(step, step + 10)]
            assert len(runs.append_points(key, rows)) == 100
        runs.append({"do": "finish", "run": key, "status": "FINISHED", "tags": {}, "at": 9})
        assert runs.append_points(key, [("cost_usd", 0.1, 5, 8)])
        assert not runs.append_points(key, [("cost_usd", 0.1, 5, 8)])

    assert kept_bytes(train, 10) < 3000, "bytes"
    log.close()


def test_a_log_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    """Its runs end without their series, and get points of their costs afterwards."""
    log = OperationLog(tmp_path)
    log.append({"do": "start", "id": "1", "key": "a", "params": {}, "at": 1})
    log.append({"do": "log", "run": "a", "rows": [("loss", 0.5, 4, 7)]})
    log.append({"do": "finish", "run": "a", "status": "FINISHED", "tags": {}, "at": 9})
    log.append({"do": "log", "run": "a", "rows": [("cost", 0.5, 2, 7)]})
    log.close()
    log, runs = opened(tmp_path)
    rows = [("loss", 0.5, 4, 7), ("cost", 0.5, 2, 7), ("loss", 0.5, 5, 7)]
    assert [point.step for point in runs.append_points("a", rows)] == [5]
    assert not runs.append_points("a", rows)
    log.close()
