"""Whether MLflow is there and lets us in: asked first, without loading MLflow."""

import base64
import configparser
import contextlib
import importlib.util
import json
import os
import re
import sqlite3
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from cluster.base.errors import SpecError

TIMEOUT_S = 5.0
TRAINING_GOES_ON = "training begins, and MLflow is told when it answers"


def mask_password(text: str) -> str:
    """Without the password of an address."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:***@", text)


def check_access(uri: str, experiment: str) -> str | None:
    """None when MLflow answers and lets us in; one line when it cannot be reached now.

    Raises SpecError where trying again would not help: wrong credentials, a database that has to
    be upgraded first, a folder that cannot be written.
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


def _check_server(uri: str, experiment: str) -> str | None:
    if {"MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_AUTH"} & os.environ.keys():
        return None  # MLflow's own ways to sign a request
    query = urllib.parse.urlencode({"experiment_name": experiment})
    address = f"{uri}/api/2.0/mlflow/experiments/get-by-name?{query}"
    request = urllib.request.Request(address, headers=auth_headers(os.environ))
    shown = mask_password(uri)
    try:
        with urllib.request.urlopen(
            request, timeout=TIMEOUT_S, context=_tls_context(uri)
        ) as answer:
            found = json.loads(answer.read())["experiment"]
    except urllib.error.HTTPError as error:
        body = error.read(2000).decode(errors="replace")
        if error.code in (401, 403):
            raise SpecError(
                f"tracking.uri: {shown} refuses us ({error.code}: {_first_line(body)}); see "
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
    """What to do about an experiment that somebody has deleted."""
    return (
        f"tracking.experiment: {experiment!r} was deleted; choose another, or "
        f"mlflow experiments restore --experiment-id {experiment_id}"
    )


def auth_headers(environment: Mapping[str, str]) -> dict[str, str]:
    """The header that MLflow would send: by environment variables, else ~/.mlflow/credentials."""
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
    file = sqlite_file(uri)
    try:
        version = _schema_revision_of_file(file) if file else _schema_revision_of_server(uri)
    except ConnectionError as error:
        return f"MLflow's database {mask_password(uri)} cannot be reached ({error}); {TRAINING_GOES_ON}"
    if version is not None and version != latest_schema_revision():
        raise SpecError(
            f"tracking.uri: {mask_password(uri)} was made by another version of MLflow; keep a copy of "
            f"it, then run: mlflow db upgrade '{mask_password(uri)}'"
        )
    return None


def _schema_revision_of_file(file: Path) -> str | None:
    """The revision of a SQLite store; None where there is none yet."""
    place = file if file.exists() else file.parent
    if not os.access(place, os.W_OK):
        raise SpecError(f"tracking.uri: {place} cannot be written")
    if not file.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError:  # no such table
        return None
    except sqlite3.DatabaseError as error:
        raise SpecError(f"tracking.uri: {file}: {error}") from None
    return str(found[0]) if found else None


def _schema_revision_of_server(uri: str) -> str | None:
    """The revision of another database; ConnectionError when it does not answer."""
    import sqlalchemy

    options = {"connect_timeout": int(TIMEOUT_S)} if uri.startswith("postgres") else {}
    try:
        engine = sqlalchemy.create_engine(uri, connect_args=options)
        with engine.connect() as connection:
            if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                return None
            query = sqlalchemy.text("SELECT version_num FROM alembic_version")
            return str(connection.execute(query).scalar() or "") or None
    except ModuleNotFoundError as error:
        raise SpecError(
            f"tracking.uri: {mask_password(uri)} needs the package {error.name}"
        ) from None
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = _first_line(str(getattr(error, "orig", error)))
        # FATAL is what a server of Postgres says itself, also while it starts.
        refused = "FATAL" in reason and "starting up" not in reason
        if isinstance(error, sqlalchemy.exc.OperationalError) and not refused:
            raise ConnectionError(reason) from None
        raise SpecError(f"tracking.uri: {mask_password(uri)} refuses us: {reason}") from None


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for other stores, and for one in memory."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    if not uri.startswith("sqlite:///") or path in ("", ":memory:"):
        return None
    return Path(path).absolute()


def latest_schema_revision() -> str:
    """The revision of a database that the installed MLflow works with.

    Alembic's migrations name the one that they follow; the newest is followed by none.
    """
    mlflow = importlib.util.find_spec("mlflow")
    assert mlflow is not None
    assert mlflow.origin is not None
    versions = Path(mlflow.origin).parent / "store" / "db_migrations" / "versions"
    text = "\n".join(path.read_text() for path in versions.glob("*.py"))
    made = set(re.findall(r"^revision\b.*=\s*[\"'](\w+)[\"']", text, re.MULTILINE))
    followed = set(re.findall(r"^down_revision\b.*=\s*[\"'](\w+)[\"']", text, re.MULTILINE))
    (newest,) = made - followed
    return str(newest)


def _first_line(text: str) -> str:
    """The first line of what somebody else said, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"
