"""The thread that sends, and what it does with an operation that MLflow does not take."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from tests.trainers.tracking.kept_memory import kept_bytes
from trainers.tracking import mlflow_limits
from trainers.tracking.mlflow_store import MlflowStore
from trainers.tracking.operation_log import MetricPoint, OperationLog
from trainers.tracking.refusals import Refusals
from trainers.tracking.sender import PATIENCE, BackgroundSender, Sender

Refuses = Callable[[dict[str, Any]], bool]


class CountedLog(OperationLog):
    syncs = 0

    def write_and_sync(self) -> None:
        super().write_and_sync()
        self.syncs += 1


class Sends:
    """Notes that something was to be sent."""

    def __init__(self) -> None:
        self.called = threading.Event()

    def send(self, closed: threading.Event) -> None:
        self.called.set()


@pytest.mark.parametrize("hold_s", [0.0, 600.0])
def test_nothing_is_sent_while_it_is_held(
    hold_s: float, tmp_path: Path, wait_until: Callable[..., Any]
) -> None:
    log, sends = CountedLog(tmp_path), Sends()
    background = BackgroundSender(log, cast(Sender, sends), hold_s)
    background.start()
    try:
        for count in range(1, 4):
            log.append({"do": "start", "key": "a"})
            background.wake()
            wait_until(lambda: log.syncs > count)  # noqa: B023
        assert sends.called.is_set() == (hold_s == 0)
        background.release()
        assert sends.called.wait(60)
    finally:
        background.close()
        log.close()


class FussyStore:
    """In the place of MLflow: takes what it does not refuse, and says nothing of why."""

    def __init__(self, refuses: Refuses = lambda operation: False) -> None:
        self.refuses = refuses
        self.taken: list[dict[str, Any]] = []
        self.run_tags: dict[str, str] = {}
        self.run_ids: dict[str, str] = {}
        self.names: dict[str, list[str]] = {}
        self.away = False
        self.asked = 0

    def send(self, operation: dict[str, Any]) -> None:
        self.asked += 1
        if self.away or self.refuses(operation):
            raise RuntimeError("Internal Server Error")
        self.taken.append(operation)

    def send_in_bulk(self, operations: Any) -> int:
        return 0

    def accepts(self, key: str) -> bool:
        return not self.away

    def claim_names(self, key: str, metrics: Any) -> None:
        self.names.setdefault(key, []).extend(metrics)

    def forget(self, key: str) -> None:
        self.names.pop(key, None)

    @property
    def points(self) -> list[MetricPoint]:
        return [point for each in self.taken for point in each.get("rows", ())]

    @property
    def tags(self) -> dict[str, str]:
        return {k: v for each in self.taken for k, v in each.get("tags", {}).items()}


def sender_of(log: OperationLog, store: FussyStore, **more: Any) -> tuple[Sender, Refusals]:
    refusals = Refusals()
    sender = Sender(log, cast(MlflowStore, store), refusals, **more)
    for operation, _, end in log.outline():
        sender.observe(operation, sent=end <= log.sent_offset)
    return sender, refusals


def tries(sender: Sender, most: int) -> int:
    """How many times the sender must try until everything is sent."""
    for count in range(1, most + 1):
        try:
            sender.send(threading.Event())
        except RuntimeError:
            continue
        return count
    raise AssertionError(f"not sent in {most} tries")


def rows(steps: range, name: str = "loss") -> list[MetricPoint]:
    return [MetricPoint(name, step / 7, step, 1000 + step) for step in steps]


@pytest.fixture
def log(tmp_path: Path) -> OperationLog:
    return OperationLog(tmp_path)


def begin(log: OperationLog, key: str, **params: Any) -> None:
    log.append({"do": "start", "id": "1", "key": key, "params": params, "tags": {}, "at": 1})


def test_an_answer_that_is_always_the_same_holds_up_nothing(log: OperationLog) -> None:
    """A proxy that dislikes a word, or a database a number: 500 each time, for ever."""
    begin(log, "a", good=1, bad=2, other=3)
    log.append({"do": "log", "run": "a", "rows": [*rows(range(400)), *rows(range(9), "other")]})
    tags = {"note": "good", "heliostat.reason": "bad"}
    log.append({"do": "finish", "run": "a", "status": "FAILED", "tags": tags, "at": 9})

    def refuses(operation: dict[str, Any]) -> bool:
        bad_point = any(
            point[0] == "loss" and point[2] == 123 for point in operation.get("rows", ())
        )
        bad_tag = operation.get("tags", {}).get("heliostat.reason") == "bad"
        return bad_point or bad_tag or "bad" in operation.get("params", {})

    store = FussyStore(refuses)
    sender, refusals = sender_of(log, store)
    assert tries(sender, 40) <= 3 * PATIENCE
    assert log.pending_bytes == 0
    expected = [step for step in range(400) if step != 123]
    assert sorted(point.step for point in store.points if point.name == "loss") == expected
    assert len([point for point in store.points if point.name == "other"]) == 9
    params = {k: v for each in store.taken for k, v in each.get("params", {}).items()}
    assert params == {"good": 1, "other": 3}
    assert store.taken[-1] == {**store.taken[-1], "do": "finish", "status": "FAILED", "tags": {}}
    assert store.tags["note"] == "good"
    assert store.tags["heliostat.refused.log"] == "loss: Internal Server Error"
    line = refusals.line() or ""
    assert all(name in line for name in ("bad", "loss", "heliostat.reason"))
    assert len(line.splitlines()) == 1


def test_nothing_is_left_out_while_nothing_is_taken(log: OperationLog) -> None:
    begin(log, "a", lr=1)
    log.append({"do": "log", "run": "a", "rows": rows(range(50))})
    store = FussyStore()
    sender, refusals = sender_of(log, store)
    store.away = True
    with pytest.raises(AssertionError, match="not sent"):
        tries(sender, 10 * PATIENCE)
    assert log.sent_offset == 0
    store.away = False
    assert tries(sender, 1) == 1
    assert store.points == rows(range(50))
    assert refusals.line() is None


def test_a_server_that_stumbles_gets_everything(log: OperationLog) -> None:
    """Every third answer is an error: nothing is refused for good."""
    begin(log, "a", lr=1)
    log.append({"do": "log", "run": "a", "rows": rows(range(50))})
    log.append({"do": "finish", "run": "a", "status": "FINISHED", "tags": {}, "at": 9})
    store = FussyStore(lambda operation: store.asked % 3 == 1)
    sender, refusals = sender_of(log, store)
    tries(sender, 20)
    assert store.points == rows(range(50))
    assert store.taken[-1]["status"] == "FINISHED"
    assert refusals.line() is None


def test_a_series_that_is_refused_whole_costs_few_requests(log: OperationLog) -> None:
    begin(log, "a")
    log.append({"do": "log", "run": "a", "rows": [*rows(range(900)), *rows(range(9), "good")]})
    store = FussyStore(lambda o: any(point[0] == "loss" for point in o.get("rows", ())))
    sender, _ = sender_of(log, store)
    tries(sender, 2 * PATIENCE)
    assert {point.name for point in store.points} == {"good"}
    assert store.asked < 300


def test_a_run_that_ended_goes_on_where_it_was(
    log: OperationLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same writer, and in the next one: its long series stays on the same grid."""
    monkeypatch.setattr(mlflow_limits, "EXACT_POINTS", 100)
    points = rows(range(400))
    whole = mlflow_limits.Downsampler()
    expected = whole.add("a", points[:250])
    expected += whole.open_windows("a")
    expected += whole.add("a", points[250:])
    expected += whole.open_windows("a")

    begin(log, "a")
    log.append({"do": "log", "run": "a", "rows": points[:250]})
    log.append({"do": "finish", "run": "a", "series": {"loss": [249, 250]}, "tags": {}, "at": 9})
    store = FussyStore()
    sender, _ = sender_of(log, store)
    tries(sender, 1)
    assert store.names == {}, "forgotten at its end"
    log.append({"do": "resume", "run": "a", "series": {"loss": [249, 250]}, "tags": {}})
    log.append({"do": "log", "run": "a", "rows": points[250:333]})
    tries(sender, 1)
    sender, _ = sender_of(log, store)  # the next writer
    log.append({"do": "log", "run": "a", "rows": points[333:]})
    log.append({"do": "finish", "run": "a", "series": {"loss": [399, 400]}, "tags": {}, "at": 9})
    tries(sender, 1)
    assert store.points == expected


def test_the_names_of_a_run_that_ended_are_claimed_again(log: OperationLog) -> None:
    begin(log, "a")
    log.append({"do": "log", "run": "a", "rows": [*rows(range(2), "b"), *rows(range(2), "a")]})
    series = {"b": [1, 2], "a": [1, 2]}
    log.append({"do": "finish", "run": "a", "series": series, "tags": {}, "at": 9})
    store = FussyStore()
    sender, _ = sender_of(log, store)
    tries(sender, 1)
    log.append({"do": "resume", "run": "a", "series": series, "tags": {}})
    log.append({"do": "log", "run": "a", "rows": rows(range(2, 4), "c")})
    tries(sender, 1)
    assert store.names == {"a": ["b", "a"]}, "before those of the new operation"


def test_a_flush_does_not_wait_for_what_is_refused(log: OperationLog) -> None:
    begin(log, "a", bad=1, good=2)
    store = FussyStore(lambda o: "bad" in o.get("params", {}))
    sender, refusals = sender_of(log, store, patience=1)
    assert tries(sender, 1) == 1
    assert "bad" in (refusals.line() or "")


def test_runs_that_ended_take_no_memory(log: OperationLog) -> None:
    store = FussyStore()
    sender, _ = sender_of(log, store)

    def train(number: int) -> None:
        key = f"sweep/{number:04d}"
        begin(log, key)
        for name in range(17):
            log.append({"do": "log", "run": key, "rows": rows(range(50), f"metric {name}")})
        series = {f"metric {name}": [49, 50] for name in range(17)}
        ended = {"do": "finish", "run": key, "series": series, "tags": {}, "at": 9}
        log.append(ended)
        cost = {"do": "log", "run": key, "series": series, "rows": rows(range(1), "cost")}
        log.append(cost)
        tries(sender, 1)
        assert len(store.points) == 17 * 50 + 1
        store.taken.clear()

    assert kept_bytes(train, 10) < 3000, "bytes"
