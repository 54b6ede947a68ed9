"""Operations that are written in one transaction leave the rows that MLflow's client leaves."""

import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainers.tracking.mlflow_internals import create_sqlite_tables
from trainers.tracking.mlflow_store import MlflowStore
from trainers.tracking.operation_log import MetricPoint

Operation = dict[str, Any]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    create_sqlite_tables(folder / "mlflow.db", folder / "mlartifacts")
    return folder / "mlflow.db"


@pytest.fixture
def store_in(tmp_path: Path, empty: Path) -> Callable[[str], MlflowStore]:
    """A store in a database of this name."""

    def make(name: str) -> MlflowStore:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mlflow.db").write_bytes(empty.read_bytes())
        return MlflowStore(f"sqlite:///{tmp_path / name / 'mlflow.db'}", "experiment")

    return make


def start(key: str, parent: str | None = None, **params: Any) -> Operation:
    tags = {"heliostat.kind": "trial", "note": f"of {key}"}
    return {
        "do": "start", "key": key, "id": f"id-{key}", "params": params, "tags": tags,
        "parent": parent, "at": 1000,
    }  # fmt: skip


def log(run: str, *points: tuple[str, float, int, int]) -> Operation:
    return {"do": "log", "run": run, "rows": [MetricPoint(*point) for point in points]}


def finish(run: str, status: str = "FINISHED", **tags: str) -> Operation:
    return {"do": "finish", "run": run, "status": status, "tags": tags, "at": 2000}


def prepare(store: MlflowStore, operations: list[Operation]) -> None:
    """What the tracker does when it takes these operations."""
    for operation in operations:
        if operation["do"] == "start":
            store.new_runs.add(operation["key"])
            store.run_tags[operation["key"]] = operation["id"]


def rows(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All of MLflow's rows about runs, with the names of runs in place of their ids."""
    columns = {
        "runs": "name, status, start_time, end_time, lifecycle_stage, user_id, source_type, "
        "source_name, entry_point_name, source_version, deleted_time, artifact_uri",
        "params": "key, value",
        "tags": "key, value",
        "metrics": "key, value, step, timestamp, is_nan",
        "latest_metrics": "key, value, step, timestamp, is_nan",
    }
    with sqlite3.connect(folder / "mlflow.db") as database:
        names = dict(database.execute("SELECT run_uuid, name FROM runs").fetchall())
        found = {
            table: database.execute(f"SELECT run_uuid, {wanted} FROM {table}").fetchall()
            for table, wanted in columns.items()
        }
    return {
        table: sorted(
            (tuple(_without_ids(cell, names, folder) for cell in row) for row in each), key=repr
        )
        for table, each in found.items()
    }


def _without_ids(cell: Any, names: dict[str, str], folder: Path) -> Any:
    if not isinstance(cell, str):
        return cell
    for run_id, name in names.items():
        cell = cell.replace(run_id, name)
    return cell.replace(folder.name, "folder")


GROUPS: list[list[Operation]] = [
    [
        start("s", lr=0.1, **{"model.width": 8}),
        {"do": "made", "key": "s", "id": "known already"},
        start("s/0000", "s", lr=0.5, words="a b", nothing=None),
        log("s/0000", ("val/loss", 0.5, 3, 1500), ("val/loss", 0.25, 6, 1600)),
        log("s/0000", ("train/loss", math.nan, 3, 1500), ("val/loss", 0.25, 6, 1600)),
        finish("s/0000", **{"mlflow.note.content": "**Complete**", "note": "another"}),
        start("s/0001", "s"),
        log("s/0001", ("val/loss", 4.0, 9, 1500)),
    ],
    [
        log("s/0001", ("val/loss", 3.0, 8, 1900), ("val/acc", 0.5, 8, 1900)),
        {"do": "tag", "run": "s/0001", "tags": {"note": "third", "new": "1"}},
        finish("s/0001", "FAILED", **{"heliostat.reason": "none"}),
        log("s/0000", ("cost_usd", 1.5, 60, 3000)),
        {"do": "resume", "run": "s/0001", "tags": {"note": "fourth"}},
        log("s/0001", ("val/loss", 2.0, 10, 2100)),
    ],
]


def test_the_rows_are_those_of_mlflows_client(store_in: Any, tmp_path: Path) -> None:
    bulk, client = store_in("bulk"), store_in("client")
    for operations in GROUPS:
        prepare(bulk, operations)
        prepare(client, operations)
        count = len(operations)
        if {"resume"} & {operation["do"] for operation in operations}:  # it deletes tags
            count = next(n for n, each in enumerate(operations) if each["do"] == "resume")
        assert bulk.send_in_bulk(operations) == count
        for operation in operations[count:]:
            bulk.send(operation)
        for operation in operations:
            client.send(operation)
        assert rows(tmp_path / "bulk") == rows(tmp_path / "client")
    assert bulk.read_run("s/0001")["metrics"] == client.read_run("s/0001")["metrics"]


@pytest.mark.parametrize(
    "needs_more",
    [
        log("s", ("val/loss", math.inf, 1, 1500)),
        log("s", ("val loss?", 1.0, 1, 1500)),
        log("s", ("val/loss", 1.0, 2**70, 1500)),
        {"do": "tag", "run": "s", "tags": {"long": "x" * 6000}},
        start("long", text="x" * 7000),
        start("not new"),
        {"do": "artifact", "run": "s", "path": "somewhere"},
        log("unknown", ("val/loss", 1.0, 1, 1500)),
    ],
)
def test_what_needs_more_than_rows_is_left_to_the_client(
    needs_more: Operation, store_in: Any, tmp_path: Path
) -> None:
    store = store_in("bulk")
    operations = [start("s"), log("s", ("a", 1.0, 1, 1500)), needs_more, finish("s")]
    prepare(store, operations)
    store.new_runs.discard("not new")
    assert store.send_in_bulk(operations) in (0, 2)
    written = rows(tmp_path / "bulk")
    assert [run[2] for run in written["runs"]] in ([], ["RUNNING"])


def test_of_a_transaction_that_fails_nothing_is_written(store_in: Any, tmp_path: Path) -> None:
    """The client then sends all of it, or finds out what is wrong."""
    store, operations = store_in("bulk"), GROUPS[0]
    prepare(store, operations)
    assert store.send_in_bulk(operations) == len(operations)
    before = rows(tmp_path / "bulk")
    again = [log("s/0001", ("val/loss", 4.0, 9, 1500)), finish("s/0001")]  # as after a crash
    assert store.send_in_bulk(again) == 0
    assert rows(tmp_path / "bulk") == before
    for operation in again:
        store.send(operation)
    run_id = store.run_ids["s/0001"]
    store._client().delete_run(run_id)
    assert store.send_in_bulk([log("s/0001", ("b", 1.0, 1, 1)), finish("s/0000")]) == 0


def test_a_server_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MlflowStore, "_client", lambda self: _Server())
    store = MlflowStore("http://127.0.0.1:9", "experiment")
    prepare(store, GROUPS[0])
    assert store.send_in_bulk(GROUPS[0]) == 0
    assert not store.run_ids


class _Server:
    """The part of MLflow's client that is looked at."""

    class _tracking_client:  # noqa: N801 -- MLflow's name
        store = object()
