"""All that is private to MLflow and used here, read in MLflow 3.17.2.

`tests/trainers/tracking/test_mlflow_internals.py` fails when another release has another shape.
"""

import contextlib
import re
import sqlite3
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

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
