"""All that is private to MLflow and used here, read in MLflow 3.17.2.

`tests/trainers/tracking/test_mlflow_internals.py` fails when another release has another shape.
"""

import contextlib
import math
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

EXPERIMENT_KIND_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tags of an experiment of training runs. Without them MLflow's pages open on its tools for
language-model traces (3.17.2: the names stand in the JavaScript of `mlflow/server/js/build`)."""

ARTIFACT_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Tables and columns of a store that hold the place of an artifact, in full (3.17.2:
`mlflow.store.tracking.dbmodels.models` and `mlflow.store.model_registry.dbmodels.models`)."""


def replace_places(file: Path, old: str, new: str) -> int:
    """Replace the beginning of every artifact's place in a SQLite store, in one transaction.

    Returns the number of places. MLflow has no request for it.
    """
    changed = 0
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        for table, column in ARTIFACT_PLACES:
            changed += database.execute(
                f"UPDATE {table} SET {column} = ?1 || substr({column}, length(?2) + 1) "
                f"WHERE {column} = ?2 OR substr({column}, 1, length(?2) + 1) = ?2 || '/'",
                (new, old),
            ).rowcount
    return changed


def create_sqlite_tables(file: Path, artifacts: Path) -> None:
    """Create a store with all its tables in a new SQLite file, and close it.

    `MlflowClient` would do it too, but keeps the connection open, and the file is renamed
    afterwards (3.17.2: `mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore`).
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{file}", artifacts.as_uri()).engine.dispose()


def schema_heads() -> frozenset[str]:
    """The revisions in the `alembic_version` table of a database of the installed MLflow.

    MLflow publishes the number nowhere but in its Alembic migrations (3.17.2: the package's folder
    `store/db_migrations/versions`), each of which names itself and the one before it. They are
    read as text: Alembic would import them, and with them MLflow, which takes 3 s of CPU time.
    """
    text = "\n".join(path.read_text() for path in (migrations() / "versions").glob("*.py"))
    revisions = set(re.findall(r'^revision = "(\w+)"', text, re.MULTILINE))
    return frozenset(revisions - set(re.findall(r'^down_revision = "(\w+)"', text, re.MULTILINE)))


@contextlib.contextmanager
def requirements_unchecked() -> Iterator[None]:
    """In here a model is saved without a check that its requirements are installed.

    Ours are pinned to what is installed. For the check MLflow reads the list of files of every
    installed package, 1 s of CPU time, whatever is said of requirements or of an environment
    (3.17.2: `mlflow.utils.environment` calls `warn_dependency_requirement_mismatches`).
    """
    from mlflow.utils import environment

    check = environment.warn_dependency_requirement_mismatches
    environment.warn_dependency_requirement_mismatches = lambda requirements: None
    try:
        yield
    finally:
        environment.warn_dependency_requirement_mismatches = check


def migrations() -> Path:
    """The folder of MLflow's Alembic migrations; does not import MLflow."""
    package = find_spec("mlflow")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "store" / "db_migrations"


@dataclass
class RunChange:
    """What is new of a run."""

    run_id: str
    name: str = ""
    start_ms: int | None = None
    """Its start if it is new, None if MLflow has it already."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    """Name, value, step and timestamp."""
    status: str | None = None
    end_ms: int | None = None


class SqlRuns:
    """Writes runs into MLflow's database, many of them in one transaction.

    A call of MLflow's client is four transactions of objects, 10 to 30 ms of the CPU; a short trial
    needs five calls. The rows are the same (3.17.2: `mlflow.store.tracking.sqlalchemy_store`).
    """

    def __init__(self, client: Any, experiment_id: str) -> None:
        """Raises TypeError if the client's store is no database that this process opened."""
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        store = client._tracking_client.store
        if type(store) is not SqlAlchemyStore:
            raise TypeError(f"{type(store).__name__} is no SQL store")
        self._store, self._experiment_id = store, int(experiment_id)
        self._artifacts = client.get_experiment(experiment_id).artifact_location

    def write(self, changes: Sequence[RunChange]) -> None:
        """Write changes of different runs; all or, with an error, nothing.

        Raises RuntimeError if the experiment or a run is deleted or is not there.
        """
        new = [change for change in changes if change.start_ms is not None]
        known = [change for change in changes if change.start_ms is None]
        with self._store.ManagedSessionMaker(read_only=False) as session:
            self._check_active(session, [change.run_id for change in known])
            _insert(session, "SqlRun", [self._run_row(change) for change in new])
            for change in known:
                self._update_run(session, change)
            _insert(session, "SqlParam", _rows(new, "params"))
            _insert(session, "SqlTag", _rows(new, "tags"))
            self._merge_tags(session, known)
            metrics = [row for change in changes for row in _metric_rows(change)]
            _insert(session, "SqlMetric", metrics)
            self._merge_latest(session, known, metrics)

    def _run_row(self, change: RunChange) -> dict[str, Any]:
        from mlflow.utils.uri import append_to_uri_path

        return {
            "run_uuid": change.run_id,
            "name": change.name,
            "artifact_uri": append_to_uri_path(self._artifacts, change.run_id, "artifacts"),
            "experiment_id": self._experiment_id,
            "source_type": "UNKNOWN",
            "source_name": "",
            "entry_point_name": "",
            "source_version": "",
            "user_id": "unknown",
            "status": change.status or "RUNNING",
            "start_time": change.start_ms,
            "end_time": change.end_ms,
            "deleted_time": None,
            "lifecycle_stage": "active",
        }

    def _check_active(self, session: Any, run_ids: list[str]) -> None:
        from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlRun
        from sqlalchemy import select

        stage = select(SqlExperiment.lifecycle_stage).where(
            SqlExperiment.experiment_id == self._experiment_id
        )
        active = select(SqlRun.run_uuid).where(
            SqlRun.run_uuid.in_(run_ids), SqlRun.lifecycle_stage == "active"
        )
        if session.execute(stage).scalar() != "active":
            raise RuntimeError("the experiment is deleted")
        if set(run_ids) - set(session.execute(active).scalars()):
            raise RuntimeError("a run is deleted")

    def _update_run(self, session: Any, change: RunChange) -> None:
        from mlflow.store.tracking.dbmodels.models import SqlRun
        from sqlalchemy import update

        values = {"status": change.status, "end_time": change.end_ms}
        changed = {name: value for name, value in values.items() if value is not None}
        if changed:
            run = update(SqlRun).where(SqlRun.run_uuid == change.run_id)
            session.execute(run.values(**changed))

    def _merge_tags(self, session: Any, changes: list[RunChange]) -> None:
        from mlflow.store.tracking.dbmodels.models import SqlTag
        from sqlalchemy import select, update

        rows = _rows(changes, "tags")
        if not rows:
            return
        ids, keys = {row["run_uuid"] for row in rows}, {row["key"] for row in rows}
        query = select(SqlTag.run_uuid, SqlTag.key).where(
            SqlTag.run_uuid.in_(ids), SqlTag.key.in_(keys)
        )
        there = {tuple(row) for row in session.execute(query)}
        _insert(session, "SqlTag", [r for r in rows if (r["run_uuid"], r["key"]) not in there])
        for row in rows:
            if (row["run_uuid"], row["key"]) in there:
                tag = update(SqlTag).where(
                    SqlTag.run_uuid == row["run_uuid"], SqlTag.key == row["key"]
                )
                session.execute(tag.values(value=row["value"]))

    def _merge_latest(
        self, session: Any, known: list[RunChange], metrics: list[dict[str, Any]]
    ) -> None:
        """Keep the newest point of each series, by step, time and value, as MLflow does."""
        from mlflow.store.tracking.dbmodels.models import SqlLatestMetric
        from sqlalchemy import select, update

        newest: dict[tuple[str, str], dict[str, Any]] = {}
        for row in metrics:
            series = row["run_uuid"], row["key"]
            if series not in newest or _age(row) > _age(newest[series]):
                newest[series] = row
        ids = [change.run_id for change in known if change.metrics]
        columns = SqlLatestMetric.__table__.columns
        there = {
            (row.run_uuid, row.key): row._asdict()
            for row in session.execute(select(*columns).where(SqlLatestMetric.run_uuid.in_(ids)))
        }
        _insert(session, "SqlLatestMetric", [r for s, r in newest.items() if s not in there])
        for (run_id, key), row in newest.items():
            before = there.get((run_id, key))
            if before is not None and _age(row) > _age(before):
                latest = update(SqlLatestMetric).where(
                    SqlLatestMetric.run_uuid == run_id, SqlLatestMetric.key == key
                )
                changed = {n: row[n] for n in ("value", "step", "timestamp", "is_nan")}
                session.execute(latest.values(**changed))


def _age(metric: Mapping[str, Any]) -> tuple[int, int, float]:
    return metric["step"], metric["timestamp"], metric["value"]


def _rows(changes: Iterable[RunChange], kind: str) -> list[dict[str, Any]]:
    return [
        {"run_uuid": change.run_id, "key": key, "value": value}
        for change in changes
        for key, value in getattr(change, kind).items()
    ]


def _metric_rows(change: RunChange) -> list[dict[str, Any]]:
    """The rows of a run's metrics; NaN is 0 with a mark, and a point that is there twice is one."""
    unique = {
        (key, timestamp_ms, step, 0.0 if math.isnan(value) else value, math.isnan(value))
        for key, value, step, timestamp_ms in change.metrics
    }
    names = ("key", "timestamp", "step", "value", "is_nan")
    return [{"run_uuid": change.run_id, **dict(zip(names, each, strict=True))} for each in unique]


def _insert(session: Any, model: str, rows: list[dict[str, Any]]) -> None:
    from mlflow.store.tracking.dbmodels import models

    if rows:
        session.execute(getattr(models, model).__table__.insert(), rows)
