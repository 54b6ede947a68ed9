"""The private parts of MLflow that are used have the shape in which they were read (3.17.2)."""

import shutil
import sqlite3
from pathlib import Path

import mlflow
import pytest
from alembic.script import ScriptDirectory
from mlflow.utils import requirements_utils

from trainers.tracking.mlflow_internals import (
    ARTIFACT_PLACES,
    EXPERIMENT_KIND_TAGS,
    create_sqlite_tables,
    migrations,
    replace_places,
    requirements_unchecked,
    schema_heads,
)

READ_IN = "MLflow 3.17.2; see trainers/tracking/mlflow_internals.py"


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    create_sqlite_tables(folder / "mlflow.db", folder / "artifacts")
    return folder / "mlflow.db"


def test_a_new_store_is_at_the_head_of_the_migrations(new_store: Path) -> None:
    with sqlite3.connect(new_store) as database:
        found = database.execute("SELECT version_num FROM alembic_version").fetchall()
    assert {row[0] for row in found} == schema_heads(), f"another shape than in {READ_IN}"
    assert not list(new_store.parent.glob("*-journal")), "the store is still open"


def test_the_heads_of_the_migrations_are_those_that_alembic_finds() -> None:
    heads = ScriptDirectory(str(migrations())).get_heads()
    assert schema_heads() == set(heads), f"another shape than in {READ_IN}"


def test_the_places_of_artifacts_are_in_known_columns(new_store: Path, tmp_path: Path) -> None:
    """`heliostat track relocate` replaces the beginning of each, and nothing else."""
    file = Path(shutil.copy(new_store, tmp_path))
    with sqlite3.connect(file) as database:
        tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master")]
        columns = {
            (table, row[1])
            for table in tables
            for row in database.execute(f"PRAGMA table_info({table})")
        }
        places = {c for c in columns if c[1].startswith(("artifact_", "storage_location"))}
        assert places - {("traces", "artifact_uri")} <= set(ARTIFACT_PLACES) <= columns, (
            f"another shape than in {READ_IN}"
        )
        for name, place in (("a", "/old"), ("b", "/old/7"), ("c", "/older/7"), ("d", "s3://x/old")):
            database.execute(
                "INSERT INTO experiments (name, artifact_location) VALUES (?, ?)", (name, place)
            )
    database.close()
    assert replace_places(file, "/old", "/new") == 2
    with sqlite3.connect(file) as database:
        found = dict(database.execute("SELECT name, artifact_location FROM experiments"))
    del found["Default"]
    assert found == {"a": "/new", "b": "/new/7", "c": "/older/7", "d": "s3://x/old"}


def test_a_model_is_saved_without_a_look_through_all_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(name: str) -> dict[str, str]:
        mlflow.pyfunc.save_model(
            tmp_path / name, loader_module="json", pip_requirements=["numpy==1.2.3", "filelock"]
        )
        return {
            path.name: path.read_text()
            for path in (tmp_path / name).iterdir()
            if path.name != "MLmodel"  # it has the time and a random number
        }

    looked_through: list[bool] = []

    def look() -> dict[str, list[str]]:
        looked_through.append(True)
        return {}

    monkeypatch.setattr(requirements_utils, "_MODULES_TO_PACKAGES", None)
    monkeypatch.setattr(requirements_utils.importlib_metadata, "packages_distributions", look)
    with requirements_unchecked():
        files = save("unchecked")
    assert not looked_through, f"another function looks than in {READ_IN}"
    assert save("checked") == files
    assert looked_through, f"nothing looks any more as in {READ_IN}: requirements_unchecked can go"


def test_the_kind_of_an_experiment_is_one_that_mlflows_pages_know() -> None:
    built = Path(mlflow.__file__).parent / "server" / "js" / "build"
    words = {word for tag in EXPERIMENT_KIND_TAGS.items() for word in tag}
    for path in built.rglob("*.js"):
        text = path.read_text(errors="replace")
        words -= {word for word in words if word in text}
    assert not words, f"gone since {READ_IN}: {words}"
