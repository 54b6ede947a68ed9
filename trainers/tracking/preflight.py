"""Whether MLflow answers and grants access, and where it keeps artifacts: asked before a run.

MLflow is not imported for it.
"""

import base64
import configparser
import contextlib
import json
import os
import re
import sqlite3
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.base.errors import SpecError
from trainers.tracking.mlflow_internals import schema_heads

TIMEOUT_S = 5.0
REVISIONS = "SELECT version_num FROM alembic_version"
ARTIFACT_LOCATION = "SELECT artifact_location FROM experiments WHERE name = ?"
ARTIFACTS = "mlartifacts"
"""The folder of artifacts beside a SQLite store."""
PACKAGES = {
    "s3": "boto3",
    "gs": "google.cloud.storage",
    "wasbs": "azure.storage.blob",
    "abfss": "azure.storage.filedatalake",
}
"""Scheme of an artifact location -> the package that MLflow needs for it."""
TRAINING_GOES_ON = "training begins, and MLflow is told when it answers"


def mask_password(text: str) -> str:
    """The text with the password of each URL in it replaced by ***."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:***@", text)


def check_access(uri: str, experiment: str) -> str | None:
    """None when MLflow answers and grants access; one line when it cannot be reached now.

    Raises SpecError where trying again would not help: wrong credentials, a database that must be
    upgraded first, a folder that cannot be written.
    """
    scheme = uri.partition(":")[0]
    if scheme in ("http", "https"):
        return _check_server(uri.rstrip("/"), experiment)
    if "://" in uri and scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
        return _check_database(uri)
    if scheme.startswith("databricks"):
        return None
    raise SpecError(
        f"tracking.uri: must be http(s)://..., sqlite:///... or postgresql://... (got {uri!r})"
    )


def notices(uri: str, experiment: str) -> list[str]:
    """Lines on what this MLflow cannot do for a run, which begins all the same.

    To be asked after `check_access`. What MLflow does not answer is left out.
    """
    found: list[str] = []
    if uri.startswith(("http://", "https://")) and not _is_signed():
        version = _version(uri.rstrip("/"))
        if version and int(version.partition(".")[0]) < 3:
            found.append(
                f"MLflow at {mask_password(uri)} is {version}: a model is kept among the artifacts "
                "of its run, as runs:/RUN_ID/model"
            )
    location = _artifact_location(uri, experiment)
    problem = artifact_problem(uri, location) if location else None
    return [*found, f"{problem}; metrics are kept, and files wait"] if problem else found


def artifact_problem(uri: str, location: str) -> str | None:
    """Why the artifacts of an experiment with this location cannot be kept; None if they can."""
    path = _local_path(location)
    scheme = location.partition(":")[0]
    if path is None:
        if scheme == "mlflow-artifacts" and not uri.startswith("http"):
            return f"artifacts go to {location}, for which tracking.uri must be that of a server"
        package = PACKAGES.get(scheme)
        if package and find_spec(package.partition(".")[0]) is None:
            return f"artifacts go to {location}, for which the package {package} must be installed"
        return None
    old, file = moved_artifacts(uri, location), sqlite_file(uri)
    if old is not None:
        return (
            f"{file} was moved or copied, and its artifacts are in {old}; to have them beside it: "
            f"heliostat track relocate --uri {uri}"
        )
    place = next(place for place in (path, *path.parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return f"artifacts go to {path}, and {place} cannot be written"
    return None


def moved_artifacts(uri: str, location: str) -> Path | None:
    """The folder of a SQLite store's artifacts, if it is not beside the store any more.

    Both were made together (`mlflow_store.create_database`), and then moved or copied; MLflow
    writes the place of each artifact in full.
    """
    file, path = sqlite_file(uri), _local_path(location)
    if file is None or path is None:
        return None
    for root in (path, *path.parents):
        if root.name == ARTIFACTS and not _is_same(root.parent, file.parent):
            return root
    return None


def moved_roots(uri: str) -> dict[str, str]:
    """Beginnings of places in a SQLite store that was moved -> what they should be; else empty."""
    file, found = sqlite_file(uri), {}
    if file is None or not file.exists():
        return {}
    with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        rows = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    for (location,) in rows:
        root, path = moved_artifacts(uri, location or ""), _local_path(location or "")
        if root is not None and path is not None:
            below = len(path.relative_to(root).parts)
            new = file.parent / ARTIFACTS
            is_uri = location.startswith("file:")
            found[location.rsplit("/", below)[0]] = new.as_uri() if is_uri else str(new)
    return found


def _is_same(one: Path, other: Path) -> bool:
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def _local_path(location: str) -> Path | None:
    """The path of a location on this machine; None for another kind of place."""
    parts = urllib.parse.urlsplit(location)
    return Path(urllib.parse.unquote(parts.path)) if parts.scheme in ("", "file") else None


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Where an experiment's artifacts go; None where it is unknown, or new."""
    file = sqlite_file(uri)
    if file is not None and file.exists():
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database,
        ):
            row = database.execute(ARTIFACT_LOCATION, (experiment,)).fetchone()
            return row[0] if row else None
    if uri.startswith(("http://", "https://")) and not _is_signed():
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(_experiment(uri.rstrip("/"), experiment)["artifact_location"])
    return None


def _is_signed() -> bool:
    """Whether requests are signed by MLflow's plug-ins."""
    return bool({"MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_AUTH"} & os.environ.keys())


def _version(uri: str) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        version = _answer(uri, f"{uri}/version").decode().strip()
        return version if re.match(r"\d+\.\d+", version) else None
    return None


def _experiment(uri: str, experiment: str) -> dict[str, Any]:
    query = urllib.parse.urlencode({"experiment_name": experiment})
    address = f"{uri}/api/2.0/mlflow/experiments/get-by-name?{query}"
    found: dict[str, Any] = json.loads(_answer(uri, address))["experiment"]
    return found


def _answer(uri: str, address: str) -> bytes:
    request = urllib.request.Request(address, headers=auth_headers(os.environ))
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=_tls_context(uri)) as answer:
        return bytes(answer.read())


def _check_server(uri: str, experiment: str) -> str | None:
    if _is_signed():
        return None
    shown = mask_password(uri)
    try:
        found = _experiment(uri, experiment)
    except urllib.error.HTTPError as error:
        body = error.read(2000).decode(errors="replace")
        if error.code in (401, 403):
            raise SpecError(
                f"tracking.uri: {shown} refuses access ({error.code}: {_first_line(body)}); see "
                "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD and MLFLOW_TRACKING_TOKEN"
            ) from None
        if "RESOURCE_DOES_NOT_EXIST" in body:
            return None
        return f"MLflow at {shown} answers {error.code}; {TRAINING_GOES_ON}"
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "reason", None) or error
        return (
            f"MLflow at {shown} cannot be reached ({_first_line(str(reason))}); {TRAINING_GOES_ON}"
        )
    if found.get("lifecycle_stage") == "deleted":
        raise SpecError(deleted_experiment_message(experiment, found["experiment_id"]))
    return None


def deleted_experiment_message(experiment: str, experiment_id: str) -> str:
    """The error message for an experiment that was deleted in MLflow."""
    return (
        f"tracking.experiment: {experiment!r} was deleted; choose another, or "
        f"mlflow experiments restore --experiment-id {experiment_id}"
    )


def auth_headers(environment: Mapping[str, str]) -> dict[str, str]:
    """The header that MLflow would send, by environment variables or ~/.mlflow/credentials."""
    file = configparser.ConfigParser(interpolation=None)
    file.read(Path.home() / ".mlflow" / "credentials")
    kept = file["mlflow"] if file.has_section("mlflow") else {}
    user = environment.get("MLFLOW_TRACKING_USERNAME") or kept.get("mlflow_tracking_username")
    password = environment.get("MLFLOW_TRACKING_PASSWORD") or kept.get("mlflow_tracking_password")
    if user and password:
        pair = base64.b64encode(f"{user}:{password}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}
    token = environment.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _tls_context(uri: str) -> ssl.SSLContext | None:
    if not uri.startswith("https"):
        return None
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("1", "true"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _check_database(uri: str) -> str | None:
    file, shown = sqlite_file(uri), mask_password(uri)
    try:
        revisions = _revisions_of_file(file) if file else _revisions_of_server(uri)
    except ConnectionError as error:
        return f"MLflow's database {shown} cannot be reached ({error}); {TRAINING_GOES_ON}"
    if revisions and revisions != schema_heads():
        raise SpecError(
            f"tracking.uri: {shown} was made by another version of MLflow; keep a copy of "
            f"it, then run: mlflow db upgrade '{shown}'"
        )
    return None


def _revisions_of_file(file: Path) -> frozenset[str]:
    """The schema revisions of a SQLite store; empty where there is no store yet."""
    place = file if file.exists() else file.parent
    if not os.access(place, os.W_OK):
        raise SpecError(f"tracking.uri: {place} cannot be written")
    if not file.exists():
        return frozenset()
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute(REVISIONS).fetchall()
    except sqlite3.OperationalError:  # no such table
        return frozenset()
    except sqlite3.DatabaseError as error:
        raise SpecError(f"tracking.uri: {file}: {error}") from None
    return frozenset(str(row[0]) for row in found)


def _revisions_of_server(uri: str) -> frozenset[str]:
    """The schema revisions of another database; ConnectionError when it does not answer."""
    import sqlalchemy

    options = {"connect_timeout": int(TIMEOUT_S)} if uri.startswith("postgres") else {}
    try:
        engine = sqlalchemy.create_engine(uri, connect_args=options)
        with engine.connect() as connection:
            if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                return frozenset()
            return frozenset(map(str, connection.execute(sqlalchemy.text(REVISIONS)).scalars()))
    except ModuleNotFoundError as error:
        shown = mask_password(uri)
        raise SpecError(f"tracking.uri: {shown} needs the package {error.name}") from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = _first_line(str(getattr(error, "orig", error)))
        # A Postgres server's own answers begin with FATAL, also while it starts.
        refused = "FATAL" in reason and "starting up" not in reason
        if isinstance(error, sqlalchemy.exc.OperationalError) and not refused:
            raise ConnectionError(reason) from None
        raise SpecError(f"tracking.uri: {mask_password(uri)} refuses access: {reason}") from None


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for other stores, and for one in memory."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if not uri.startswith("sqlite:///") or path in ("", ":memory:"):
        return None
    return Path(path).absolute()


def _first_line(text: str) -> str:
    """The first line of another program's message, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"
