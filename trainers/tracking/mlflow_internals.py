"""All that is private to MLflow and used here, read in MLflow 3.17.2.

`tests/trainers/tracking/test_mlflow_internals.py` fails when another release has another shape.
"""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from cluster.base.files import cache_folder, write_atomic

EXPERIMENT_KIND_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tags of an experiment of training runs. Without them MLflow's pages open on its tools for
language-model traces (3.17.2: the names stand in the JavaScript of `mlflow/server/js/build`)."""


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
    `store/db_migrations`). Alembic imports the migrations, and they import MLflow, which takes 3 s
    of CPU time. So the answer is kept in the user's cache folder, by MLflow's version.
    """
    known = cache_folder() / f"mlflow-{version('mlflow')}-schema"
    if not known.exists():
        from alembic.script import ScriptDirectory

        write_atomic(known, "\n".join(ScriptDirectory(str(migrations())).get_heads()))
    return frozenset(known.read_text().split())


def migrations() -> Path:
    """The folder of MLflow's Alembic migrations; does not import MLflow."""
    package = find_spec("mlflow")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "store" / "db_migrations"
