"""The private parts of MLflow that are used have the shape in which they were read (3.17.2)."""

import sqlite3
from pathlib import Path

import mlflow
from alembic.script import ScriptDirectory

from trainers.tracking.mlflow_internals import (
    EXPERIMENT_KIND_TAGS,
    create_sqlite_tables,
    migrations,
    schema_heads,
)

READ_IN = "MLflow 3.17.2; see trainers/tracking/mlflow_internals.py"


def test_a_new_store_is_at_the_head_of_the_migrations(tmp_path: Path) -> None:
    create_sqlite_tables(tmp_path / "mlflow.db", tmp_path / "artifacts")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        found = database.execute("SELECT version_num FROM alembic_version").fetchall()
    assert {row[0] for row in found} == schema_heads(), f"another shape than in {READ_IN}"
    assert not list(tmp_path.glob("*-journal")), "the store is still open"


def test_the_heads_of_the_migrations_are_those_that_alembic_finds() -> None:
    heads = ScriptDirectory(str(migrations())).get_heads()
    assert schema_heads() == set(heads), f"another shape than in {READ_IN}"


def test_the_kind_of_an_experiment_is_one_that_mlflows_pages_know() -> None:
    built = Path(mlflow.__file__).parent / "server" / "js" / "build"
    words = {word for tag in EXPERIMENT_KIND_TAGS.items() for word in tag}
    for path in built.rglob("*.js"):
        text = path.read_text(errors="replace")
        words -= {word for word in words if word in text}
    assert not words, f"gone since {READ_IN}: {words}"
